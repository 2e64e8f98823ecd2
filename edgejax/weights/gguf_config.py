"""``ModelConfig`` from the metadata and tensor names of a GGUF file.

Keys are those of llama.cpp's ``gguf-py/gguf/constants.py``; what a missing key means is what llama.cpp's
``llama-model.cpp`` takes it to mean.
"""

import math
from typing import Any

import numpy as np

from edgejax.core.errors import ConfigError, WeightsError
from edgejax.models.config import ModelConfig, RopeScaling
from edgejax.models.rope import frequencies
from edgejax.weights.gguf_blocks import FLOAT_DTYPES
from edgejax.weights.gguf_file import GgufFile
from edgejax.weights.names import GGUF_ARCHITECTURES, MAX_LAYERS, MAX_SIZE

ROPE_FREQS = "rope_freqs.weight"
_GEMMA3_PERIOD = 6  # every sixth layer is global
_GEMMA3_27B_LAYERS = 62  # scales queries by the width per head instead of the head size
_UNSUPPORTED = (  # <architecture>.<key>: changes the maths where it is not 0, 1 or "none"
    "expert_count", "expert_used_count", "attn_logit_softcapping", "final_logit_softcapping", "logit_scale",
    "embedding_scale", "residual_scale", "attention.scale", "attention.clamp_kqv", "attention.max_alibi_bias",
    "use_parallel_residual", "attention.layer_norm_epsilon", "rope.scaling.attn_factor", "attention.temperature_scale",
)  # fmt: skip
_KNOWN = {
    "block_count", "embedding_length", "feed_forward_length", "context_length", "vocab_size",
    "attention.head_count", "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.layer_norm_rms_epsilon", "attention.sliding_window", "attention.sliding_window_pattern",
    "rope.dimension_count", "rope.freq_base", "rope.freq_base_swa", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.original_context_length", "rope.scaling.finetuned",
}  # fmt: skip
_LLAMA3_VARIANTS = (  # factor, low, high, original context of the Llama 3.1 and 3.2 model cards
    (8.0, 1.0, 4.0, 8192),
    (32.0, 1.0, 4.0, 8192),
)


def gguf_config(file: GgufFile) -> ModelConfig:
    """The configuration of the model in ``file``.

    Raises:
      WeightsError: an architecture, or a setting that changes the maths, that is not supported; a missing key.
    """
    keys = _Keys(file)
    family, arch = keys.family, keys.arch
    keys.refuse_unsupported()
    n_layers, d_model = keys.whole("block_count", at_most=MAX_LAYERS), keys.whole("embedding_length")
    n_heads = keys.whole("attention.head_count")
    head_dim = keys.whole("attention.key_length", default=d_model // n_heads)
    for same in ("attention.value_length", "rope.dimension_count"):
        if (value := keys.whole(same, default=head_dim)) != head_dim:
            raise WeightsError(
                f"{file.path}: {arch}.{same} is {value}, but the head size is {head_dim}; partial rotary embedding "
                "and values of another width are not supported"
            )
    gemma: dict[str, Any] = _gemma3(keys, n_layers, d_model, n_heads, head_dim) if family == "gemma3" else {}
    if not gemma and keys.get("attention.sliding_window"):
        raise WeightsError(f"{file.path}: {arch}.attention.sliding_window is not supported for {arch}")
    vocab_size = file.tensor("token_embd.weight").shape[0]
    has = file.tensors.__contains__
    try:
        return ModelConfig(
            family=family,
            vocab_size=vocab_size,
            d_model=d_model,
            n_layers=n_layers,
            n_heads=n_heads,
            n_kv_heads=keys.whole("attention.head_count_kv", default=n_heads),
            head_dim=head_dim,
            d_ff=keys.whole("feed_forward_length"),
            max_position=keys.whole("context_length"),
            norm_eps=keys.number("attention.layer_norm_rms_epsilon"),
            rope_theta=keys.number("rope.freq_base", default=1e6 if gemma else 1e4),
            rope_scaling=_rope_scaling(keys, head_dim),
            qkv_bias=has("blk.0.attn_q.bias"),
            o_bias=has("blk.0.attn_output.bias"),
            mlp_bias=has("blk.0.ffn_gate.bias"),
            qk_norm=family in ("qwen3", "gemma3"),
            tie_embeddings=not has("output.weight"),
            **gemma,
        )
    except ConfigError as error:
        raise WeightsError(f"{file.path}: {error}") from error


def unknown_keys(file: GgufFile) -> list[str]:
    """Settings of the architecture that nobody here knows; they are passed over, and should be told of."""
    prefix = f"{file.metadata.get('general.architecture')}."
    ours = (key for key in file.metadata if key.startswith(prefix))
    return sorted(key for key in ours if key.removeprefix(prefix) not in {*_KNOWN, *_UNSUPPORTED})


class _Keys:
    """Typed access to ``<architecture>.<key>``."""

    def __init__(self, file: GgufFile):
        self.file = file
        arch = file.metadata.get("general.architecture")
        families = {name: family for family, name in GGUF_ARCHITECTURES.items()}
        if not isinstance(arch, str) or arch not in families:
            raise WeightsError(
                f"{file.path}: architecture {arch!r} is not supported; supported: {', '.join(families)}"
            )
        self.arch: str = arch
        self.family: Any = families[arch]

    def get(self, key: str) -> Any:
        return self.file.metadata.get(f"{self.arch}.{key}")

    def _typed(self, key: str, kinds, default, what: str):
        value = self.get(key)
        if value is None:
            if default is None:
                raise WeightsError(f"{self.file.path}: metadata {self.arch}.{key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, kinds):
            shown = f"one value a layer ({value[:4]}...)" if isinstance(value, list) else repr(value)
            raise WeightsError(
                f"{self.file.path}: metadata {self.arch}.{key} is {shown}; {what} is supported"
            )
        return value

    def whole(self, key: str, default: int | None = None, at_most: int = MAX_SIZE) -> int:
        value = self._typed(key, int, default, "one whole number for all layers")
        if not 1 <= value <= at_most:
            raise WeightsError(
                f"{self.file.path}: metadata {self.arch}.{key} is {value}; it must be at least 1 and at most {at_most}"
            )
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = float(self._typed(key, (int, float), default, "one number"))
        if not math.isfinite(value) or value <= 0:
            raise WeightsError(
                f"{self.file.path}: metadata {self.arch}.{key} is {value}; it must be positive"
            )
        # Written as float32: the number that was meant is the shortest one that rounds to it.
        return float(str(np.float32(value)))

    def factor(self, key: str) -> float | None:
        """A number, or None where it is missing or 0, which means the same."""
        return self.number(key) if self._typed(key, (int, float), 0.0, "one number") else None

    def refuse_unsupported(self) -> None:
        for key in _UNSUPPORTED:
            if self.get(key) not in (None, 0, 1, False):
                raise WeightsError(
                    f"{self.file.path}: {self.arch}.{key} = {self.get(key)!r} changes the computation and is not "
                    "supported"
                )


def _gemma3(keys: _Keys, n_layers: int, d_model: int, n_heads: int, head_dim: int) -> dict[str, Any]:
    pattern = keys.get("attention.sliding_window_pattern")
    if isinstance(pattern, list):
        sliding = tuple(bool(x) for x in pattern)
    else:
        period = keys.whole("attention.sliding_window_pattern", default=_GEMMA3_PERIOD)
        sliding = tuple((i + 1) % period != 0 for i in range(n_layers))
    return {
        "rope_theta_sliding": keys.number("rope.freq_base_swa", default=10_000.0),
        "sliding_window": keys.whole("attention.sliding_window"),
        "sliding_layers": sliding,
        "activation": "gelu_tanh",
        "post_norms": True,
        "embed_scale": d_model**0.5,
        "attention_scale": (d_model / n_heads if n_layers == _GEMMA3_27B_LAYERS else head_dim) ** -0.5,
    }


def _rope_scaling(keys: _Keys, head_dim: int) -> RopeScaling | None:
    file = keys.file
    kind = keys.get("rope.scaling.type") or "none"
    if ROPE_FREQS in file.tensors:
        if kind not in ("none", "llama3"):
            raise WeightsError(
                f"{file.path}: rope scaling {kind!r} together with {ROPE_FREQS} is not supported"
            )
        return _llama3_scaling(keys, head_dim)
    for factors in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if factors in file.tensors:
            raise WeightsError(f"{file.path}: {factors} (longrope scaling) is not supported")
    legacy = keys.factor("rope.scale_linear")  # files from before rope.scaling.*
    factor = keys.factor("rope.scaling.factor") or legacy or 1.0
    if kind not in ("none", "linear"):
        raise WeightsError(f"{file.path}: rope scaling {kind!r} is not supported; supported: linear, llama3")
    if (kind == "linear" or legacy) and factor != 1.0:
        return RopeScaling(kind="linear", factor=factor)
    return None


def _llama3_scaling(keys: _Keys, head_dim: int) -> RopeScaling:
    """Which Llama 3 scaling gives the divisors in ``rope_freqs.weight``; the file does not name its parameters."""
    file = keys.file
    tensor = file.tensor(ROPE_FREQS)
    if tensor.type not in FLOAT_DTYPES or tensor.shape != (head_dim // 2,):
        raise WeightsError(
            f"{file.path}: {ROPE_FREQS} is {tensor.type.name} {tensor.shape}, expected floats ({head_dim // 2},)"
        )
    divisors = file.read_rows(tensor, 0, 1).view(FLOAT_DTYPES[tensor.type])[0].astype(np.float64)
    theta = keys.number("rope.freq_base", default=1e4)
    candidates = [*_LLAMA3_VARIANTS, (float(divisors.max()), 1.0, 4.0, 8192)]
    for factor, low, high, original in candidates:
        scaling = RopeScaling(
            kind="llama3",
            factor=factor,
            low_freq_factor=low,
            high_freq_factor=high,
            original_max_position=original,
        )
        expected = frequencies(theta, head_dim, None) / frequencies(theta, head_dim, scaling)
        if np.allclose(divisors, expected, rtol=1e-4):
            return scaling
    raise WeightsError(
        f"{file.path}: {ROPE_FREQS} holds divisors from {divisors.min():g} to {divisors.max():g} that are not a Llama 3 "
        "scaling with low_freq_factor 1, high_freq_factor 4 and an original context of 8192; other ones are not "
        "supported from GGUF: use the Hugging Face files"
    )
