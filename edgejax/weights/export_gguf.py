"""A model as one GGUF file: weights (F16 or Q8_0) with the adapters in them, configuration, tokenizer, chat template.

Vectors (norms, biases) are F32, as llama.cpp wants them. A leaf that is held in Q8_0's own code already and has no
adapter is written as it is; others are rounded once, from the float32 sum.
"""

import os
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
from jaxtyping import Float, UInt8

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.data.tokenizer import Tokenizer
from edgejax.models.config import ModelConfig
from edgejax.models.lora import LoraConfig
from edgejax.quant import QuantizedArray
from edgejax.weights.atomic import new_file
from edgejax.weights.export_gguf_config import add_config, rope_divisors
from edgejax.weights.export_gguf_tokenizer import add_fields, copied_fields, made_fields, read_fields
from edgejax.weights.gguf_file import open_gguf
from edgejax.weights.gguf_write import file_array
from edgejax.weights.merge import MergedTensor, merged_tensors, tensor_layout
from edgejax.weights.names import GGUF_ARCHITECTURES, LeafName, interleave_rows

Q8_0_BLOCK = 32
_Q8_0_BYTES = 34  # f16 scale and 32 codes
_ROPE_FREQS = "rope_freqs.weight"
_KEPT_ABOUT_SOURCE = ("general.license", "general.languages", "general.organization")

GgufType = Literal["f16", "q8_0"]


def export_gguf(
    params: PyTree,
    config: ModelConfig,
    out: str | os.PathLike,
    *,
    name: str,
    adapters: PyTree | None = None,
    lora: LoraConfig | None = None,
    tokenizer: Tokenizer | None = None,
    source_gguf: str | Path | None = None,
    weight_type: GgufType = "q8_0",
    overwrite: bool = False,
) -> Path:
    """Write a model that llama.cpp loads; return its path.

    Args:
      params: parameter tree (plain or quantised leaves); after full training, the trained one.
      config: what it is.
      out: file to make.
      name: ``general.name``, for people.
      adapters, lora: merged into the weights, both or neither.
      tokenizer: written as metadata where there is no ``source_gguf``.
      source_gguf: the GGUF file the model came from: its tokenizer, chat template and licence are copied.
      weight_type: of matrices, ``"f16"`` or ``"q8_0"``.
      overwrite: replace a file that is there.

    Raises:
      ConfigError: no tokenizer, or one that GGUF cannot hold; an unknown type; rows that do not divide into blocks;
        a model that this architecture's files cannot describe.
      WeightsError: parameters or adapters that do not fit ``config``, or are not finite in the type.
      RunError: the file exists, cannot be written, or the disk is full.

    Example:
      >>> from edgejax.weights import load_model                             # doctest: +SKIP
      >>> model = load_model("smollm2-135m")                                 # doctest: +SKIP
      >>> export_gguf(model.params, model.config, "out.gguf", name="mine",   # doctest: +SKIP
      ...             source_gguf=model.source.path)
    """
    _check_type(config, weight_type)
    if source_gguf is not None:
        fields = read_fields(open_gguf(source_gguf), _KEPT_ABOUT_SOURCE)
        fields |= copied_fields(source_gguf, config.vocab_size)
    elif tokenizer is not None:
        fields = made_fields(tokenizer, config.vocab_size)
    else:
        raise ConfigError("a GGUF model needs a tokenizer: give tokenizer or source_gguf")
    with new_file(out, overwrite=overwrite) as path:
        writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[config.family])
        try:
            writer.add_type(gguf.GGUFType.MODEL)
            writer.add_name(name)
            add_config(writer, config)
            add_fields(writer, fields)
            q8_0 = weight_type == "q8_0"
            writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if q8_0 else gguf.LlamaFileType.MOSTLY_F16)
            if q8_0:
                writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
            divisors = rope_divisors(config)
            if divisors is not None:
                writer.add_tensor_info(_ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
            for leaf, layer in tensor_layout(config):
                _announce(writer, leaf, layer, weight_type)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            if divisors is not None:
                writer.write_tensor_data(file_array(divisors))
            for tensor in merged_tensors(config, params, adapters, lora):
                writer.write_tensor_data(file_array(_encoded(tensor, weight_type)))
        finally:
            writer.close()
    return Path(out)


def q8_0_blocks(weights: Float[np.ndarray, "N I"]) -> UInt8[np.ndarray, "N bytes"]:
    """Rows in GGUF's Q8_0: 32 codes and a float16 scale a block; the error is at most half of that scale.

    The scale is max |w| / 127, rounded up to a float16 so that the largest weight keeps its code; a block above
    127 x 65504 becomes infinite, which the caller must refuse.

    >>> raw = q8_0_blocks(np.arange(32, dtype=np.float32)[None] * 127 / 31)
    >>> float(raw[0, :2].view(np.float16)[0]), raw[0, -1:].view(np.int8).tolist()
    (1.0, [127])
    """
    blocks = np.asarray(weights, np.float32).reshape(-1, Q8_0_BLOCK)
    wanted = np.abs(blocks).max(axis=-1) / np.float32(127)
    with np.errstate(over="ignore"):
        scale = wanted.astype(np.float16)
    scale = np.where(scale < wanted, np.nextafter(scale, np.float16(np.inf)), scale)
    wide = scale.astype(np.float32)[:, None]
    codes = np.divide(blocks, wide, out=np.zeros_like(blocks), where=wide > 0)
    return _packed(np.rint(codes).astype(np.int8), scale).reshape(len(weights), -1)


def _packed(codes: np.ndarray, scale: np.ndarray) -> UInt8[np.ndarray, "blocks 34"]:
    out = np.empty((len(codes), _Q8_0_BYTES), np.uint8)
    out[:, :2] = scale.astype("<f2")[:, None].view(np.uint8)
    out[:, 2:] = codes.view(np.uint8)
    return out


def _encoded(tensor: MergedTensor, weight_type: GgufType) -> np.ndarray:
    """The tensor as the file holds it, rows in GGUF's order."""
    heads = tensor.leaf.gguf_interleaved_heads
    order = interleave_rows(tensor.shape[0], heads) if heads else None
    if len(tensor.shape) == 1:
        return tensor.convert(lambda rows: rows, order)
    if weight_type == "f16":
        return tensor.convert(lambda rows: rows.astype(np.float16), order)
    base = tensor.base
    if tensor.lora_a is None and isinstance(base, QuantizedArray) and _is_q8_0(base):
        codes, scale = np.asarray(base.codes), np.asarray(base.scale)
        if order is not None:
            codes, scale = codes[order], scale[order]
        return _packed(codes.reshape(-1, Q8_0_BLOCK), scale.reshape(-1)).reshape(len(codes), -1)
    return tensor.convert(q8_0_blocks, order)


def _is_q8_0(weight: QuantizedArray) -> bool:
    plain = weight.bits == 8 and weight.minimum is None
    return plain and weight.block == Q8_0_BLOCK and weight.scale.dtype == np.float16


def _announce(writer: gguf.GGUFWriter, leaf: LeafName, layer: int, weight_type: GgufType) -> None:
    name, size = leaf.gguf_name(layer), int(np.prod(leaf.shape, dtype=np.int64))
    if len(leaf.shape) == 1:
        writer.add_tensor_info(name, leaf.shape, np.dtype(np.float32), 4 * size)
    elif weight_type == "f16":
        writer.add_tensor_info(name, leaf.shape, np.dtype(np.float16), 2 * size)
    else:
        row_bytes = leaf.shape[1] // Q8_0_BLOCK * _Q8_0_BYTES
        raw = gguf.GGMLQuantizationType.Q8_0
        shape = (leaf.shape[0], row_bytes)
        writer.add_tensor_info(name, shape, np.dtype(np.uint8), leaf.shape[0] * row_bytes, raw_dtype=raw)


def _check_type(config: ModelConfig, weight_type: str) -> None:
    if weight_type not in ("f16", "q8_0"):
        raise ConfigError(f"weight type {weight_type!r} is not one of f16, q8_0")
    if weight_type == "q8_0":
        for name, width in {
            "d_model": config.d_model,
            "d_ff": config.d_ff,
            "q width": config.n_heads * config.head_dim,
        }.items():
            if width % Q8_0_BLOCK:
                raise ConfigError(
                    f"Q8_0 needs rows that are multiples of {Q8_0_BLOCK}; {name} is {width}: export F16"
                )
