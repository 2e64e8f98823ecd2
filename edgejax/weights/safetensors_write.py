"""Safetensors files written tensor by tensor.

The ``safetensors`` library writes a dictionary of all tensors at once; here a header is written first, for shapes are
known before values, and each tensor follows when it has been made, so that one is in memory at a time. The format:
eight bytes of header length (little-endian), JSON padded with spaces to a multiple of eight, then the values.
https://github.com/huggingface/safetensors#format
"""

import json
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

STORED_TYPES = {
    "f32": (np.dtype(np.float32), "F32"),
    "bf16": (np.dtype(ml_dtypes.bfloat16), "BF16"),
    "f16": (np.dtype(np.float16), "F16"),
}
"""Our names -> numpy's and safetensors'."""


class Entry(NamedTuple):
    """A tensor to come."""

    name: str
    shape: tuple[int, ...]


def write_shards(
    folder: Path, entries: list[Entry], arrays: Iterable[np.ndarray], *, dtype: str, max_shard_bytes: int
) -> list[Path]:
    """Write tensors of one type into ``model.safetensors``, or into numbered shards and an index.

    Args:
      folder: where to.
      entries: names and shapes of all tensors.
      arrays: their values, in the same order, made when they are asked for.
      dtype: ``"f32"``, ``"bf16"`` or ``"f16"``; arrays must have it.
      max_shard_bytes: a shard takes tensors up to this; a larger tensor has a shard of its own.
    """
    item_bytes = STORED_TYPES[dtype][0].itemsize
    sizes = [item_bytes * int(np.prod(entry.shape, dtype=np.int64)) for entry in entries]
    shards: list[list[Entry]] = [[]]
    room = max_shard_bytes
    for entry, size in zip(entries, sizes, strict=True):
        if shards[-1] and size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(entry)
        room -= size
    count = len(shards)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    if count == 1:
        names = ["model.safetensors"]
    stream = iter(arrays)
    for name, members in zip(names, shards, strict=True):
        _write(folder / name, members, stream, dtype)
    if count > 1:
        where = {entry.name: name for name, members in zip(names, shards, strict=True) for entry in members}
        text = json.dumps({"metadata": {"total_size": sum(sizes)}, "weight_map": where}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text + "\n", encoding="utf-8")
    return [folder / name for name in names]


def _write(path: Path, entries: list[Entry], arrays: Iterator[np.ndarray], dtype: str) -> None:
    numpy_dtype, code = STORED_TYPES[dtype]
    header: dict = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        start, end = end, end + numpy_dtype.itemsize * int(np.prod(entry.shape, dtype=np.int64))
        header[entry.name] = {"dtype": code, "shape": list(entry.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for entry in entries:
            array = next(arrays)
            if array.shape != entry.shape or array.dtype != numpy_dtype:
                found = f"{array.shape} {array.dtype}"
                raise AssertionError(f"{entry.name}: promised {entry.shape} {numpy_dtype}, got {found}")
            file.write(np.ascontiguousarray(array).view(np.uint8).data)
