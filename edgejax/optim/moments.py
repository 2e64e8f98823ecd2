"""A moment of an optimizer held in 8 or 4 bits, one float32 scale a block of 128 elements.

    moment[i] = level(code[i]) * scale[i // 128],      scale = largest |moment| of the block

A leaf is flattened and cut into *units* of 8 blocks, ``[U, 8, 128]``; the last unit is filled up with zeros. 8-bit
codes are int8 or uint8 ``[U, 8, 128]``; 4-bit codes are uint32 words ``[U, 128]``, element (k, j) of a unit in bits
4k..4k+3 of word j. So both are unpacked along contiguous memory, and a piece of a leaf is a range of units. All
arithmetic keeps the shape ``[U, 8, 128]``: a reshape inside a fusion costs XLA:CPU its vector instructions.

Leaves with fewer than ``SMALLEST_QUANTIZED`` elements (norm scales, biases) stay float32: all of a decoder's are
about 0.03% of its parameters, and their moments decide more than others do.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.optim.codes import NEAREST, Code

BLOCK = 128
BLOCKS_PER_UNIT = 8
UNIT = BLOCK * BLOCKS_PER_UNIT
SMALLEST_QUANTIZED = 4096
WIDTHS = (32, 8, 4)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedMoment:
    """One leaf's moment; see the module's docstring.

    Attributes:
      codes: int8 or uint8 ``[U, 8, 128]``, or uint32 ``[U, 128]``.
      scale: float32 ``[U, 8]``.
      code: levels of the codes (static).
    """

    codes: Int[Array, "U ..."]
    scale: Float[Array, "U G"]
    code: Code = dataclasses.field(metadata={"static": True})

    @property
    def n_units(self) -> int:
        """U, without a leading axis of layers."""
        return self.scale.shape[-2]

    def decode(self) -> Float[Array, "U G Q"]:
        """The moment ``[U, 8, 128]``, float32."""
        return self.code.decode(_unpack(self.codes, self.code)) * self.scale[..., None]


Moment = Array | QuantizedMoment


def is_moment(node: PyTree) -> bool:
    """For ``is_leaf=``: a moment counts as one leaf, as the parameter it belongs to does."""
    return isinstance(node, QuantizedMoment)


def check_bits(bits: int) -> None:
    """Raises ConfigError unless ``bits`` is 32, 8 or 4."""
    if isinstance(bits, jax.core.Tracer) or bits not in WIDTHS:
        raise ConfigError(
            f"moments can be held in {', '.join(map(str, WIDTHS))} bits, not {bits}"
            + ("; under inject_hyperparams, name it in static_args" if isinstance(bits, jax.Array) else "")
        )


def zero_moment(leaf: Array, code: Code | None) -> Moment:
    """The moment of a parameter before the first step: float32 zeros where ``code`` is None or the leaf is small."""
    if code is None or leaf.size < SMALLEST_QUANTIZED:
        return jnp.zeros(leaf.shape, jnp.float32)
    units = math.ceil(leaf.size / UNIT)
    codes = jnp.zeros((units, BLOCKS_PER_UNIT, BLOCK), jnp.int32)
    return QuantizedMoment(_pack(codes, code), jnp.zeros((units, BLOCKS_PER_UNIT)), code)


def encode_moment(
    values: Float[Array, "U G Q"], code: Code, noise: Float[Array, "U G Q"] | None = None
) -> tuple[QuantizedMoment, Float[Array, "U G Q"]]:
    """``values [U, 8, 128]`` in the levels of ``code``, and what ``decode`` will make of them.

    Args:
      values: float32; not negative where the code is unsigned.
      code: the levels.
      noise: uniform in [0, 1) to round stochastically; None rounds to the nearest level.
    """
    scale = jnp.max(jnp.abs(values), axis=-1)
    inverse = jnp.where(scale > 0, 1 / scale, 0.0)
    codes, levels = code.round(values * inverse[..., None], NEAREST if noise is None else noise)
    return QuantizedMoment(_pack(codes, code), scale, code), levels * scale[..., None]


def to_units(leaf: Array) -> Float[Array, "U G Q"]:
    """A leaf of any shape as units ``[U, 8, 128]``, filled up with zeros."""
    flat = leaf.reshape(-1)
    units = math.ceil(flat.size / UNIT)
    return jnp.pad(flat, (0, units * UNIT - flat.size)).reshape(units, BLOCKS_PER_UNIT, BLOCK)


def from_units(units: Float[Array, "U G Q"], shape: tuple[int, ...]) -> Array:
    """Undoes ``to_units`` for a leaf of this shape."""
    return units.reshape(-1)[: math.prod(shape)].reshape(shape)


def _pack(codes: Int[Array, "U G Q"], code: Code) -> Array:
    if code.bits == 8:
        return codes.astype(jnp.int8 if code.signed else jnp.uint8)
    nibbles = (codes + 8 if code.signed else codes).astype(jnp.uint32)
    words = nibbles[:, 0]
    for k in range(1, BLOCKS_PER_UNIT):
        words |= nibbles[:, k] << jnp.uint32(4 * k)
    return words


def _unpack(codes: Array, code: Code) -> Int[Array, "... G Q"]:
    if code.bits == 8:
        return codes.astype(jnp.int32)
    shifts = jax.lax.broadcasted_iota(jnp.uint32, (BLOCKS_PER_UNIT, 1), 0) * 4
    nibbles = ((codes[..., None, :] >> shifts) & 15).astype(jnp.int32)
    return nibbles - 8 if code.signed else nibbles
