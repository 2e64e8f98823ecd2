"""The GGUF container: metadata and where each tensor lies, read without mapping or copying the weights.

Own code, not ``gguf.GGUFReader``: that makes four numpy objects for every string of the vocabulary, which for
SmolLM2's 98,052 strings measured 3.4 s and 150 MB; here they stay in the file until ``GgufFile.strings``. Block sizes and type numbers still
come from ``gguf.constants``. Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (versions 2, 3,
little-endian).
"""

import dataclasses
import math
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from jaxtyping import UInt8

from edgejax.core.errors import WeightsError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_NAME_BYTES = 65_535  # of a key or a tensor name, as in llama.cpp's reader
MAX_RANK = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {  # value type -> struct format
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d",
}  # fmt: skip
_FIRST_READ_BYTES = 1 << 22  # headers of real files are 1 to 8 MB, nearly all of it vocabulary


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies. ``shape`` is outermost first, as in numpy (GGUF itself writes it reversed)."""

    name: str
    type: GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int  # bytes from the start of the file
    row_bytes: int

    @property
    def n_rows(self) -> int:
        return math.prod(self.shape[:-1])  # of any size, for the file may be damaged


@dataclasses.dataclass(frozen=True)
class StringArray:
    """An array of strings that was stepped over: where it lies, not what it says."""

    offset: int  # bytes from the start of the file
    n_bytes: int
    count: int


@dataclasses.dataclass(frozen=True)
class GgufFile:
    """An opened header. Tensor bytes are read on demand by ``read_rows``, arrays of strings by ``strings``."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]

    def tensor(self, name: str) -> GgufTensor:
        """Raises ``WeightsError`` where there is none of that name."""
        try:
            return self.tensors[name]
        except KeyError:
            raise WeightsError(
                f"{self.path}: tensor {name!r} is missing ({len(self.tensors)} tensors in the file); "
                "the file is incomplete or holds another architecture than it says"
            ) from None

    def strings(self, key: str) -> list[str] | None:
        """The strings of an array, or None where the metadata has no array of strings under ``key``."""
        place = self.metadata.get(key)
        if not isinstance(place, StringArray):
            return None
        data, at, texts = read_at(self.path, place.offset, place.n_bytes), 0, []
        try:
            for _ in range(place.count):
                start = at + 8
                at = start + int.from_bytes(data[at:start], "little")
                texts.append(data[start:at].decode("utf-8"))
        except UnicodeDecodeError:
            raise WeightsError(
                f"{self.path}: entry {len(texts)} of {key} is not UTF-8; the file is damaged: download it again"
            ) from None
        return texts

    def read_rows(self, tensor: GgufTensor, start: int, stop: int) -> UInt8[np.ndarray, "N bytes"]:
        """Raw bytes of rows ``start`` to ``stop``; rows are those of the last axis."""
        n_bytes = (stop - start) * tensor.row_bytes
        data = read_at(self.path, tensor.offset + start * tensor.row_bytes, n_bytes)
        return np.frombuffer(data, np.uint8).reshape(stop - start, tensor.row_bytes)


def open_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file and check that all tensor data it announces is there.

    Raises:
      WeightsError: not a GGUF file, an unknown version, a damaged header, an unknown tensor type, or a file that
        is shorter than its header says.
    """
    path = Path(path)
    try:
        file_bytes = path.stat().st_size
    except OSError as error:
        raise WeightsError(f"{path}: cannot be opened ({error.strerror}); check the path") from error
    n_bytes = _FIRST_READ_BYTES
    while True:
        header = read_at(path, 0, min(n_bytes, file_bytes))
        try:
            return _parse(path, header, file_bytes)
        except _NeedMore:
            if n_bytes >= file_bytes:
                raise WeightsError(
                    f"{path}: the file ends inside its header, after {file_bytes} bytes; it is truncated or "
                    "damaged: download it again"
                ) from None
            n_bytes *= 4


def read_at(path: Path, offset: int, n_bytes: int) -> bytes:
    """``n_bytes`` of a file from ``offset``. A plain read: pages of a mapping would count as our memory."""
    try:
        with open(path, "rb", buffering=0) as file:
            chunks = []
            while n_bytes and (data := os.pread(file.fileno(), n_bytes, offset)):
                chunks.append(data)
                offset, n_bytes = offset + len(data), n_bytes - len(data)
    except OSError as error:
        raise WeightsError(f"{path}: cannot be read ({error.strerror})") from error
    if n_bytes:
        raise WeightsError(f"{path}: ends {n_bytes} bytes early; it is truncated: download it again")
    return chunks[0] if len(chunks) == 1 else b"".join(chunks)


class _NeedMore(Exception):
    """The part of the file that was read ends before the header does."""


class _Cursor:
    def __init__(self, path: Path, data: bytes):
        self.path, self.data, self.at = path, data, 0

    def take(self, n_bytes: int) -> bytes:
        end = self.at + n_bytes
        if end > len(self.data):
            raise _NeedMore
        part = self.data[self.at : end]
        self.at = end
        return part

    def scalar(self, fmt: str):
        return struct.unpack(fmt, self.take(struct.calcsize(fmt)))[0]

    def name(self) -> str:
        """A key or a tensor's name: a string with a bound, so that damage is noticed at once."""
        n_bytes = self.scalar("<Q")
        if n_bytes > MAX_NAME_BYTES:
            raise self.damaged(f"a name of {n_bytes} bytes")
        return self.text(self.take(n_bytes))

    def text(self, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            raise self.damaged(f"text that is not UTF-8 ({raw[:24]!r})") from None

    def damaged(self, what: str) -> WeightsError:
        return WeightsError(
            f"{self.path}: damaged header near byte {self.at}: {what}; download the file again"
        )

    def value(self) -> Any:
        kind = self.scalar("<I")
        if kind == _ARRAY:
            return self.array()
        if kind == _STRING:
            return self.text(self.take(self.scalar("<Q")))
        if kind not in _SCALARS:
            raise self.damaged(f"metadata value type {kind}")
        return self.scalar(_SCALARS[kind])

    def array(self) -> list | StringArray:
        kind, count = self.scalar("<I"), self.scalar("<Q")
        if kind in _SCALARS:
            fmt = _SCALARS[kind][1]
            size = struct.calcsize("<" + fmt)
            return list(struct.unpack(f"<{count}{fmt}", self.take(count * size))) if count else []
        if kind != _STRING:
            raise self.damaged(f"an array of value type {kind}")
        start = self.at
        for _ in range(count):
            self.skip_string()
        return StringArray(start, self.at - start, count)

    def skip_string(self) -> None:
        length_end = self.at + 8
        self.at = length_end + int.from_bytes(self.data[self.at : length_end], "little")
        if max(length_end, self.at) > len(self.data):
            raise _NeedMore


def _parse(path: Path, header: bytes, file_bytes: int) -> GgufFile:
    cursor = _Cursor(path, header)
    if not header:
        raise WeightsError(f"{path}: the file is empty (0 bytes); download it again")
    if header[:4] != MAGIC:
        raise WeightsError(
            f"{path}: not a GGUF file: it begins with {header[:4]!r}, not {MAGIC!r}; give a .gguf file, a "
            "file that `edgejax pack` made, or a Hugging Face folder with config.json"
        )
    cursor.take(4)
    version = cursor.scalar("<I")
    if version not in VERSIONS:
        raise WeightsError(
            f"{path}: GGUF version {version} is not supported (supported: 2 and 3, little-endian)"
        )
    n_tensors, n_values = cursor.scalar("<Q"), cursor.scalar("<Q")
    if 24 * n_tensors + 12 * n_values > file_bytes:  # the least that each of them takes
        raise cursor.damaged(f"{n_tensors} tensors and {n_values} metadata values in {file_bytes} bytes")
    metadata = {}
    for _ in range(n_values):
        key = cursor.name()
        metadata[key] = cursor.value()
    infos = [_tensor_info(cursor) for _ in range(n_tensors)]
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
        raise cursor.damaged(f"general.alignment is {alignment!r}, not a power of two")
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {info.name: dataclasses.replace(info, offset=data_start + info.offset) for info in infos}
    if len(tensors) != n_tensors:
        raise cursor.damaged("two tensors of one name")
    for info in tensors.values():
        end = info.offset + info.n_rows * info.row_bytes
        if end > file_bytes:
            raise WeightsError(
                f"{path}: tensor {info.name!r} ends at byte {end}, the file has {file_bytes}; it is truncated: "
                "download it again"
            )
    return GgufFile(path, metadata, tensors)


def _tensor_info(cursor: _Cursor) -> GgufTensor:
    name, rank = cursor.name(), cursor.scalar("<I")
    if not 1 <= rank <= MAX_RANK:
        raise cursor.damaged(f"tensor {name!r} has {rank} axes")
    shape = struct.unpack(f"<{rank}Q", cursor.take(8 * rank))[::-1]
    number, offset = cursor.scalar("<I"), cursor.scalar("<Q")
    try:
        kind = GGMLQuantizationType(number)
    except ValueError:
        raise WeightsError(
            f"{cursor.path}: tensor {name!r} has the unknown block type {number}; use a file in F32, F16, BF16, "
            "Q8_0, Q4_0, Q4_1, Q4_K, Q5_K or Q6_K"
        ) from None
    block, block_bytes = GGML_QUANT_SIZES[kind]
    if shape[-1] % block:
        raise cursor.damaged(f"tensor {name!r}: rows of {shape[-1]} in {kind.name} blocks of {block}")
    return GgufTensor(name, kind, shape, offset, shape[-1] // block * block_bytes)
