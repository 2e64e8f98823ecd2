"""What a decoder is, in numbers: one configuration for the llama, qwen2, qwen3 and gemma3 families."""

import dataclasses
from typing import Literal

from edgejax.core.errors import ConfigError

FAMILIES = ("llama", "qwen2", "qwen3", "gemma3")
LINEAR_NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclasses.dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for contexts longer than those of pre-training.

    ``linear`` divides all frequencies by ``factor``. ``llama3`` (Llama 3.1 model card) divides the low ones,
    keeps the high ones and blends between: ``low_freq_factor``, ``high_freq_factor`` and
    ``original_max_position`` bound the two regions.
    """

    kind: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder-only transformer. Norm scales are held as they multiply (gemma's ``1 + w`` is added on reading)."""

    family: Literal["llama", "qwen2", "qwen3", "gemma3"]
    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    max_position: int  # longest context the model was trained for, tokens
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0  # rotary base of global layers
    rope_scaling: RopeScaling | None = None  # of global layers
    rope_theta_sliding: float | None = None  # rotary base of sliding layers; None: rope_theta
    sliding_window: int | None = None  # keys a query of a sliding layer sees, itself included
    sliding_layers: tuple[bool, ...] = ()  # per layer: True = sliding; empty: all layers global
    activation: Literal["silu", "gelu_tanh"] = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False  # RMSNorm on each head's query and key, before rotary
    post_norms: bool = False  # gemma: a norm after attention and after the MLP too
    embed_scale: float = 1.0  # gemma: sqrt(d_model)
    attention_scale: float | None = None  # None: head_dim ** -0.5
    tie_embeddings: bool = False  # the head is the embedding table

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ConfigError(
                f"model family {self.family!r} is not supported; supported: {', '.join(FAMILIES)}"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"{self.n_heads} query heads do not divide among {self.n_kv_heads} key/value heads"
            )
        if self.head_dim % 2:
            raise ConfigError(f"rotary embedding needs an even head size, not {self.head_dim}")
        if self.sliding_layers and len(self.sliding_layers) != self.n_layers:
            raise ConfigError(f"{len(self.sliding_layers)} layer kinds for {self.n_layers} layers")
        if any(self.sliding_layers) and not self.sliding_window:
            raise ConfigError("sliding layers need sliding_window")

    @property
    def query_scale(self) -> float:
        """What q . k is multiplied with."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``[O, I]`` of each linear layer of a block, by its name in ``LINEAR_NAMES``."""
        q_width, kv_width = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        return {
            "q_proj": (q_width, self.d_model),
            "k_proj": (kv_width, self.d_model),
            "v_proj": (kv_width, self.d_model),
            "o_proj": (self.d_model, q_width),
            "gate_proj": (self.d_ff, self.d_model),
            "up_proj": (self.d_ff, self.d_model),
            "down_proj": (self.d_model, self.d_ff),
        }

    def linear_biases(self) -> dict[str, bool]:
        """Which linear layers carry a bias."""
        return {
            name: {"q": self.qkv_bias, "k": self.qkv_bias, "v": self.qkv_bias, "o": self.o_bias}.get(
                name[0] if name in LINEAR_NAMES[:4] else "", self.mlp_bias
            )
            for name in LINEAR_NAMES
        }

    def norm_widths(self) -> dict[str, int]:
        """Width of each norm scale of a block, by name."""
        widths = {"attn_norm": self.d_model, "mlp_norm": self.d_model}
        if self.post_norms:
            widths |= {"attn_post_norm": self.d_model, "mlp_post_norm": self.d_model}
        if self.qk_norm:
            widths |= {"q_norm": self.head_dim, "k_norm": self.head_dim}
        return widths

    def n_params(self) -> int:
        """Parameters, a tied head counted once (the N of 4N and 6N FLOP per token)."""
        block = sum(o * i for o, i in self.linear_shapes().values()) + sum(self.norm_widths().values())
        block += sum(self.linear_shapes()[n][0] for n, has in self.linear_biases().items() if has)
        tables = 1 if self.tie_embeddings else 2
        return self.n_layers * block + tables * self.vocab_size * self.d_model + self.d_model
