"""``ModelConfig`` from a Hugging Face ``config.json``.

Both spellings of rotary parameters are read: ``rope_theta``/``rope_scaling`` (transformers 4) and
``rope_parameters`` (transformers 5, per layer kind for gemma3). A setting that changes the maths in a way we do
not compute is an error; one nobody here knows is passed over with a note.
"""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

from edgejax.core.errors import ConfigError, WeightsError
from edgejax.models.config import ModelConfig, RopeScaling
from edgejax.weights.names import HF_ARCHITECTURES, HF_MODEL_TYPES, MAX_LAYERS, MAX_SIZE

T = TypeVar("T")
_ACTIVATIONS: dict[str, Literal["silu", "gelu_tanh"]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu_pytorch_tanh": "gelu_tanh",
}
_DEFAULTS: dict[str, dict[str, Any]] = {  # of the transformers configuration classes
    "llama": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "qwen2": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0},
    "qwen3": {"tie_word_embeddings": False, "rms_norm_eps": 1e-6, "rope_theta": 10_000.0, "head_dim": 128},
    "gemma3": {
        "tie_word_embeddings": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "vocab_size": 262_208,
        "num_key_value_heads": 4,
        "num_attention_heads": 8,
        "max_position_embeddings": 131_072,
        "sliding_window_pattern": 6,
    },
}
_MUST_BE_OFF = (  # null, 0 or False, or the maths is another one
    "attn_logit_softcapping", "final_logit_softcapping", "use_sliding_window", "use_bidirectional_attention",
    "quantization_config", "num_experts", "num_local_experts", "n_routed_experts", "logit_scale", "attn_scale",
    "use_qk_norm", "qk_layernorm", "use_parallel_residual", "alibi", "clip_qkv", "no_rope_layers",
    "use_mrope",
)  # fmt: skip
_MUST_BE_ONE = (
    "partial_rotary_factor", "rotary_pct", "residual_multiplier", "embedding_multiplier", "logits_scaling",
)  # fmt: skip
_READ = {
    "model_type", "architectures", "hidden_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "intermediate_size", "vocab_size", "max_position_embeddings", "head_dim",
    "rms_norm_eps", "hidden_act", "hidden_activation", "attention_bias", "mlp_bias", "tie_word_embeddings",
    "rope_theta", "rope_scaling", "rope_parameters", "rope_local_base_freq", "layer_types", "sliding_window",
    "sliding_window_pattern", "_sliding_window_pattern", "query_pre_attn_scalar", "text_config",
}  # fmt: skip
_HARMLESS = {
    "attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "initializer_range", "pretraining_tp",
    "transformers_version", "use_cache", "dtype", "torch_dtype", "max_window_layers", "cache_implementation",
    "is_llama_config", "rope_interleaved", "transformers.js_config", "_name_or_path", "vision_config",
    "boi_token_index", "eoi_token_index", "image_token_index", "mm_tokens_per_image", "_attn_implementation",
    "_attn_implementation_autoset", "output_attentions", "output_hidden_states", "return_dict", "id2label",
    "label2id", "unsloth_fixed", "unsloth_version", "auto_map", "is_decoder", "is_encoder_decoder",
    "chunk_size_feed_forward", "problem_type", "bos_token", "eos_token",
}  # fmt: skip


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises ``WeightsError`` with the path for anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{path}: not valid JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{path}: holds a {type(value).__name__}, not a JSON object")
    return value


def hf_config(folder: Path, notes: list[str]) -> ModelConfig:
    """The configuration of a model's folder.

    Args:
      folder: with ``config.json``.
      notes: gets a line for settings that are not known and were passed over.

    Raises:
      WeightsError: an architecture or setting that is not supported, or a missing one, by name.
    """
    path = folder / "config.json"
    settings = read_json(path)
    family = _family(path, settings)
    if isinstance(settings.get("text_config"), dict):  # gemma3 with a vision tower: its text half
        tied = settings.get("tie_word_embeddings")
        settings = ({} if tied is None else {"tie_word_embeddings": tied}) | settings["text_config"]
    _refuse(path, settings)
    unknown = sorted(set(settings) - _READ - _HARMLESS - set(_MUST_BE_OFF) - set(_MUST_BE_ONE))
    if unknown:
        notes.append(f"{path.name}: unknown settings were passed over: {', '.join(unknown)}")
    reader = _Settings(path, _DEFAULTS[family] | {k: v for k, v in settings.items() if v is not None})
    try:
        return _build(reader, family)
    except ConfigError as error:
        raise WeightsError(f"{path}: {error}") from error


class _Settings:
    def __init__(self, path: Path, values: dict[str, Any]):
        self.path, self.values = path, values

    def whole(self, name: str, default: int | None = None, at_most: int = MAX_SIZE) -> int:
        value = self.values.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= at_most:
            wanted = f"it must be a whole number of at least 1 and at most {at_most}"
            found = "is missing" if value is None else f"is {value!r}; {wanted}"
            raise WeightsError(f"{self.path}: {name} {found}")
        return value

    def number(self, name: str) -> float:
        return self.positive(name, self.values.get(name))

    def positive(self, name: str, value: Any) -> float:
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value <= sys.float_info.max
        ):
            raise WeightsError(f"{self.path}: {name} is {value!r}; it must be a positive number")
        return float(value)

    def one_of(self, name: str, value: Any, allowed: Mapping[str, T]) -> T:
        if not isinstance(value, str) or value not in allowed:
            raise WeightsError(
                f"{self.path}: {name} {value!r} is not supported; supported: {', '.join(allowed)}"
            )
        return allowed[value]

    def group(self, name: str, value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise WeightsError(f"{self.path}: {name} is {value!r}; it must be an object")
        return value

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            raise WeightsError(f"{self.path}: {name} is {value!r}; it must be true or false")
        return value


def _family(path: Path, settings: dict[str, Any]) -> Any:
    families = {kind: family for family, kind in HF_MODEL_TYPES.items()} | {"gemma3": "gemma3"}
    family = _Settings(path, settings).one_of("model_type", settings.get("model_type"), families)
    allowed = [HF_ARCHITECTURES[family], "Gemma3ForConditionalGeneration", None]
    listed = settings.get("architectures") or [None]
    architecture = listed[0] if isinstance(listed, list) else listed
    if architecture not in allowed:
        raise WeightsError(
            f"{path}: architecture {architecture!r} is not supported; supported: {', '.join(HF_ARCHITECTURES.values())}"
        )
    return family


def _refuse(path: Path, settings: dict[str, Any]) -> None:
    for name in _MUST_BE_OFF:
        if settings.get(name):
            raise WeightsError(
                f"{path}: {name} = {settings[name]!r} changes the computation and is not supported"
            )
    for name in _MUST_BE_ONE:
        if settings.get(name) not in (None, 1):
            raise WeightsError(
                f"{path}: {name} = {settings[name]!r} changes the computation and is not supported"
            )
    if settings.get("rope_interleaved"):
        raise WeightsError(f"{path}: rope_interleaved = true is not supported")


def _build(reader: _Settings, family: Any) -> ModelConfig:
    d_model, n_layers = reader.whole("hidden_size"), reader.whole("num_hidden_layers", at_most=MAX_LAYERS)
    n_heads = reader.whole("num_attention_heads")
    name = "hidden_activation" if "hidden_activation" in reader.values else "hidden_act"
    activation = reader.one_of(name, reader.values.get(name, "silu"), _ACTIVATIONS)
    theta, scaling, theta_sliding, scaling_sliding = _rope(reader, family)
    if scaling_sliding is not None:
        raise WeightsError(f"{reader.path}: rope scaling of sliding layers is not supported")
    bias = reader.flag("attention_bias")
    kinds: dict[str, Any] = {}
    sliding = _sliding_layers(reader, family, n_layers)
    if family == "gemma3":
        kinds = {
            "rope_theta_sliding": theta_sliding,
            "sliding_window": reader.whole("sliding_window"),
            "sliding_layers": sliding,
            "post_norms": True,
            "embed_scale": d_model**0.5,
            "attention_scale": reader.number("query_pre_attn_scalar") ** -0.5,
        }
    return ModelConfig(
        family=family,
        vocab_size=reader.whole("vocab_size"),
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=reader.whole("num_key_value_heads", default=n_heads),
        head_dim=reader.whole("head_dim", default=d_model // n_heads),
        d_ff=reader.whole("intermediate_size"),
        max_position=reader.whole("max_position_embeddings"),
        norm_eps=reader.number("rms_norm_eps"),
        rope_theta=theta,
        rope_scaling=scaling,
        activation=activation,
        qkv_bias=family == "qwen2" or bias,
        o_bias=family != "qwen2" and bias,
        mlp_bias=family == "llama" and reader.flag("mlp_bias"),
        qk_norm=family in ("qwen3", "gemma3"),
        tie_embeddings=reader.flag("tie_word_embeddings"),
        **kinds,
    )


def _sliding_layers(reader: _Settings, family: str, n_layers: int) -> tuple[bool, ...]:
    layer_types = reader.values.get("layer_types")
    if layer_types is None:
        if family != "gemma3":
            return ()
        name = next(n for n in ("_sliding_window_pattern", "sliding_window_pattern") if n in reader.values)
        period = reader.whole(name)
        return tuple((i + 1) % period != 0 for i in range(n_layers))
    if not isinstance(layer_types, list):
        raise WeightsError(f"{reader.path}: layer_types is {layer_types!r}; it must be a list")
    allowed = {"full_attention", "sliding_attention"} if family == "gemma3" else {"full_attention"}
    if other := sorted(set(map(str, layer_types)) - allowed):
        raise WeightsError(
            f"{reader.path}: layer_types with {', '.join(other)} are not supported for {family}"
        )
    return tuple(kind == "sliding_attention" for kind in layer_types)


def _rope(
    reader: _Settings, family: str
) -> tuple[float, RopeScaling | None, float | None, RopeScaling | None]:
    """Base and scaling of global layers, then of sliding ones (None where there are none)."""
    values = reader.values
    local = reader.number("rope_local_base_freq") if family == "gemma3" else None
    new = values.get("rope_parameters")
    if new is None:
        scaling = _scaling(reader, values.get("rope_scaling"))
        return reader.number("rope_theta"), scaling, local, None
    new = reader.group("rope_parameters", new)
    full = reader.group("full_attention of rope_parameters", new.get("full_attention", new))
    theta = reader.positive("rope_theta", full.get("rope_theta", values["rope_theta"]))
    if family != "gemma3":
        return theta, _scaling(reader, full), None, None
    slide = reader.group("sliding_attention of rope_parameters", new.get("sliding_attention", {}))
    theta_sliding = reader.positive("rope_theta of sliding_attention", slide.get("rope_theta", local))
    return theta, _scaling(reader, full), theta_sliding, _scaling(reader, slide)


def _scaling(reader: _Settings, rope: Any) -> RopeScaling | None:
    if not rope:
        return None
    rope = reader.group("rope_scaling", rope)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if rope.get("partial_rotary_factor") not in (None, 1):
        raise WeightsError(
            f"{reader.path}: partial_rotary_factor = {rope['partial_rotary_factor']!r} is not supported"
        )
    if kind == "default":
        return None
    if kind not in ("linear", "llama3"):
        raise WeightsError(
            f"{reader.path}: rope type {kind!r} is not supported; supported: default, linear, llama3"
        )
    factor = reader.positive("rope scaling factor", rope.get("factor"))
    if kind == "linear":
        return RopeScaling(kind="linear", factor=factor)
    return RopeScaling(
        kind="llama3",
        factor=factor,
        low_freq_factor=reader.positive("low_freq_factor", rope.get("low_freq_factor")),
        high_freq_factor=reader.positive("high_freq_factor", rope.get("high_freq_factor")),
        original_max_position=int(
            reader.positive("original_max_position_embeddings", rope.get("original_max_position_embeddings"))
        ),
    )
