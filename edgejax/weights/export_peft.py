"""Adapters in the format of Hugging Face PEFT: ``adapter_model.safetensors`` and ``adapter_config.json``.

A folder written here loads with ``peft.PeftModel.from_pretrained``, and a folder written by PEFT loads here when it
holds nothing but plain LoRA on the linear layers of the blocks. Whatever else PEFT can do to a model (DoRA, modules
saved whole, ranks that differ between layers, ...) is refused by name: leaving it out would be another model.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from edgejax.core.arrays import PyTree
from edgejax.core.errors import WeightsError
from edgejax.models.config import LINEAR_NAMES, ModelConfig
from edgejax.models.lora import LoraConfig
from edgejax.weights.atomic import new_folder
from edgejax.weights.merge import check_adapters
from edgejax.weights.names import leaf_names

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_AGAIN = "it is damaged: export the adapter or download it again"
_SIDES = {"lora_a": "lora_A", "lora_b": "lora_B"}

# Fields of adapter_config.json that change the maths, and the values (besides null, false and empty) that do not.
_MUST_BE_NEUTRAL: dict[str, tuple] = {
    "bias": ("none",),
    "use_dora": (),
    "lora_bias": (),
    "modules_to_save": (),
    "rank_pattern": (),
    "alpha_pattern": (),
    "layers_to_transform": (),
    "layer_replication": (),
    "fan_in_fan_out": (),
    "trainable_token_indices": (),
    "target_parameters": (),
    "alora_invocation_tokens": (),
    "use_qalora": (),
    "use_bdlora": (),
    "arrow_config": (),
    "kasa_config": (),
    "velora_config": (),
    "monteclora_config": (),
}
# Starts of LoRA that leave the base as it was; PiSSA, OLoRA, CorDA, LoftQ and their like subtract from it.
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def export_peft(
    adapters: PyTree,
    lora: LoraConfig,
    config: ModelConfig,
    out_dir: str | os.PathLike,
    *,
    base_name: str,
    overwrite: bool = False,
) -> Path:
    """Write adapters as a PEFT folder; return its path.

    Args:
      adapters: ``{"blocks": {name: {"lora_a": f32 [L, R, I], "lora_b": f32 [L, O, R]}}}``.
      lora: rank, alpha, rsLoRA and targets.
      config: the base model.
      out_dir: folder to make.
      base_name: what PEFT should load as the base (a hub id or a folder): ``base_model_name_or_path``.
      overwrite: replace a PEFT folder that is there.

    Raises:
      WeightsError: the adapters do not fit ``lora`` and ``config``, or hold NaN or infinity.
      RunError: the folder exists, cannot be written, or the disk is full.

    Example:
      >>> import jax, tempfile
      >>> from edgejax.models.lora import init_lora
      >>> config = ModelConfig(family="llama", vocab_size=8, d_model=4, n_layers=1, n_heads=2, n_kv_heads=2,
      ...                      head_dim=2, d_ff=4, max_position=16)
      >>> lora = LoraConfig(rank=2, targets=("q_proj",))
      >>> out = export_peft(init_lora(config, lora, jax.random.key(0)), lora, config, tempfile.mkdtemp() + "/a",
      ...                   base_name="my/base")
      >>> load_peft(out, config)[1] == lora
      True

    References:
      PEFT documentation, "PEFT checkpoint format".
    """
    check_adapters(config, adapters, lora)
    tensors = {}
    for name in lora.targets:
        for side in _SIDES:
            stack = np.asarray(adapters["blocks"][name][side], np.float32)
            if not np.isfinite(stack).all():
                raise WeightsError(
                    f"adapter {name}.{side} holds NaN or infinity; export a checkpoint from before that"
                )
            for layer in range(config.n_layers):
                # A copy: safetensors writes the buffer of a view as if it were packed.
                tensors[_key(config, name, layer, side)] = np.ascontiguousarray(stack[layer])
    with new_folder(out_dir, marker=CONFIG_FILE, overwrite=overwrite) as folder:
        # Not save_file: a full disk is an error of the library's own there, not an OSError.
        (folder / WEIGHTS_FILE).write_bytes(safetensors.numpy.save(tensors, metadata={"format": "pt"}))
        text = json.dumps(_adapter_config(lora, base_name), indent=2)
        (folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
    return Path(out_dir)


def load_peft(folder: str | os.PathLike, config: ModelConfig) -> tuple[PyTree, LoraConfig]:
    """Read a PEFT folder: adapters (f32, as ``init_lora`` gives them) and their ``LoraConfig``.

    Raises:
      WeightsError: files missing or damaged; another kind of adapter than plain LoRA (named); adapters on other
        layers than the linear ones of a block; shapes or a number of layers that are another base model's.
    """
    root = Path(folder)
    settings = _read_config(root)
    lora_fields = _lora_fields(settings, root / CONFIG_FILE)
    tensors = _read_tensors(root / WEIGHTS_FILE)
    base = settings.get("base_model_name_or_path")
    wrong_base = (
        f"it is damaged, or was not trained on this {config.family} model of {config.n_layers} layers but on another: "
        f"give that one ({base!r}, as its {CONFIG_FILE} says) with --model"
    )
    keys = {_key(config, name, 0, side): (name, side) for name in LINEAR_NAMES for side in _SIDES}
    found: dict[tuple[str, str], dict[int, np.ndarray]] = {}
    for key, tensor in tensors.items():
        layer = _layer_number(key)
        where = keys.get(_with_layer(key, 0)) if layer is not None else None
        if layer is None or where is None:
            raise WeightsError(
                f"{root / WEIGHTS_FILE}: {key} is no adapter on a linear layer of a block ({', '.join(LINEAR_NAMES)})"
            )
        found.setdefault(where, {})[layer] = tensor
    targets = tuple(name for name in LINEAR_NAMES if (name, "lora_a") in found or (name, "lora_b") in found)
    if not targets:
        raise WeightsError(f"{root / WEIGHTS_FILE} holds no adapter")
    lora = LoraConfig(targets=targets, **lora_fields)
    blocks: dict = {}
    for name in targets:
        n_out, n_in = config.linear_shapes()[name]
        for side, shape in {"lora_a": (lora.rank, n_in), "lora_b": (n_out, lora.rank)}.items():
            layers = found.get((name, side), {})
            missing = sorted(set(range(config.n_layers)) - set(layers))
            extra = sorted(set(layers) - set(range(config.n_layers)))
            if missing or extra:
                what = f"misses layers {missing}" if missing else f"has layers {extra} too"
                raise WeightsError(f"{root / WEIGHTS_FILE}: {name}.{side} {what}; {wrong_base}")
            for layer, tensor in layers.items():
                if tensor.shape != shape:
                    raise WeightsError(
                        f"{root / WEIGHTS_FILE}: {name}.{side} of layer {layer} has shape {tensor.shape}, this model "
                        f"and rank {lora.rank} need {shape}; {wrong_base}"
                    )
            blocks.setdefault(name, {})[side] = np.stack([layers[i] for i in range(config.n_layers)])
    return {"blocks": blocks}, lora


def _key(config: ModelConfig, name: str, layer: int, side: str) -> str:
    leaf = next(leaf for leaf in leaf_names(config) if leaf.path == ("blocks", name, "kernel"))
    return f"{_PREFIX}{leaf.hf_name(layer).removesuffix('.weight')}.{_SIDES[side]}.weight"


_LAYER = re.compile(r"\.layers\.(\d{1,9})\.")


def _layer_number(key: str) -> int | None:
    match = _LAYER.search(key)
    return int(match[1]) if match else None


def _with_layer(key: str, layer: int) -> str:
    return _LAYER.sub(f".layers.{layer}.", key, count=1)


def _adapter_config(lora: LoraConfig, base_name: str) -> dict:
    alpha = int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "revision": None,
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": alpha,
        "use_rslora": lora.rslora,
        "lora_dropout": 0.0,
        "target_modules": list(lora.targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_dora": False,
    }


def _read_config(root: Path) -> dict:
    path = root / CONFIG_FILE
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise WeightsError(
            f"{root} has no {CONFIG_FILE}; a PEFT adapter is a folder with it and {WEIGHTS_FILE}"
        ) from None
    except (OSError, ValueError) as error:
        raise WeightsError(f"cannot read {path}: {error}; {_AGAIN}") from error
    if not isinstance(settings, dict):
        raise WeightsError(f"{path} holds no JSON object; {_AGAIN}")
    return settings


def _lora_fields(settings: dict, path: Path) -> dict:
    kind = settings.get("peft_type")
    if kind != "LORA":
        raise WeightsError(f"{path}: peft_type {kind!r} is not supported; only LORA is")
    for field, neutral in _MUST_BE_NEUTRAL.items():
        value = settings.get(field)
        if value and value not in neutral:
            raise WeightsError(
                f"{path}: {field} = {json.dumps(value)} is not supported; edgejax reads plain LoRA"
            )
    start = settings.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise WeightsError(
            f"{path}: init_lora_weights = {start!r} changes the base weights, so this adapter does not fit the base as "
            "published; convert it with PEFT (save_pretrained with path_initial_model_for_weight_conversion) first"
        )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    whole = isinstance(rank, int) and not isinstance(rank, bool) and rank >= 1
    if not whole or not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
        raise WeightsError(
            f"{path}: r = {rank!r} and lora_alpha = {alpha!r} should be a positive integer and a finite number"
        )
    return {"rank": rank, "alpha": float(alpha), "rslora": bool(settings.get("use_rslora", False))}


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise WeightsError(f"{path} is missing (adapters in .bin files are not read: they can run code)")
    try:
        tensors = safetensors.numpy.load_file(path)
    except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise WeightsError(f"cannot read {path}: {error}; {_AGAIN}") from error
    wide = {key: np.asarray(tensor, np.float32) for key, tensor in tensors.items()}
    for key, tensor in wide.items():
        if not np.isfinite(tensor).all():
            raise WeightsError(f"{path}: {key} holds NaN or infinity; export an earlier checkpoint")
    return wide
