"""Reading the header of a packed file (``packed_layout``) without believing it.

Its hash catches accidents. A file that was made to do harm has a hash that fits, so every number is checked too before
it is used for anything: after ``decode`` all arrays lie inside the file, aligned, side by side.
"""

import dataclasses
import hashlib
import json
import math
import types
import typing
from pathlib import Path
from typing import Any, NoReturn

from edgejax.core.errors import ConfigError, WeightsError
from edgejax.models.config import ModelConfig, RopeScaling
from edgejax.weights.mapped_file import MappedFile
from edgejax.weights.names import MAX_LAYERS, MAX_SIZE
from edgejax.weights.packed_layout import (
    ALIGNMENT_BYTES,
    DTYPES,
    MAGIC,
    PAD,
    PAGE_BYTES,
    SEAL,
    SEAL_BYTES,
    VERSION,
    Header,
    Origin,
    Part,
    Section,
)

MAX_HEADER_BYTES = 1 << 24  # 30 layers take 1 << 16


def is_packed(path: Path) -> bool:
    """Whether a file begins as packed files do, of whatever version."""
    try:
        with open(path, "rb") as file:
            return file.read(8 + len(MAGIC))[8:] == MAGIC
    except OSError:
        return False


def decode(file: MappedFile) -> tuple[Header, int, str]:
    """The header of an opened file, the byte where its first section begins, and its seal as hexadecimal text.

    Raises:
      WeightsError: no packed file, another version, or one that is damaged, truncated or inconsistent.
    """
    bad = Complaint(file.path)
    text, seal = _sealed_text(bad, file)
    data_start = 8 + len(text) + SEAL_BYTES
    try:
        content = json.loads(text)
        metadata = {key: value for key, value in content.pop("__metadata__").items() if key != "format"}
        metadata = {key: json.loads(value) for key, value in metadata.items()}
        parts = [_part(bad, name, entry) for name, entry in content.items()]
        sections = [_section(bad, *entry) for entry in metadata["sections"]]
        header = Header(
            config=_config(bad, metadata["config"]),
            origin=Origin(**metadata["origin"]),
            notes=tuple(metadata["notes"]),
            tokenizer=metadata["tokenizer"],
            sections={section.name: section for section in sections},
            parts={part.name: part for part in parts if not _is_filling(part)},
        )
        texts = [*dataclasses.astuple(header.origin), *header.notes]
    except WeightsError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        bad(f"its header cannot be understood ({type(error).__name__}: {error!s:.200})")
    if not (all(isinstance(text, str) for text in texts) and isinstance(header.tokenizer, dict | None)):
        bad("its header has other things where text must be")
    _check_sections(bad, sections, file.n_bytes - data_start)
    _check_parts(bad, parts, file.n_bytes - data_start)
    return header, data_start, seal


class Complaint:
    """Raises ``WeightsError`` with the file's name before the fault and the way out behind it."""

    def __init__(self, path: Path):
        self.path = path

    def __call__(self, what: str) -> NoReturn:
        raise WeightsError(f"{self.path}: {what}; the file is damaged: pack the model again (edgejax pack)")


def _sealed_text(bad: Complaint, file: MappedFile) -> tuple[bytes, str]:
    begin = bytes(file.read(0, min(file.n_bytes, 8 + len(MAGIC) + 20)))
    if begin[8 : 8 + len(MAGIC)] != MAGIC:
        raise WeightsError(
            f"{file.path}: not a packed model: it begins with {begin[:24]!r}; make one with `edgejax pack`"
        )
    version = begin[8 + len(MAGIC) :].split(b'"')[0].decode("latin-1")
    if version != VERSION:
        raise WeightsError(
            f"{file.path}: packed files of version {version!r} are not supported (supported: {VERSION}); pack the model "
            "again, or use the edgejax that packed it"
        )
    n_bytes = int.from_bytes(begin[:8], "little")
    if n_bytes > MAX_HEADER_BYTES or (8 + n_bytes + SEAL_BYTES) % PAGE_BYTES:
        bad(f"it announces a header of {n_bytes} bytes")
    if 8 + n_bytes + SEAL_BYTES > file.n_bytes:
        bad(f"it has {file.n_bytes} bytes and ends inside its header of {n_bytes}")
    sealed, seal = file.read(0, 8 + n_bytes), file.read(8 + n_bytes, SEAL_BYTES).hex()
    if (found := hashlib.sha256(sealed).hexdigest()) != seal:
        bad(f"the SHA-256 of its header is {found}, its seal says {seal}")
    return bytes(sealed[8:]), seal


def _is_filling(part: Part) -> bool:
    return part.name == SEAL or part.name.startswith(PAD)


def _part(bad: Complaint, name: str, entry: dict) -> Part:
    kind, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if kind not in DTYPES:
        bad(f"array {name!r:.80} has the type {kind!r:.80}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        bad(f"array {name!r:.80} has the shape {shape!r:.80} and lies from {begin!r:.80} to {end!r:.80}")
    part = Part(name, DTYPES[kind], tuple(shape), begin - SEAL_BYTES)
    if part.stop != end - SEAL_BYTES:
        bad(f"array {name!r:.80}, {kind} {shape!r:.80}, lies from {begin!r:.80} to {end!r:.80}")
    return part


def _section(bad: Complaint, name: str, start: int, stop: int, sha256: str) -> Section:
    if not (type(start) is type(stop) is int and type(name) is type(sha256) is str):
        bad(f"section {name!r:.80} lies from {start!r:.80} to {stop!r:.80} with the hash {sha256!r:.80}")
    return Section(name, start, stop, sha256)


def _check_sections(bad: Complaint, sections: list[Section], data_bytes: int) -> None:
    """Sections are whole pages and fill the file."""
    if len({section.name for section in sections}) != len(sections):
        bad("two of its sections have one name")
    at = 0
    for section in sections:
        if section.start != at or section.stop <= at or section.stop % PAGE_BYTES:
            place = f"from {section.start!r:.80} to {section.stop!r:.80}"
            bad(f"section {section.name!r:.80} lies {place}, the one before ends at {at!r:.80}")
        at = section.stop
    if at > data_bytes:
        bad(f"its sections have {at!r:.80} bytes, of which {data_bytes} are there: it is truncated")
    if at < data_bytes:
        bad(f"{data_bytes - at} bytes follow its last section")


def _check_parts(bad: Complaint, parts: list[Part], data_bytes: int) -> None:
    """Arrays fill the file without a gap and without an overlap, and begin where they can be used without a copy."""
    at = -SEAL_BYTES
    for part in sorted(parts, key=lambda part: (part.start, part.stop)):
        if part.start != at:
            bad(
                f"array {part.name!r:.80} begins at byte {part.start!r:.80}, the one before ends at {at!r:.80}"
            )
        if part.start % ALIGNMENT_BYTES and not _is_filling(part):
            bad(f"array {part.name!r:.80} begins at byte {part.start}, no multiple of {ALIGNMENT_BYTES}")
        at = part.stop
    if at != data_bytes:
        bad(f"its arrays end at byte {at!r:.80}, its sections at {data_bytes}")


def _config(bad: Complaint, values: dict[str, Any]) -> ModelConfig:
    values["sliding_layers"] = tuple(values["sliding_layers"])
    if values["rope_scaling"] is not None:
        values["rope_scaling"] = RopeScaling(**values["rope_scaling"])
        _check_fields(bad, values["rope_scaling"])
    try:
        config = ModelConfig(**values)
    except ConfigError as error:
        bad(f"its configuration cannot be: {error}")
    _check_fields(bad, config)
    return config


def _check_fields(bad: Complaint, settings: ModelConfig | RopeScaling) -> None:
    for name, kind in typing.get_type_hints(type(settings)).items():
        value = getattr(settings, name)
        most = MAX_LAYERS if name == "n_layers" else MAX_SIZE
        least = 0 if name == "sliding_window" else 1
        if not _fits(value, kind) or (type(value) is int and not least <= value <= most):
            bad(f"its configuration says {name} = {value!r:.80}")


def _fits(value: object, kind: Any) -> bool:
    """Whether ``value`` is what a type hint says; a whole number is a float too."""
    options = typing.get_args(kind)
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in options)
    if typing.get_origin(kind) is typing.Literal:
        return value in options
    if typing.get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(member, options[0]) for member in value)
    if kind is float:
        return type(value) in (int, float) and math.isfinite(value)  # type: ignore[arg-type]  # a number by now
    return type(value) is kind
