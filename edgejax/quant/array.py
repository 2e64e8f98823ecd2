"""A weight held in 2, 4 or 8 bits, one scale (and for affine codes one minimum) a block of inputs.

    w[o, i] = code[o, i] * scale[o, i // Q] + minimum[o, i // Q]

This is exactly GGUF's Q4_1 and Q4_K (affine, 4 bits), Q4_0 (its minimum is -8 * scale), Q8_0 (8 bits, no
minimum), Q5_K and Q6_K (their codes fit 8 bits) and TQ2_0 (ternary), so a file in those types is held without any change
of value. Invariants: codes of 8 bits are ``int8``; those of 4 bits are 0..15; those of 2 bits are ternary, -1, 0 and 1,
stored as 0, 1 and 2, and have no minimum. Codes of fewer than 8 bits are packed into ``uint32`` words, ``n = 32 // bits`` to
one, element ``i`` in bits ``bits * (i % n)`` of word ``i // n`` (words, not bytes: mobile GPU compilers get sub-word
shifts wrong). A block never crosses a row; an all-zero block decodes to exact zeros.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, UInt16

from edgejax.core.arrays import Array, ArrayLike

TERNARY = 2  # bits of a code


def codes_per_word(bits: int) -> int:
    """Codes in an element of ``QuantizedArray.codes``.

    >>> codes_per_word(2), codes_per_word(4), codes_per_word(8)
    (16, 8, 1)
    """
    return 1 if bits == 8 else 32 // bits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """``[..., O, I]`` weights in ``bits`` bits; see the module's docstring for the code.

    Attributes:
      codes: 2 and 4 bits: uint32 ``[..., O, I * bits // 32]``; 8 bits: int8 ``[..., O, I]``.
      scale: float16 or float32 ``[..., O, I // Q]``.
      minimum: as ``scale``, or None for a symmetric code.
      bits: 2, 4 or 8 (static).
    """

    codes: Int[ArrayLike, "..."]
    scale: Float[ArrayLike, "..."]
    minimum: Float[ArrayLike, "..."] | None
    bits: int = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight it stands for."""
        *lead, last = self.codes.shape
        return (*lead, last * codes_per_word(self.bits))

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def size(self) -> int:
        return int(np.prod(self.shape))

    @property
    def block(self) -> int:
        """Inputs that share one scale."""
        return self.shape[-1] // self.scale.shape[-1]

    @property
    def nbytes(self) -> int:
        """Bytes as stored, scales included."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_element(self) -> float:
        return 8 * self.nbytes / self.size

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """The weights ``[..., O, I]``, computed in float32 and cast to ``dtype``."""
        return dequantize(self, dtype)

    def __getitem__(self, index) -> "QuantizedArray":
        """Index leading axes (layers, rows); the last axis cannot be cut."""
        return jax.tree.map(lambda leaf: leaf[index], self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Bfloat16Array:
    """bfloat16 weights held as their bit patterns, so that a compiled loop can update a stack of them in place.

    Written as bfloat16 they are widened by XLA:CPU, the whole stack for every slice (measured: 24 times slower).

    Attributes:
      pattern: uint16, in the weights' shape.

    Example:
      >>> held = Bfloat16Array.hold(jnp.array([1.0, -2.0]))
      >>> held.bfloat16().tolist(), held.nbytes
      ([1.0, -2.0], 4)
    """

    pattern: UInt16[ArrayLike, "..."]

    @classmethod
    def hold(cls, weights: Float[ArrayLike, "..."]) -> "Bfloat16Array":
        """From floats of any dtype, rounded to the nearest."""
        return cls(jax.lax.bitcast_convert_type(jnp.asarray(weights).astype(jnp.bfloat16), jnp.uint16))

    @property
    def shape(self) -> tuple[int, ...]:
        return self.pattern.shape

    @property
    def ndim(self) -> int:
        return self.pattern.ndim

    @property
    def size(self) -> int:
        return self.pattern.size

    @property
    def nbytes(self) -> int:
        return 2 * self.pattern.size

    @property
    def bits_per_element(self) -> float:
        return 16.0

    def bfloat16(self) -> Array:
        """The weights as a plain bfloat16 array."""
        return jax.lax.bitcast_convert_type(jnp.asarray(self.pattern), jnp.bfloat16)

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "..."]:
        """The weights in ``dtype``."""
        return dequantize(self, dtype)

    def __getitem__(self, index) -> "Bfloat16Array":
        return Bfloat16Array(self.pattern[index])


Weight = ArrayLike | QuantizedArray | Bfloat16Array


def is_quantized(leaf) -> bool:
    """Whether a leaf is one of the packed classes of this module; for ``is_leaf=`` in tree functions."""
    return isinstance(leaf, QuantizedArray | Bfloat16Array)


def dequantize(weight: Weight, dtype=jnp.float32) -> Float[Array, "..."]:
    """``[..., O, I]`` in ``dtype``; a plain array is only cast."""
    if isinstance(weight, Bfloat16Array):
        upper = jnp.asarray(weight.pattern).astype(jnp.uint32) << 16
        return jax.lax.bitcast_convert_type(upper, jnp.float32).astype(dtype)
    if not isinstance(weight, QuantizedArray):
        return jnp.asarray(weight).astype(dtype)
    shape = weight.shape
    codes = jnp.asarray(weight.codes)
    if weight.bits < 8:
        codes = _unpacked(codes, weight.bits)
    if weight.bits == TERNARY:
        codes = codes - 1
    blocks = codes.astype(jnp.float32).reshape(*shape[:-1], -1, weight.block)
    values = blocks * weight.scale.astype(jnp.float32)[..., None]
    if weight.minimum is not None:
        values = values + weight.minimum.astype(jnp.float32)[..., None]
    return values.reshape(shape).astype(dtype)


def _unpacked(words: Int[Array, "... W"], bits: int) -> Int[Array, "... W n"]:
    """The codes of each word as they are stored, int32.

    The shifts are made from an iota and a number that XLA must take for a value of the loop it is in. As constants they
    would be hoisted out of a scan over layers into an array, and with shifts read from memory LLVM makes a scalar
    loop of the unpacking (measured on 2 AVX2 cores: 0.37 ms for a [1536, 576] weight instead of 0.03).
    """
    words, width = jax.lax.optimization_barrier((words, jnp.uint32(bits)))
    position = jax.lax.broadcasted_iota(jnp.uint32, (*words.shape, codes_per_word(bits)), words.ndim)
    return ((words[..., None] >> (position * width)) & (2**bits - 1)).astype(jnp.int32)


def take_rows(weight: Weight, rows: Int[ArrayLike, "..."], dtype=jnp.float32) -> Float[Array, "... I"]:
    """Rows of an ``[V, I]`` table (an embedding look-up) without widening the table."""
    if isinstance(weight, QuantizedArray | Bfloat16Array):
        return dequantize(jax.tree.map(lambda leaf: jnp.take(leaf, rows, axis=0), weight), dtype)
    return jnp.take(weight, rows, axis=0).astype(dtype)
