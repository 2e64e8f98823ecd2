"""Building one leaf of the parameter tree from its layers in a file, a few rows at a time.

A stacked leaf is allocated once in its final form; each layer is read, decoded, re-quantised if asked, and written
into its place. At no time does a wide copy of a leaf exist, only one of ``CHUNK_WEIGHTS`` weights.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Literal, NamedTuple, Protocol

import jax
import ml_dtypes
import numpy as np
from jaxtyping import Int

from edgejax.core.arrays import ArrayLike, PyTree
from edgejax.core.errors import ConfigError, WeightsError
from edgejax.quant import (
    TERNARY,
    QuantizedArray,
    codes_per_word,
    quantize_int4,
    quantize_int8,
    quantize_ternary,
    ternary_block,
)
from edgejax.weights.form import FLOAT32, Form, convert, float_form, form_of, join_forms, wide
from edgejax.weights.names import LeafName

Base = Literal["auto", "int8", "int4", "ternary", "bf16", "f32"]
BASES: tuple[Base, ...] = ("auto", "int8", "int4", "ternary", "bf16", "f32")
CHUNK_WEIGHTS = 1 << 20  # read and converted at a time: 4 MB as float32
BLOCK = 32
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
_LOST = "of the norm of its weights is lost in ternary codes"
_LOST_ENOUGH = 0.05  # of the norm; float16 scales alone lose 0.0005
_JUDGED_ROWS = 64
_ALIGNMENT = 64  # bytes; device_put on the CPU takes aligned host arrays without a copy
_CODE_BITS = {"int8": 8, "int4": 4, "ternary": TERNARY}
_QUANTIZE: dict[int, Callable[..., QuantizedArray]] = {
    8: quantize_int8,
    4: quantize_int4,
    TERNARY: quantize_ternary,
}


class LeafSource(Protocol):
    """What a file format offers: shapes, types and rows of the tensors behind a leaf."""

    @property
    def path(self) -> object: ...

    def shape(self, leaf: LeafName, layer: int) -> tuple[int, ...]: ...

    def form(self, leaf: LeafName, layer: int) -> Form: ...

    def type_name(self, leaf: LeafName, layer: int) -> str: ...

    def rows(self, leaf: LeafName, layer: int, start: int, stop: int) -> QuantizedArray | np.ndarray:
        """``[stop - start, I]``; a vector is one row."""
        ...

    def row_order(self, leaf: LeafName) -> Int[np.ndarray, "O"] | None:
        """Our row for each row of the file, or None where they are the same."""
        ...

    def offset(self, leaf: LeafName) -> float:
        """What to add to a norm scale."""
        ...


def check_base(base: str) -> Base:
    """``base`` itself.

    Raises:
      ConfigError: there is no such base.
    """
    for known in BASES:
        if base == known:
            return known
    raise ConfigError(f"base {base!r} is unknown; there are: {', '.join(BASES)}")


def load_vector(source: LeafSource, leaf: LeafName, n_layers: int) -> np.ndarray:
    """A norm scale or bias, float32 ``[L, O]`` or ``[O]``."""
    layers = leaf_layers(leaf, n_layers)
    out = empty_aligned((len(layers), *leaf.shape), FLOAT32)
    for layer in layers:
        out[layer] = read_vector(source, leaf, layer)
    return out if leaf.stacked else out[0]


def read_vector(source: LeafSource, leaf: LeafName, layer: int) -> np.ndarray:
    """A norm scale or bias of one layer, float32 ``[O]``."""
    check_shape(source, leaf, layer)
    values = wide(source.rows(leaf, layer, 0, 1)).reshape(leaf.shape) + np.float32(source.offset(leaf))
    _check_finite(source, leaf, layer, values)
    order = source.row_order(leaf)
    if order is None:
        return values
    out = np.empty_like(values)
    out[order] = values
    return out


def load_matrix(
    source: LeafSource, leaf: LeafName, n_layers: int, base: Base, notes: list[str]
) -> QuantizedArray | np.ndarray:
    """A linear layer or a table, ``[L, O, I]`` or ``[O, I]``, in the form that ``base`` asks for.

    Args:
      source: an opened file.
      leaf: which one.
      n_layers: layers of the stack; a leaf that is not stacked is read once.
      base: ``"auto"`` holds every value as the file has it; the others are what the command line says.
      notes: gets a line where the leaf is held otherwise than ``base`` says, or its layers differ in type.

    Raises:
      WeightsError: a missing tensor, a wrong shape, an unsupported type, values that are not finite.
    """
    layers = leaf_layers(leaf, n_layers)
    plan = plan_matrix(source, leaf, layers, base, notes)
    note_what_is_lost(source, leaf, plan, notes)
    out = _allocate(plan.form, (len(layers), *leaf.shape))
    for layer in layers:
        for rows, piece in matrix_pieces(source, leaf, layer, plan):
            out = _write(out, layer, rows, piece)
    return out if leaf.stacked else out[0]


def matrix_pieces(
    source: LeafSource, leaf: LeafName, layer: int, plan: "MatrixPlan"
) -> Iterator[tuple[slice | np.ndarray, QuantizedArray | np.ndarray]]:
    """One layer of a matrix in the form of ``plan``, ``CHUNK_WEIGHTS`` at a time: where rows belong, and the rows.

    Codes made anew may come with float32 scales where the plan says float16 (``quant.pack``).
    """
    n_rows, width = leaf.shape
    order = source.row_order(leaf)
    step = max(1, CHUNK_WEIGHTS // width)
    for start in range(0, n_rows, step):
        stop = min(start + step, n_rows)
        piece = source.rows(leaf, layer, start, stop)
        _check_finite(source, leaf, layer, piece)
        piece = plan.quantize(wide(piece)) if plan.quantize else convert(piece, plan.form)
        yield slice(start, stop) if order is None else order[start:stop], piece


def note_what_is_lost(source: LeafSource, leaf: LeafName, plan: "MatrixPlan", notes: list[str]) -> None:
    """A note, once, where weights that are made ternary were not trained to be so; judged by the first rows of a leaf."""
    if plan.form.bits != TERNARY or plan.quantize is None or any(_LOST in note for note in notes):
        return
    piece = wide(source.rows(leaf, 0, 0, min(_JUDGED_ROWS, leaf.shape[0])))
    _check_finite(source, leaf, 0, piece)
    lost = np.linalg.norm(wide(plan.quantize(piece)) - piece) / max(
        np.linalg.norm(piece), FLOAT32.type(1e-30)
    )
    if lost > _LOST_ENOUGH:
        notes.append(f"{'.'.join(leaf.path)}: {lost:.0%} {_LOST}; they are for models that were trained so")


def abstract_leaf(source: LeafSource, leaf: LeafName, n_layers: int, base: Base) -> PyTree:
    """Shapes and dtypes that ``load_vector`` or ``load_matrix`` will give, from the file's headers alone.

    Scales of codes that are made anew are float16 here; a leaf with very small ones will have float32.
    """
    shape = (n_layers, *leaf.shape) if leaf.stacked else leaf.shape
    if leaf.kind in ("norm", "bias"):
        return jax.ShapeDtypeStruct(shape, FLOAT32)
    return layout(plan_matrix(source, leaf, leaf_layers(leaf, n_layers), base, []).form, shape)


def leaf_layers(leaf: LeafName, n_layers: int) -> range:
    """The layers of a leaf; one that is not stacked has its only values in layer 0."""
    return range(n_layers) if leaf.stacked else range(1)


def check_shape(source: LeafSource, leaf: LeafName, layer: int) -> None:
    """Raises ``WeightsError`` where the file's tensor has another shape than the configuration says."""
    found = source.shape(leaf, layer)
    if found != leaf.shape:
        raise WeightsError(
            f"{source.path}: {'.'.join(leaf.path)} (layer {layer}) has shape {found}, the configuration says "
            f"{leaf.shape}; the weights belong to another model, or the file is damaged"
        )


def empty_aligned(shape: tuple[int, ...], dtype) -> np.ndarray:
    """An uninitialised host array that starts at a multiple of 64 bytes."""
    dtype = np.dtype(dtype)
    n_bytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(n_bytes + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + n_bytes].view(dtype).reshape(shape)


class MatrixPlan(NamedTuple):
    """The form of a matrix, and the quantiser where its codes must be made anew."""

    form: Form
    quantize: Callable[..., QuantizedArray] | None = None


def plan_matrix(
    source: LeafSource, leaf: LeafName, layers: range, base: Base, notes: list[str]
) -> MatrixPlan:
    """How a matrix will be held; see ``load_matrix``."""
    for layer in layers:
        check_shape(source, leaf, layer)
    forms = [source.form(leaf, layer) for layer in layers]
    joined = join_forms(forms)
    name = ".".join(leaf.path)
    if base == "ternary" and leaf.kind == "table":  # which models with ternary weights have in more bits
        base = "int8" if joined.bits is None else "auto"
    # Ternary codes in more bits would have no zero.
    if base == "auto" or (base in _CODE_BITS and joined.bits in (TERNARY, _CODE_BITS[base])):
        if len(set(forms)) > 1:
            types = sorted({source.type_name(leaf, layer) for layer in layers})
            notes.append(f"{name}: layers mix {', '.join(types)}; held exactly, as {joined}")
        return MatrixPlan(joined)
    if base == "bf16":
        return MatrixPlan(float_form(BFLOAT16))
    if base == "f32":
        return MatrixPlan(float_form(FLOAT32))
    if leaf.shape[-1] % BLOCK:
        notes.append(
            f"{name}: rows of {leaf.shape[-1]} do not divide into blocks of {BLOCK}; held in bf16, not {base}"
        )
        return MatrixPlan(float_form(BFLOAT16))
    bits = _CODE_BITS[base]
    block = ternary_block(leaf.shape[-1]) if bits == TERNARY else BLOCK
    form = Form(bits=bits, block=block, dtype=np.dtype(np.float16), has_minimum=bits == 4)
    return MatrixPlan(form, partial(_QUANTIZE[bits], block=block))


def _allocate(form: Form, shape: tuple[int, ...]) -> QuantizedArray | np.ndarray:
    return jax.tree.map(lambda part: empty_aligned(part.shape, part.dtype), layout(form, shape))


def layout(form: Form, shape: tuple[int, ...]) -> PyTree:
    """Shapes and dtypes of a leaf ``shape`` in ``form``: ``jax.ShapeDtypeStruct``, alone or in a ``QuantizedArray``."""
    if form.bits is None:
        return jax.ShapeDtypeStruct(shape, form.dtype)
    assert form.block is not None
    *lead, width = shape
    n_words = width // codes_per_word(form.bits)
    codes = jax.ShapeDtypeStruct((*lead, n_words), np.int8 if form.bits == 8 else np.uint32)
    scale = jax.ShapeDtypeStruct((*lead, width // form.block), form.dtype)
    return QuantizedArray(codes, scale, scale if form.has_minimum else None, bits=form.bits)  # type: ignore[arg-type]


def _write(out, layer: int, rows, piece):
    """Put ``piece`` at ``out[layer, rows]``; float32 scales of a piece make all of ``out``'s so."""
    if not isinstance(out, QuantizedArray):
        out[layer, rows] = piece
        return out
    if form_of(piece).dtype.itemsize > out.scale.dtype.itemsize:
        minimum = None if out.minimum is None else _widened(out.minimum)
        out = dataclasses.replace(out, scale=_widened(out.scale), minimum=minimum)
    out.codes[layer, rows] = piece.codes
    out.scale[layer, rows] = piece.scale
    if out.minimum is not None:
        out.minimum[layer, rows] = piece.minimum
    return out


def _widened(scales: ArrayLike) -> np.ndarray:
    new = empty_aligned(scales.shape, FLOAT32)
    new[...] = scales
    return new


def _check_finite(source, leaf: LeafName, layer: int, values: QuantizedArray | np.ndarray) -> None:
    """Codes are finite; scales, minima and plain floats can be damaged."""
    parts = [values.scale, values.minimum] if isinstance(values, QuantizedArray) else [values]
    if not all(np.isfinite(part).all() for part in parts if part is not None):
        raise WeightsError(
            f"{source.path}: {'.'.join(leaf.path)} (layer {layer}) holds values that are not finite; the file is "
            "damaged: download it again"
        )
