"""How a leaf is held, and how codes of one form become codes of a wider one without any change of value."""

import dataclasses
from collections.abc import Iterable

import numpy as np

from edgejax.quant import TERNARY, QuantizedArray, pack_codes, unpack_codes

FLOAT32 = np.dtype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The layout of one leaf.

    Attributes:
      bits: 2 (ternary), 4 or 8 for codes, None for plain floats.
      block: inputs a scale, None for plain floats.
      dtype: of the scales, or of the floats.
      has_minimum: whether the codes are affine.
    """

    bits: int | None
    block: int | None
    dtype: np.dtype
    has_minimum: bool

    @property
    def bits_per_weight(self) -> float:
        if self.bits is None:
            return 8 * self.dtype.itemsize
        return self.bits + 8 * self.dtype.itemsize * (1 + self.has_minimum) / (self.block or 1)

    def __str__(self) -> str:
        if self.bits is None:
            return self.dtype.name
        kind = "ternary" if self.bits == TERNARY else f"int{self.bits}"
        return f"{kind} codes in blocks of {self.block} ({self.bits_per_weight:g} bits a weight)"


def float_form(dtype) -> Form:
    return Form(bits=None, block=None, dtype=np.dtype(dtype), has_minimum=False)


def form_of(leaf: QuantizedArray | np.ndarray) -> Form:
    """The form that a leaf has."""
    if not isinstance(leaf, QuantizedArray):
        return float_form(leaf.dtype)
    return Form(
        bits=leaf.bits,
        block=leaf.block,
        dtype=np.dtype(leaf.scale.dtype),
        has_minimum=leaf.minimum is not None,
    )


def join_forms(forms: Iterable[Form]) -> Form:
    """The narrowest form that holds values of all ``forms`` exactly: what a stack of mixed layers is kept in.

    Codes with codes: the most bits, the finest block, the widest scale, a minimum if any has one or ternary codes become
    others that have no sign. Floats of two types, or floats with codes: float32.

    >>> q4_k = Form(bits=4, block=32, dtype=np.dtype(np.float32), has_minimum=True)
    >>> q6_k = Form(bits=8, block=16, dtype=np.dtype(np.float32), has_minimum=False)
    >>> str(join_forms([q4_k, q6_k]))
    'int8 codes in blocks of 16 (12 bits a weight)'
    """
    distinct = set(forms)
    if len(distinct) == 1:
        return distinct.pop()
    if any(form.bits is None for form in distinct):
        return float_form(FLOAT32)
    bits = {form.bits or 0 for form in distinct}
    return Form(
        bits=max(bits),
        block=min(form.block or 0 for form in distinct),
        dtype=max((form.dtype for form in distinct), key=lambda d: d.itemsize),
        has_minimum=any(form.has_minimum for form in distinct) or bits == {TERNARY, 4},
    )


def convert(leaf: QuantizedArray | np.ndarray, form: Form) -> QuantizedArray | np.ndarray:
    """``leaf`` in a form that ``join_forms`` gave for it and others; floats are cast, which may round."""
    if form.bits is None:
        values = wide(leaf) if isinstance(leaf, QuantizedArray) else leaf
        return values.astype(form.dtype, copy=False)
    if not isinstance(leaf, QuantizedArray):
        raise TypeError("plain floats become codes by quantisation, not by a change of form")
    codes = leaf.codes
    if leaf.bits < 8 and form.bits == 8:
        codes = stored_codes(leaf)
    elif leaf.bits == TERNARY and form.bits == 4:
        codes = pack_codes(unpack_codes(np.asarray(codes), TERNARY), 4)
    repeat = leaf.block // (form.block or leaf.block)
    scale = np.repeat(leaf.scale, repeat, axis=-1).astype(form.dtype, copy=False)
    minimum = leaf.minimum
    if minimum is not None:
        minimum = np.repeat(minimum, repeat, axis=-1).astype(form.dtype, copy=False)
    elif form.has_minimum:  # ternary codes are stored from 0 on
        minimum = -scale if leaf.bits == TERNARY and form.bits == 4 else np.zeros_like(scale)
    return QuantizedArray(codes, scale, minimum, bits=form.bits)


def stored_codes(leaf: QuantizedArray) -> np.ndarray:
    """The factors of a leaf's scales, int8 ``[..., I]``: codes of 4 bits 0..15, ternary ones -1, 0 and 1."""
    if leaf.bits == 8:
        return np.asarray(leaf.codes)
    codes = unpack_codes(np.asarray(leaf.codes), leaf.bits).view(np.int8)
    return codes - np.int8(1) if leaf.bits == TERNARY else codes


def wide(leaf: QuantizedArray | np.ndarray) -> np.ndarray:
    """float32 values ``[N, I]`` on the host, without starting a JAX back end."""
    if not isinstance(leaf, QuantizedArray):
        return np.asarray(leaf, np.float32)
    codes = stored_codes(leaf)
    values = codes.astype(np.float32).reshape(*leaf.scale.shape, -1)
    values *= np.asarray(leaf.scale, np.float32)[..., None]
    if leaf.minimum is not None:
        values += np.asarray(leaf.minimum, np.float32)[..., None]
    return values.reshape(codes.shape)
