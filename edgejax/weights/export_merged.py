"""A model as a Hugging Face folder: weights with the adapters in them, configuration, tokenizer, chat template.

``transformers.AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` read it. The tokenizer's
files are those of the source where that was a Hugging Face folder, and are made from the tokenizer otherwise.
"""

import functools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers
from tokenizers import processors

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.data.tokenizer import Tokenizer
from edgejax.models.config import ModelConfig
from edgejax.models.lora import LoraConfig
from edgejax.weights.atomic import new_folder
from edgejax.weights.export_hf_config import hf_config_fields
from edgejax.weights.merge import merged_tensors, tensor_layout
from edgejax.weights.safetensors_write import STORED_TYPES, Entry, write_shards

MAX_SHARD_BYTES = 5 * 10**9
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "generation_config.json",
)


def export_merged(
    params: PyTree,
    config: ModelConfig,
    out_dir: str | os.PathLike,
    *,
    adapters: PyTree | None = None,
    lora: LoraConfig | None = None,
    tokenizer: Tokenizer | None = None,
    source_folder: str | os.PathLike | None = None,
    dtype: Literal["f32", "bf16", "f16"] = "bf16",
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> Path:
    """Write a model that ``transformers`` loads; return its folder.

    Args:
      params: parameter tree (plain or quantised leaves); after full training, the trained one.
      config: what it is.
      out_dir: folder to make.
      adapters, lora: merged into the weights, both or neither.
      tokenizer: the model's; None writes a folder without tokenizer files.
      source_folder: the Hugging Face folder the model came from: its tokenizer files are copied instead of made.
      dtype: what the weights are stored in. Merging in bf16 rounds away adapter parts below 1/512 of a weight.
      max_shard_bytes: bytes of weights in one file.
      overwrite: replace a model folder that is there.

    Raises:
      ConfigError: an unknown dtype, or a model that transformers' class of this family does not compute.
      WeightsError: parameters or adapters that do not fit ``config``, or are not finite in ``dtype``.
      RunError: the folder exists, cannot be written, or the disk is full.

    Example:
      >>> from edgejax.weights import load_model                             # doctest: +SKIP
      >>> model = load_model("smollm2-135m")                                 # doctest: +SKIP
      >>> export_merged(model.params, model.config, "out", tokenizer=model.tokenizer)  # doctest: +SKIP
    """
    if dtype not in STORED_TYPES:
        raise ConfigError(f"dtype {dtype!r} is not one of {', '.join(STORED_TYPES)}")
    ids = {} if tokenizer is None else _token_ids(tokenizer)
    fields = hf_config_fields(config, dtype=dtype, token_ids=ids)
    entries = [Entry(leaf.hf_name(layer), leaf.shape) for leaf, layer in tensor_layout(config)]
    arrays = _narrowed(config, params, adapters, lora, STORED_TYPES[dtype][0])
    with new_folder(out_dir, marker="config.json", overwrite=overwrite) as folder:
        write_shards(folder, entries, arrays, dtype=dtype, max_shard_bytes=max_shard_bytes)
        _write_json(folder / "config.json", fields)
        _write_json(folder / "generation_config.json", ids)
        if source_folder is not None:
            _copy_tokenizer(Path(source_folder), folder)
        elif tokenizer is not None:
            _write_tokenizer(tokenizer, config, folder)
    return Path(out_dir)


def _narrowed(config, params, adapters, lora, dtype: np.dtype) -> Iterator[np.ndarray]:
    for tensor in merged_tensors(config, params, adapters, lora):
        yield tensor.convert(functools.partial(_as_stored, offset=tensor.leaf.hf_offset, dtype=dtype))


def _as_stored(rows: np.ndarray, *, offset: float, dtype: np.dtype) -> np.ndarray:
    return (rows - np.float32(offset)).astype(dtype)


def _token_ids(tokenizer: Tokenizer) -> dict[str, Any]:
    stops = sorted(tokenizer.stop_ids, key=lambda i: i != tokenizer.eos_id)  # EOS first
    ids = {
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": stops[0] if len(stops) == 1 else stops or None,
        "pad_token_id": tokenizer.pad_id,
    }
    return {name: value for name, value in ids.items() if value is not None}


def _copy_tokenizer(source: Path, folder: Path) -> None:
    for name in _TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_tokenizer(tokenizer: Tokenizer, config: ModelConfig, folder: Path) -> None:
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str())
    if tokenizer.add_bos and tokenizer.bos_id is not None:
        _begin_with(backend, tokenizer.bos_id)
    backend.save(str(folder / "tokenizer.json"))
    named = {
        k: v
        for k, v in tokenizer.special.items()
        if k in ("bos_token", "eos_token", "pad_token", "unk_token")
    }
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **named,
        "model_max_length": config.max_position,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.chat_template is not None:
        settings["chat_template"] = tokenizer.chat_template
    _write_json(folder / "tokenizer_config.json", settings)


def _begin_with(backend: tokenizers.Tokenizer, bos_id: int) -> None:
    """Make the saved tokenizer begin texts with BOS, as ours does by ``add_bos``, unless it does already."""
    if backend.encode("a").ids[:1] == [bos_id]:
        return
    bos = backend.id_to_token(bos_id)
    template = processors.TemplateProcessing(
        single=f"{bos}:0 $A:0", pair=f"{bos}:0 $A:0 {bos}:1 $B:1", special_tokens=[(bos, bos_id)]
    )
    before = backend.post_processor
    backend.post_processor = template if before is None else processors.Sequence([before, template])


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
