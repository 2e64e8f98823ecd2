"""Shapes of published models, by name: memory and speed depend on nothing else of them."""

import difflib

from edgejax.core.errors import ConfigError
from edgejax.models.config import ModelConfig, RopeScaling


def find_shape(name: str) -> ModelConfig:
    """The decoder of that name in ``SHAPES``.

    >>> find_shape("smollm2-135m").n_params()
    134515008

    Raises:
      ConfigError: there is none; names the nearest.
    """
    if name in SHAPES:
        return SHAPES[name]
    near = difflib.get_close_matches(name.lower(), SHAPES, n=3, cutoff=0.4)
    raise ConfigError(
        f"no shape named {name!r}; {'the nearest: ' + ', '.join(near) + '; ' if near else ''}there are: "
        f"{', '.join(SHAPES)}"
    )


def _smollm2(
    d_model: int, n_layers: int, n_heads: int, n_kv_heads: int, d_ff: int, rope: float
) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=49152, d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads,
        head_dim=64, d_ff=d_ff, max_position=8192, rope_theta=rope, tie_embeddings=True,
    )  # fmt: skip


def _qwen2(
    d_model: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    head_dim: int,
    d_ff: int,
    *,
    vocab_size=151936,
    tied=True,
) -> ModelConfig:
    return ModelConfig(
        family="qwen2", vocab_size=vocab_size, d_model=d_model, n_layers=n_layers, n_heads=n_heads,
        n_kv_heads=n_kv_heads, head_dim=head_dim, d_ff=d_ff, max_position=32768, norm_eps=1e-6, rope_theta=1e6,
        qkv_bias=True, tie_embeddings=tied,
    )  # fmt: skip


def _llama3(d_model: int, n_layers: int, n_heads: int, head_dim: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        family="llama", vocab_size=128256, d_model=d_model, n_layers=n_layers, n_heads=n_heads, n_kv_heads=8,
        head_dim=head_dim, d_ff=d_ff, max_position=131072, rope_theta=500_000.0, tie_embeddings=True,
        rope_scaling=RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0),
    )  # fmt: skip


SHAPES: dict[str, ModelConfig] = {
    "tiny": ModelConfig(
        family="llama", vocab_size=256, d_model=32, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=8, d_ff=96,
        max_position=2048, tie_embeddings=True,
    ),
    "smollm2-135m": _smollm2(576, 30, 9, 3, 1536, 100_000.0),
    "smollm2-360m": _smollm2(960, 32, 15, 5, 2560, 100_000.0),
    "smollm2-1.7b": _smollm2(2048, 24, 32, 32, 8192, 130_000.0),
    "qwen2.5-0.5b": _qwen2(896, 24, 14, 2, 64, 4864),
    "qwen2.5-1.5b": _qwen2(1536, 28, 12, 2, 128, 8960),
    "qwen2.5-3b": _qwen2(2048, 36, 16, 2, 128, 11008),
    "qwen2.5-7b": _qwen2(3584, 28, 28, 4, 128, 18944, vocab_size=152064, tied=False),
    "qwen3-0.6b": ModelConfig(
        family="qwen3", vocab_size=151936, d_model=1024, n_layers=28, n_heads=16, n_kv_heads=8, head_dim=128,
        d_ff=3072, max_position=40960, norm_eps=1e-6, rope_theta=1e6, qk_norm=True, tie_embeddings=True,
    ),
    "llama-3.2-1b": _llama3(2048, 16, 32, 64, 8192),
    "llama-3.2-3b": _llama3(3072, 28, 24, 128, 8192),
    "gemma-3-1b": ModelConfig(
        family="gemma3", vocab_size=262144, d_model=1152, n_layers=26, n_heads=4, n_kv_heads=1, head_dim=256,
        d_ff=6912, max_position=32768, norm_eps=1e-6, rope_theta=1e6, rope_theta_sliding=10_000.0,
        sliding_window=512, sliding_layers=tuple((layer + 1) % 6 != 0 for layer in range(26)),
        activation="gelu_tanh", qk_norm=True, post_norms=True, embed_scale=1152**0.5, attention_scale=256**-0.5,
        tie_embeddings=True,
    ),
    "tinyllama-1.1b": ModelConfig(
        family="llama", vocab_size=32000, d_model=2048, n_layers=22, n_heads=32, n_kv_heads=4, head_dim=64,
        d_ff=5632, max_position=2048,
    ),
    "llama-13b": ModelConfig(
        family="llama", vocab_size=32000, d_model=5120, n_layers=40, n_heads=40, n_kv_heads=40, head_dim=128,
        d_ff=13824, max_position=4096,
    ),
}  # fmt: skip
