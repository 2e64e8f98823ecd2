"""The header of a packed file: a safetensors file whose arrays lie layer by layer, aligned and hashed.

A loop over layers that maps its frozen weights needs more than safetensors promises: all arrays of a layer next to
each other, arrays at multiples of 64 bytes (or JAX copies them), layers on pages of their own (or giving back the
pages of one takes part of another), and hashes. All of it fits inside the format, so there is no format of our own
and any safetensors reader opens the file:

- the format lets a writer order arrays freely, and forbids holes between them: gaps are arrays named ``pad.N``;
- the JSON header may end in spaces: it is padded so that header and seal fill whole pages;
- the seal, an array of 32 bytes, is the SHA-256 of everything before it. It is what the file is known by, for the
  header holds the hash of every section; sections cover every byte after the seal, padding too;
- what else is to be said is text in ``__metadata__``: configuration, origin, sections, notes, tokenizer.

::

    8 bytes length | JSON | seal || embed || layer.0 || ... || layer.L-1 || final_norm || head || tokenizer

``||`` is a multiple of 4096 bytes. ``QuantizedArray``s are up to three arrays, ``<leaf>.codes`` (I8: 8 bits;
U32: 4 or, where one has 16 weights, 2), ``.scale`` and ``.minimum``. The format: https://github.com/huggingface/safetensors#format
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from edgejax.models.config import ModelConfig

VERSION = "1"
MAGIC = b'{"__metadata__":{"format":"edgejax-packed","version":"'  # at byte 8
PAGE_BYTES, ALIGNMENT_BYTES, SEAL_BYTES = 4096, 64, 32
SEAL, PAD, TOKENIZER = "seal", "pad.", "tokenizer.json"
DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_NO_HASH = "0" * 64


@dataclasses.dataclass(frozen=True)
class Part:
    """One array of the file; ``start`` counts bytes from the first section, as all positions here do."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def stop(self) -> int:
        return self.start + math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Section:
    """Whole pages that are read, hashed and given back together."""

    name: str
    start: int
    stop: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Origin:
    """What the weights were packed from.

    Attributes:
      name: a preset, the name of a file or folder, or of a shape.
      format: ``"gguf"``, ``"huggingface"``, ``"packed"`` or ``"random"``.
      sha256: of the source (``weights.load.ModelSource``); empty for random weights.
      base: the form that was asked for.
    """

    name: str
    format: str
    sha256: str
    base: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Header:
    """All that is known about a packed file before its weights are read.

    Attributes:
      config: the decoder's.
      origin: what was packed.
      notes: what a person should know, of leaves held otherwise than asked.
      tokenizer: arguments of ``data.Tokenizer`` beside its backend, or None where there is no tokenizer.
      sections: by name, in order of position.
      parts: all arrays but padding and seal, by name.
    """

    config: ModelConfig
    origin: Origin
    notes: tuple[str, ...]
    tokenizer: dict[str, Any] | None
    sections: dict[str, Section]
    parts: dict[str, Part]

    @property
    def data_bytes(self) -> int:
        """Of all sections together."""
        return list(self.sections.values())[-1].stop


def place(arrays: Mapping[str, Iterable[tuple[str, tuple[int, ...], np.dtype]]]) -> dict[str, dict]:
    """``sections`` and ``parts`` of a header: where the arrays ``(name, shape, dtype)`` of each section will lie.

    >>> where = place({"layer.0": [("a", (3,), np.dtype(np.int8)), ("b", (2, 2), np.dtype(np.float32))]})
    >>> [(part.name, part.start, part.stop) for part in where["parts"].values()], where["sections"]["layer.0"].stop
    ([('a', 0, 3), ('b', 64, 80)], 4096)
    """
    sections, parts, at = {}, {}, 0
    for section, members in arrays.items():
        start = at
        for name, shape, dtype in members:
            parts[name] = Part(name, dtype, shape, -(-at // ALIGNMENT_BYTES) * ALIGNMENT_BYTES)
            at = parts[name].stop
        at = -(-at // PAGE_BYTES) * PAGE_BYTES
        sections[section] = Section(section, start, at, _NO_HASH)
    return {"sections": sections, "parts": parts}


def encode(header: Header) -> bytes:
    """The file up to its first section. Its length does not depend on what the hashes are."""
    metadata = {
        "format": "edgejax-packed",
        "version": VERSION,
        "config": dataclasses.asdict(header.config),
        "origin": dataclasses.asdict(header.origin),
        "notes": header.notes,
        "tokenizer": header.tokenizer,
        "sections": [dataclasses.astuple(section) for section in header.sections.values()],
    }
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
    content: dict[str, Any] = {
        "__metadata__": texts,
        SEAL: _entry(np.dtype(np.uint8), (SEAL_BYTES,), -SEAL_BYTES),
    }
    at = 0
    for part in header.parts.values():
        content |= _padding(at, part.start) | {part.name: _entry(part.dtype, part.shape, part.start)}
        at = part.stop
    content |= _padding(at, header.data_bytes)
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + SEAL_BYTES) % PAGE_BYTES)
    sealed = len(text).to_bytes(8, "little") + text
    assert text.startswith(MAGIC)
    return sealed + hashlib.sha256(sealed).digest()


def _entry(dtype: np.dtype, shape: tuple[int, ...], start: int) -> dict[str, Any]:
    begin = SEAL_BYTES + start  # safetensors counts from the end of its header
    end = begin + math.prod(shape) * dtype.itemsize
    return {"dtype": _NAMES[dtype], "shape": shape, "data_offsets": [begin, end]}


def _padding(start: int, stop: int) -> dict[str, dict]:
    return {f"{PAD}{start}": _entry(np.dtype(np.uint8), (stop - start,), start)} if stop > start else {}
