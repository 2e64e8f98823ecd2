"""GGUF metadata of a ``ModelConfig``: what ``gguf_config`` and llama.cpp read back as the same model.

Keys are those of llama.cpp's ``gguf-py/gguf/constants.py``. What GGUF leaves to the architecture (scales, activations,
which norms there are) is not written; a model that differs there is refused.
"""

import gguf
import numpy as np

from edgejax.core.errors import ConfigError
from edgejax.models.config import ModelConfig
from edgejax.models.rope import frequencies
from edgejax.weights.export_hf_config import refuse_unusual, sliding_period

_GEMMA3_27B_LAYERS = 62  # llama.cpp scales its queries by the width per head
_GEMMA3_PERIOD = 6
_GEMMA3_SLIDING_THETA = 10_000.0


def add_config(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    """Add the architecture's metadata.

    Raises:
      ConfigError: the model computes something that this architecture's GGUF files cannot say.
    """
    _refuse(config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.d_model)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_scaling is not None and config.rope_scaling.kind == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_scaling.factor)
    if config.family == "gemma3":
        _add_gemma3(writer, config)


def rope_divisors(config: ModelConfig) -> np.ndarray | None:
    """``rope_freqs.weight``, f32 ``[C / 2]``: what Llama 3's scaling divides each frequency by; None without it."""
    scaling = config.rope_scaling
    if scaling is None or scaling.kind != "llama3":
        return None
    plain, scaled = (frequencies(config.rope_theta, config.head_dim, s) for s in (None, scaling))
    return (np.asarray(plain, np.float64) / np.asarray(scaled, np.float64)).astype(np.float32)


def _add_gemma3(writer: gguf.GGUFWriter, config: ModelConfig) -> None:
    writer.add_sliding_window(config.sliding_window or config.max_position)
    period = sliding_period(config)
    if period is None:
        layers = "".join("s" if s else "g" for s in config.sliding_layers)
        raise ConfigError(f"GGUF says which layers slide by a period; {layers} has none")
    if period != _GEMMA3_PERIOD:
        writer.add_uint32(gguf.Keys.Attention.SLIDING_WINDOW_PATTERN.format(arch=writer.arch), period)
    theta = config.rope_theta if config.rope_theta_sliding is None else config.rope_theta_sliding
    if theta != _GEMMA3_SLIDING_THETA:
        writer.add_float32(gguf.Keys.Rope.FREQ_BASE_SWA.format(arch=writer.arch), theta)


def _refuse(config: ModelConfig) -> None:
    refuse_unusual(config, "GGUF")
    if config.family == "gemma3":
        per_head = config.d_model / config.n_heads
        usual = (per_head if config.n_layers == _GEMMA3_27B_LAYERS else config.head_dim) ** -0.5
        if abs(config.query_scale - usual) > 1e-5 * usual:
            raise ConfigError(
                f"GGUF scales gemma3 attention by {usual:g} here, this model by {config.query_scale:g}; "
                "export it as merged-safetensors"
            )
        if config.qkv_bias:
            raise ConfigError("GGUF has no biases in gemma3 attention; export it as merged-safetensors")
    elif any(config.sliding_layers):
        raise ConfigError(
            f"GGUF has no sliding layers in {config.family} models; export it as merged-safetensors"
        )
    if config.rope_scaling is not None and config.rope_scaling.kind == "llama3" and config.family != "llama":
        raise ConfigError(f"GGUF has Llama 3's rotary scaling in llama models only, not in {config.family}")
