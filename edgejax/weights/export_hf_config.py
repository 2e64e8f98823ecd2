"""``config.json`` of Hugging Face for a ``ModelConfig``, or a refusal where theirs cannot say what ours does.

Field names are those every transformers release since 4.51 reads (5.x turns ``rope_theta`` and ``rope_scaling`` into
its own ``rope_parameters``).
"""

from typing import Any

from edgejax.core.errors import ConfigError
from edgejax.models.config import ModelConfig, RopeScaling
from edgejax.weights.names import HF_ARCHITECTURES, HF_MODEL_TYPES

_ACTIVATIONS = {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}
_TORCH_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def hf_config_fields(
    config: ModelConfig, *, dtype: str, token_ids: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The fields of ``config.json``.

    Args:
      config: the model.
      dtype: ``"f32"``, ``"bf16"`` or ``"f16"``: what the weights are stored in.
      token_ids: ``bos_token_id``, ``eos_token_id``, ``pad_token_id`` where they are known.

    Raises:
      ConfigError: a combination that the family's transformers model does not compute.

    Example:
      >>> config = ModelConfig(family="qwen3", vocab_size=8, d_model=4, n_layers=1, n_heads=2, n_kv_heads=1,
      ...                      head_dim=8, d_ff=8, max_position=16, qk_norm=True)
      >>> hf_config_fields(config, dtype="bf16")["architectures"]
      ['Qwen3ForCausalLM']
    """
    refuse_unusual(config, "Hugging Face")
    fields: dict[str, Any] = {
        "architectures": [HF_ARCHITECTURES[config.family]],
        "model_type": HF_MODEL_TYPES[config.family],
        "torch_dtype": _TORCH_DTYPES[dtype],
        "vocab_size": config.vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": None if config.rope_scaling is None else _rope_scaling(config.rope_scaling),
        "tie_word_embeddings": config.tie_embeddings,
        "use_cache": True,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    fields |= token_ids or {}
    fields |= _family_fields(config)
    return fields


def refuse_unusual(config: ModelConfig, reader: str) -> None:
    """Raise ``ConfigError`` for what no other program would compute for this family."""
    gemma = config.family == "gemma3"
    usual_scale = config.head_dim**-0.5
    wanted = {
        "qk_norm": (config.qk_norm, config.family in ("qwen3", "gemma3")),
        "post_norms": (config.post_norms, gemma),
        "activation": (config.activation, "gelu_tanh" if gemma else "silu"),
        "mlp_bias": (config.mlp_bias, config.mlp_bias and config.family == "llama"),
        "qkv_bias": (config.qkv_bias, True if config.family == "qwen2" else config.o_bias),
        "o_bias": (config.o_bias, config.o_bias and config.family != "qwen2"),
    }
    for field, (value, usual) in wanted.items():
        if value != usual:
            raise ConfigError(
                f"{reader} reads {config.family} models with {field}={usual!r}; this one has {value!r}"
            )
    usual_embed = config.d_model**0.5 if gemma else 1.0
    if not _close(config.embed_scale, usual_embed):
        raise ConfigError(
            f"{reader} scales {config.family} embeddings by {usual_embed:g}, this model by {config.embed_scale:g}"
        )
    if not gemma and not _close(config.query_scale, usual_scale):
        raise ConfigError(
            f"{reader} scales {config.family} attention by {usual_scale:g}, this model by {config.query_scale:g}"
        )
    sliding = any(config.sliding_layers)
    if sliding and config.family == "llama":
        raise ConfigError(f"{reader} has no sliding layers in llama models")
    if (
        sliding
        and not gemma
        and (config.rope_scaling or config.rope_theta_sliding not in (None, config.rope_theta))
    ):
        raise ConfigError(
            f"{reader} has one rotary embedding for all layers of {config.family} models; this one has two"
        )


def sliding_period(config: ModelConfig) -> int | None:
    """p where layers i with (i + 1) % p != 0 are the sliding ones; None where no p says it."""
    flags = config.sliding_layers
    if not any(flags):
        return 1
    for period in range(2, config.n_layers + 2):
        if flags == tuple((i + 1) % period != 0 for i in range(config.n_layers)):
            # All sliding: any period beyond the stack says it; gemma's own one is what readers assume.
            return max(period, 6) if all(flags) else period
    return None


def _family_fields(config: ModelConfig) -> dict[str, Any]:
    if config.family == "llama":
        return {
            "hidden_act": _ACTIVATIONS[config.activation],
            "attention_bias": config.qkv_bias,
            "mlp_bias": config.mlp_bias,
        }
    sliding = config.sliding_layers or (False,) * config.n_layers
    fields: dict[str, Any] = {
        "layer_types": ["sliding_attention" if s else "full_attention" for s in sliding],
        "sliding_window": config.sliding_window,
    }
    if config.family == "gemma3":
        scalar = config.query_scale**-2
        if not _close(scalar, round(scalar)):
            raise ConfigError(
                f"query_pre_attn_scalar is an integer in transformers, {scalar:g} in this model"
            )
        local = config.rope_theta if config.rope_theta_sliding is None else config.rope_theta_sliding
        period = sliding_period(config)
        return fields | {
            "hidden_activation": _ACTIVATIONS[config.activation],
            "attention_bias": config.qkv_bias,
            "query_pre_attn_scalar": round(scalar),
            "rope_local_base_freq": local,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
            **({} if period is None else {"sliding_window_pattern": period}),
        }
    fields |= {"hidden_act": _ACTIVATIONS[config.activation], "use_sliding_window": any(sliding)}
    if any(sliding):
        fields["max_window_layers"] = sliding.index(True)
    if config.family == "qwen3":
        fields["attention_bias"] = config.qkv_bias
    return fields


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    if scaling.kind == "linear":
        return {"rope_type": "linear", "factor": scaling.factor}
    return {
        "rope_type": "llama3",
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_max_position,
    }


def _close(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-5 * abs(b)
