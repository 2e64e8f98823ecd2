"""Adapters as the GGUF file that llama.cpp loads beside a base model (``--lora``).

Conventions (read in llama.cpp's loader, ``src/llama-adapter.cpp``): ``general.type`` is ``adapter``, ``adapter.type``
is ``lora``, ``general.architecture`` is the base's, and each adapted tensor has a ``<name>.lora_a`` ``[R, I]`` and a
``<name>.lora_b`` ``[O, R]``. The scale there is ``adapter.lora.alpha / R`` and nothing else: rsLoRA is folded into
alpha, and an alpha of 0 means "scale 1". Rows of q and k that the architecture interleaves are rows of B.
"""

import math
import os
from pathlib import Path

import gguf
import numpy as np

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError, WeightsError
from edgejax.models.config import LINEAR_NAMES, ModelConfig
from edgejax.models.lora import LoraConfig
from edgejax.weights.atomic import new_file
from edgejax.weights.gguf_file import GgufFile, GgufTensor, open_gguf
from edgejax.weights.gguf_write import file_array
from edgejax.weights.merge import check_adapters
from edgejax.weights.names import GGUF_ARCHITECTURES, LeafName, deinterleave_rows, interleave_rows, leaf_names

_SIDES = ("lora_a", "lora_b")


def export_lora_gguf(
    adapters: PyTree,
    lora: LoraConfig,
    config: ModelConfig,
    out: str | os.PathLike,
    *,
    base_name: str,
    overwrite: bool = False,
) -> Path:
    """Write adapters as a float32 GGUF adapter file; return its path.

    Args:
      adapters: ``{"blocks": {name: {"lora_a": f32 [L, R, I], "lora_b": f32 [L, O, R]}}}``.
      lora: rank, alpha, rsLoRA and targets.
      config: the base model.
      out: file to make.
      base_name: name of the base, for people who look into the file.
      overwrite: replace a file that is there.

    Raises:
      ConfigError: a scaling of 0, which this format cannot say.
      WeightsError: the adapters do not fit ``lora`` and ``config``, or hold NaN or infinity.
      RunError: the file exists, cannot be written, or the disk is full.

    Example:
      >>> import jax, tempfile
      >>> from edgejax.models.lora import init_lora
      >>> config = ModelConfig(family="llama", vocab_size=8, d_model=4, n_layers=1, n_heads=2, n_kv_heads=2,
      ...                      head_dim=2, d_ff=4, max_position=16)
      >>> lora = LoraConfig(rank=4, alpha=8, rslora=True, targets=("q_proj",))
      >>> out = export_lora_gguf(init_lora(config, lora, jax.random.key(0)), lora, config,
      ...                        tempfile.mkdtemp() + "/a.gguf", base_name="base")
      >>> load_lora_gguf(out, config)[1].alpha  # 16 / 4 = 8 / sqrt(4)
      16.0
    """
    check_adapters(config, adapters, lora)
    if lora.scaling == 0:
        raise ConfigError(
            f"alpha {lora.alpha} scales the adapters to nothing, and GGUF reads alpha 0 as scale 1; use PEFT"
        )
    with new_file(out, overwrite=overwrite) as path:
        writer = gguf.GGUFWriter(path, GGUF_ARCHITECTURES[config.family])
        try:
            writer.add_type(gguf.GGUFType.ADAPTER)
            writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
            writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, lora.scaling * lora.rank)
            writer.add_name(f"{base_name} LoRA")
            writer.add_base_model_count(1)
            writer.add_base_model_name(0, base_name)
            for layer in range(config.n_layers):
                for leaf in _targets(config):
                    if leaf.path[1] in lora.targets:
                        _add_pair(writer, leaf, layer, adapters["blocks"][leaf.path[1]])
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
    return Path(out)


def load_lora_gguf(path: str | os.PathLike, config: ModelConfig) -> tuple[PyTree, LoraConfig]:
    """Read a GGUF adapter: adapters (f32) and a ``LoraConfig`` whose alpha / rank is the file's scale.

    Raises:
      WeightsError: not a GGUF adapter, another architecture, tensors on other layers, or other shapes.
    """
    file = open_gguf(Path(path))
    for key, wanted in {
        gguf.Keys.General.TYPE: "adapter",
        gguf.Keys.Adapter.TYPE: "lora",
        gguf.Keys.General.ARCHITECTURE: GGUF_ARCHITECTURES[config.family],
    }.items():
        if file.metadata.get(key) != wanted:
            raise WeightsError(f"{path}: {key} is {file.metadata.get(key)!r}, needed {wanted!r}")
    alpha = float(file.metadata.get(gguf.Keys.Adapter.LORA_ALPHA, 0.0))
    tensors = {name: _read(file, tensor) for name, tensor in file.tensors.items()}
    blocks: dict = {}
    rank = None
    for leaf in _targets(config):
        names = [[f"{leaf.gguf_name(i)}.{side}" for i in range(config.n_layers)] for side in _SIDES]
        if not any(name in tensors for side in names for name in side):
            continue
        try:
            a, b = ([tensors.pop(name) for name in side] for side in names)
        except KeyError as error:
            raise WeightsError(
                f"{path} has no {error.args[0]}: not every layer of this model is adapted"
            ) from None
        rank = a[0].shape[0] if rank is None else rank
        shapes = {x.shape for x in a}, {x.shape for x in b}
        if shapes != ({(rank, leaf.shape[1])}, {(leaf.shape[0], rank)}):
            raise WeightsError(
                f"{path}: {leaf.gguf} has adapters of shapes {shapes}; this model needs [rank, {leaf.shape[1]}] and "
                f"[{leaf.shape[0]}, rank], one rank ({rank}) for all: is it for another base model?"
            )
        if leaf.gguf_interleaved_heads:
            b = [x[deinterleave_rows(leaf.shape[0], leaf.gguf_interleaved_heads)] for x in b]
        blocks[leaf.path[1]] = {"lora_a": np.stack(a), "lora_b": np.stack(b)}
    if tensors:
        raise WeightsError(f"{path}: {sorted(tensors)[0]} is no adapter on a linear layer of this model")
    if rank is None:
        raise WeightsError(f"{path} holds no adapter")
    if not math.isfinite(alpha):
        raise WeightsError(f"{path}: adapter.lora.alpha is {alpha}; export it again")
    targets = tuple(name for name in LINEAR_NAMES if name in blocks)
    return {"blocks": blocks}, LoraConfig(rank=rank, alpha=alpha or float(rank), targets=targets)


def _read(file: GgufFile, tensor: GgufTensor) -> np.ndarray:
    raw = file.read_rows(tensor, 0, tensor.n_rows)
    return gguf.dequantize(raw, tensor.type).astype(np.float32).reshape(tensor.shape)


def _targets(config: ModelConfig) -> list[LeafName]:
    return [leaf for leaf in leaf_names(config) if leaf.kind == "linear"]


def _add_pair(writer: gguf.GGUFWriter, leaf: LeafName, layer: int, pair: dict) -> None:
    for side in _SIDES:
        values = np.asarray(pair[side], np.float32)[layer]
        if not np.isfinite(values).all():
            raise WeightsError(
                f"{leaf.gguf_name(layer)}.{side} holds NaN or infinity; export an earlier checkpoint"
            )
        if side == "lora_b" and leaf.gguf_interleaved_heads:
            values = values[interleave_rows(leaf.shape[0], leaf.gguf_interleaved_heads)]
        writer.add_tensor(f"{leaf.gguf_name(layer)}.{side}", file_array(values))
