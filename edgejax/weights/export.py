"""One function for every format a fine-tuned model can leave in."""

import os
from pathlib import Path
from typing import Literal, get_args

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.models.lora import LoraConfig
from edgejax.weights.export_gguf import export_gguf
from edgejax.weights.export_lora_gguf import export_lora_gguf
from edgejax.weights.export_merged import export_merged
from edgejax.weights.export_peft import export_peft
from edgejax.weights.load import LoadedModel, ModelSource, OpenedModel
from edgejax.weights.presets import PRESETS

ExportFormat = Literal["peft", "lora-gguf", "merged-safetensors", "merged-gguf-f16", "merged-gguf-q8_0"]
EXPORT_FORMATS: tuple[str, ...] = get_args(ExportFormat)


def export(
    model: LoadedModel | OpenedModel,
    out: str | os.PathLike,
    *,
    format: ExportFormat,
    adapters: PyTree | None = None,
    lora: LoraConfig | None = None,
    params: PyTree | None = None,
    dtype: Literal["f32", "bf16", "f16"] = "bf16",
    overwrite: bool = False,
) -> Path:
    """Write what was trained in one of ``EXPORT_FORMATS``; return the path.

    Args:
      model: the base it was trained on; of one that was only opened, weights are read where they are needed.
      out: folder (``peft``, ``merged-safetensors``) or file (the GGUF formats) to make.
      format: ``peft`` and ``lora-gguf`` hold the adapters alone; the merged ones are whole models.
      adapters, lora: after LoRA training; both.
      params: after full-parameter training: the trained tree. Not together with adapters. With neither, a merged
        format writes the base model itself.
      dtype: of merged safetensors; other formats say theirs in their name.
      overwrite: replace what is there.

    Raises:
      ConfigError: an unknown format, an adapter format without adapters, adapters and params together, or a model
        the format cannot hold.
      WeightsError: trees that do not fit the model, or values that are not finite.
      RunError: ``out`` exists, cannot be written, or the disk is full; nothing is left of the attempt.

    Example:
      >>> EXPORT_FORMATS
      ('peft', 'lora-gguf', 'merged-safetensors', 'merged-gguf-f16', 'merged-gguf-q8_0')
    """
    if format not in EXPORT_FORMATS:
        raise ConfigError(f"export format {format!r} is unknown; there are: {', '.join(EXPORT_FORMATS)}")
    if adapters is not None and params is not None:
        raise ConfigError("give adapters or params: a run trains one or the other")
    if (adapters is None) != (lora is None):
        raise ConfigError("adapters and lora go together: give both, or neither")
    config, source = model.config, model.source
    if os.path.exists(out) and os.path.exists(source.path) and os.path.samefile(out, source.path):
        raise ConfigError(f"{out} is the model itself; it is not overwritten, choose another name")
    if format in ("peft", "lora-gguf"):
        if adapters is None or lora is None:
            raise ConfigError(
                f"{format} holds adapters, and this run trained all parameters: use a merged format"
            )
        write = export_peft if format == "peft" else export_lora_gguf
        return write(adapters, lora, config, out, base_name=_base_name(source), overwrite=overwrite)
    tree = _params(model) if params is None else params
    if format == "merged-safetensors":
        return export_merged(
            tree,
            config,
            out,
            adapters=adapters,
            lora=lora,
            tokenizer=model.tokenizer,
            source_folder=source.path if source.format == "huggingface" else None,
            dtype=dtype,
            overwrite=overwrite,
        )
    return export_gguf(
        tree,
        config,
        out,
        name=f"{Path(source.name).stem} fine-tuned",
        adapters=adapters,
        lora=lora,
        tokenizer=model.tokenizer,
        source_gguf=source.path if source.format == "gguf" else None,
        weight_type="f16" if format == "merged-gguf-f16" else "q8_0",
        overwrite=overwrite,
    )


def _params(model: LoadedModel | OpenedModel) -> PyTree:
    return model.params if isinstance(model, LoadedModel) else model.load(on_host=True).params


def _base_name(source: ModelSource) -> str:
    """What PEFT can load the base by: the hub's name of a preset, else the folder or name that was given."""
    preset = PRESETS.get(source.name)
    if preset is not None and preset.hub_repo:
        return preset.hub_repo
    return source.name
