"""Making a packed file (``packed_layout``) from any source of leaves, in the memory of a few megabytes.

A matrix is read, quantised and written ``leaves.CHUNK_WEIGHTS`` at a time, straight to its place; nothing wider and
nothing longer exists. Each section is then read back for its hash, and the header, whose length was known from the
beginning, is written last.
"""

import dataclasses
import itertools
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from edgejax.core.errors import ConfigError, RunError
from edgejax.core.units import format_bytes
from edgejax.data.tokenizer import Tokenizer
from edgejax.weights.atomic import new_file
from edgejax.weights.form import FLOAT32, float_form, form_of
from edgejax.weights.leaves import (
    Base,
    MatrixPlan,
    check_base,
    leaf_layers,
    matrix_pieces,
    note_what_is_lost,
    plan_matrix,
    read_vector,
)
from edgejax.weights.mapped_file import MappedFile
from edgejax.weights.names import LeafName
from edgejax.weights.packed_layout import TOKENIZER, Header, Origin, Section, encode, place
from edgejax.weights.packed_leaves import leaf_arrays, leaf_parts, section_of
from edgejax.weights.params import LeafReader

Plans = dict[tuple[str, ...], MatrixPlan]  # by path of the leaf
_TOKENIZER_SETTINGS = ("bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "chat_template", "special")


def write_packed(
    path: str | os.PathLike,
    reader: LeafReader,
    *,
    origin: Origin,
    base: Base = "auto",
    tokenizer: Tokenizer | None = None,
    notes: Sequence[str] = (),
    overwrite: bool = False,
    on_section: Callable[[int, int], None] = lambda done, of: None,
) -> tuple[str, ...]:
    """Write a model layer by layer, in the form that ``load_model`` would hold it in.

    Args:
      path: the file to make; it is there whole, or not at all.
      reader: an opened source.
      origin: where it comes from.
      base: how matrices are held; see ``load_model``.
      tokenizer: goes into the file with its chat template.
      notes: what is known of the source; kept with what is noted here.
      overwrite: replace a file that is there.
      on_section: called with the number of sections that are done, and of all.

    Returns:
      All notes.

    Raises:
      ConfigError: an unknown ``base``, or the source itself as ``path``.
      RunError: ``path`` exists, cannot be written, or there is no space for it; nothing is left of the attempt.
      WeightsError: what is wrong with the source.
    """
    base, target, noted = check_base(base), Path(path), list(notes)
    source = Path(str(reader.path))
    if target.exists() and source.exists() and target.samefile(source):
        raise ConfigError(f"{target} is the model itself; it is not overwritten, choose another name")
    plans = {leaf.path: _plan(reader, leaf, base, noted) for leaf in reader.leaves}
    text = b"" if tokenizer is None else tokenizer.backend.to_str().encode()
    settings = None if tokenizer is None else {name: getattr(tokenizer, name) for name in _TOKENIZER_SETTINGS}
    with new_file(target, overwrite=overwrite) as part:
        while True:  # once; again where codes turn out to need wider scales
            header = Header(
                config=reader.config,
                origin=origin,
                notes=tuple(dict.fromkeys(noted)),
                tokenizer=settings,
                **place(_arrays(reader, plans, len(text))),
            )
            _check_space(target, part, header)
            too_narrow = _write(part, reader, plans, header, text, on_section)
            if not too_narrow:
                return header.notes
            for name in too_narrow:
                form = dataclasses.replace(plans[name].form, dtype=FLOAT32)
                plans[name] = plans[name]._replace(form=form)


def _plan(reader: LeafReader, leaf: LeafName, base: Base, notes: list[str]) -> MatrixPlan:
    if leaf.kind in ("norm", "bias"):
        return MatrixPlan(float_form(FLOAT32))
    plan = plan_matrix(reader, leaf, leaf_layers(leaf, reader.config.n_layers), base, notes)
    note_what_is_lost(reader, leaf, plan, notes)
    return plan


def _in_order(reader: LeafReader) -> list[tuple[LeafName, int]]:
    """Leaves as they lie in the file: embedding, layers, final norm and head."""
    stacked = [leaf for leaf in reader.leaves if leaf.stacked]
    first, *rest = (leaf for leaf in reader.leaves if not leaf.stacked)
    layers = range(reader.config.n_layers)
    return [
        (first, 0),
        *((leaf, layer) for layer in layers for leaf in stacked),
        *((leaf, 0) for leaf in rest),
    ]


def _arrays(reader: LeafReader, plans: Plans, tokenizer_bytes: int) -> dict[str, list]:
    """What ``place`` takes: the arrays of each section."""
    arrays: dict[str, list] = {}
    for leaf, layer in _in_order(reader):
        arrays.setdefault(section_of(leaf, layer), []).extend(leaf_arrays(leaf, layer, plans[leaf.path].form))
    if tokenizer_bytes:
        arrays["tokenizer"] = [(TOKENIZER, (tokenizer_bytes,), np.dtype(np.uint8))]
    return arrays


def _check_space(target: Path, part: Path, header: Header) -> None:
    needed, free = len(encode(header)) + header.data_bytes, shutil.disk_usage(part.parent).free
    if needed > free:
        raise RunError(
            f"no space left for {target}: it needs {format_bytes(needed)}, {format_bytes(free)} are free; free some space, "
            "write elsewhere, or pack with fewer bits (--base int4)"
        )


def _write(
    out: Path,
    reader: LeafReader,
    plans: Plans,
    header: Header,
    tokenizer: bytes,
    on_section: Callable[[int, int], None],
) -> set[tuple[str, ...]]:
    """The whole file; or, with the file left unfinished, the leaves whose scales do not fit the type of their plan."""
    too_narrow: set[tuple[str, ...]] = set()
    sections: dict[str, Section] = {}
    start = len(encode(header))
    with open(out, "r+b", buffering=0) as file:
        handle = file.fileno()
        file.truncate(0)
        file.truncate(start + header.data_bytes)  # padding is zeros
        written = MappedFile(out)

        def finish(name: str) -> None:
            place = header.sections[name]
            sha256 = written.sha256(start + place.start, start + place.stop)
            sections[name] = dataclasses.replace(place, sha256=sha256)
            on_section(len(sections), len(header.sections))

        for name, members in itertools.groupby(_in_order(reader), lambda member: section_of(*member)):
            for leaf, layer in members:
                plan, parts = plans[leaf.path], jax.tree.leaves(leaf_parts(leaf, layer, header.parts))
                for rows, piece in _pieces(reader, leaf, layer, plan):
                    if form_of(piece).dtype.itemsize > plan.form.dtype.itemsize:
                        too_narrow.add(leaf.path)
                    if too_narrow:
                        continue  # looking for more of them: one more pass is enough
                    for part, values in zip(parts, jax.tree.leaves(piece), strict=True):
                        _put(handle, start + part.start, rows, values.astype(part.dtype, copy=False))
            finish(name)
        if tokenizer:
            _write_at(handle, memoryview(tokenizer), start + header.parts[TOKENIZER].start)
            finish("tokenizer")
        _write_at(handle, memoryview(encode(dataclasses.replace(header, sections=sections))), 0)
    return too_narrow


def _pieces(reader: LeafReader, leaf: LeafName, layer: int, plan: MatrixPlan) -> Iterator[tuple[Any, Any]]:
    if leaf.kind in ("norm", "bias"):
        yield slice(0, 1), read_vector(reader, leaf, layer)[None]
    else:
        yield from matrix_pieces(reader, leaf, layer, plan)


def _put(handle: int, at: int, rows: slice | np.ndarray, values: np.ndarray) -> None:
    """Write rows of the array at ``at``: a run of them, or one by one where their order is another."""
    data = np.ascontiguousarray(values).view(np.uint8).reshape(len(values), -1)
    row_bytes = data.shape[1]
    if isinstance(rows, slice):
        _write_at(handle, data.reshape(-1).data, at + rows.start * row_bytes)
    else:
        for row, line in zip(rows.tolist(), data, strict=True):
            _write_at(handle, line.data, at + row * row_bytes)


def _write_at(handle: int, data: memoryview, at: int) -> None:
    while data:
        n_bytes = os.pwrite(handle, data, at)
        data, at = data[n_bytes:], at + n_bytes
