"""The safetensors container, read a few rows at a time.

Own code for the 60 lines of the format: the ``safetensors`` package maps the whole file (its pages count as our
memory), and its numpy reader has no bfloat16 in older versions. Format:
https://github.com/huggingface/safetensors#format (8 bytes length, JSON header, data).
"""

import dataclasses
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np

from edgejax.core.errors import WeightsError
from edgejax.weights.gguf_file import read_at

DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit
INDEX_NAME, SINGLE_NAME = "model.safetensors.index.json", "model.safetensors"


@dataclasses.dataclass(frozen=True)
class SafeTensor:
    """Where a tensor lies."""

    path: Path
    name: str
    dtype_name: str
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file

    @property
    def dtype(self) -> np.dtype:
        """Raises ``WeightsError`` for types that are no floats we hold."""
        try:
            return DTYPES[self.dtype_name]
        except KeyError:
            raise WeightsError(
                f"{self.path}: tensor {self.name!r} has type {self.dtype_name}, which is not supported; supported: "
                f"{', '.join(DTYPES)}"
            ) from None

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows of the last axis, ``[stop - start, I]``; a vector is one row."""
        width = self.shape[-1]
        row_bytes = width * self.dtype.itemsize
        data = read_at(self.path, self.offset + start * row_bytes, (stop - start) * row_bytes)
        return np.frombuffer(data, self.dtype).reshape(stop - start, width)


def open_safetensors(path: Path) -> dict[str, SafeTensor]:
    """The tensors of one file, by name.

    Raises:
      WeightsError: unreadable, no safetensors file, or shorter than its header says.
    """
    try:
        file_bytes = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror})") from error
    if file_bytes < 8:
        raise WeightsError(f"{path}: {file_bytes} bytes are no safetensors file; download it again")
    header_bytes = int.from_bytes(read_at(path, 0, 8), "little")
    if header_bytes > min(MAX_HEADER_BYTES, file_bytes - 8):
        raise WeightsError(
            f"{path}: announces a header of {header_bytes} bytes in a file of {file_bytes}; it is truncated, damaged, "
            "or no safetensors file: download it again"
        )
    try:
        header = json.loads(read_at(path, 8, header_bytes))
        tensors = {
            name: SafeTensor(
                path,
                name,
                str(entry["dtype"]),
                tuple(int(n) for n in entry["shape"]),
                8 + header_bytes + int(entry["data_offsets"][0]),
            )
            for name, entry in header.items()
            if name != "__metadata__"
        }
        ends = {name: 8 + header_bytes + int(header[name]["data_offsets"][1]) for name in tensors}
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        raise WeightsError(f"{path}: damaged header ({error}); download the file again") from error
    for name, tensor in tensors.items():
        if ends[name] > file_bytes or tensor.offset < 8 + header_bytes:
            raise WeightsError(
                f"{path}: tensor {name!r} ends at byte {ends[name]}, the file has {file_bytes}; it is truncated: "
                "download it again"
            )
        known = DTYPES.get(tensor.dtype_name)
        n_bytes = math.prod(tensor.shape) * (known.itemsize if known else 0)
        if known and (n_bytes != ends[name] - tensor.offset or not tensor.shape):
            raise WeightsError(
                f"{path}: tensor {name!r} has {ends[name] - tensor.offset} bytes, its shape {tensor.shape} in "
                f"{tensor.dtype_name} needs {n_bytes}; the file is damaged"
            )
    return tensors


def open_folder(folder: Path) -> tuple[dict[str, SafeTensor], list[Path]]:
    """All tensors of a model's folder, one file or many, and the files in order of name."""
    index = folder / INDEX_NAME
    if index.exists():
        try:
            mapping = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({folder / Path(name).name for name in mapping.values()})
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise WeightsError(
                f"{index}: no index of safetensors files ({error!r}); download it again"
            ) from error
    elif (folder / SINGLE_NAME).exists():
        files = [folder / SINGLE_NAME]
    else:
        raise WeightsError(
            f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}; give a folder with safetensors weights (torch's .bin "
            "files are not read: they can run code)"
        )
    tensors: dict[str, SafeTensor] = {}
    for path in files:
        tensors |= open_safetensors(path)
    return tensors, files
