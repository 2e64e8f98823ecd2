"""How the boundaries between layers wait for the backward pass: as they are, or narrower.

A schedule that recomputes layers keeps one array ``h_l [B, T, D]`` a layer, the layer's input. The forward pass goes
on with the exact ``h``; only what waits is narrow. The loss is therefore exact, and the gradient is that of layers
linearised at ``h_l + e_l`` with a small rounding error ``e_l`` of mean zero (as in ActNN, Chen et al. 2021, arXiv
2104.14129, which rounds every saved value; here it is the inputs of layers alone).

Kinds, by name, and the bytes of a value:

- ``f32``: as it is, 4.
- ``bf16``: 2, rounded to nearest. Stochastic rounding doubles the variance of ``e`` and with it the angle between
  the gradient and the exact one, and has no bias to take away: the low bits of ``h`` are as good as random.
- ``int8``: 1 + 4 / 32, and 4 / (B T). A residual stream has channels tens of times larger than the others and single
  values thousands of times larger, so plain 8-bit blocks are too coarse; but it changes little from layer to layer. What
  is coded is the change since the boundary before, with each channel first divided by the root of its mean size; see
  ``Int8``. What each attempt gave: experiments/residuals.

Boundaries are stored in order, first layer to last, and restored in the opposite order, with a ``reference`` handed
from each to the next (an array for ``int8``, nothing for the others)::

    reference = boundary.start(h.shape)
    for layer, h in inputs:            stored[layer], reference = boundary.store(h, reference, key(layer))
    for layer in reversed(layers):     h, reference = boundary.restore(stored[layer], reference, key(layer))
"""

import dataclasses
import math
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Float32, Int, UInt16, UInt32

from edgejax.core.arrays import Array, ArrayLike, PyTree
from edgejax.core.counter_hash import element_indices, lowbias32, uniform, uniform_bits
from edgejax.core.errors import ConfigError

TOP_CODE = 126.5  # plus half a step of dither it rounds to 127
TINY = 1e-30  # a block below it is stored as zeros: TOP_CODE / amax would overflow


class Boundary(Protocol):
    """A way to store the boundaries of a stack. Pure functions; leaves of ``stored`` have the same shapes everywhere."""

    def start(self, shape: tuple[int, ...]) -> PyTree:
        """The reference before the first boundary, for boundaries of this shape."""

    def store(
        self, h: Float32[Array, "B T D"], reference: Any, key: Int[ArrayLike, ""]
    ) -> tuple[PyTree, Any]:
        """What waits, and the reference for the next boundary. Same ``key`` (uint32 scalar), same bits."""

    def restore(
        self, stored: PyTree, reference: Any, key: Int[ArrayLike, ""]
    ) -> tuple[Float32[Array, "B T D"], Any]:
        """The boundary as the backward pass sees it, and the reference for the one before."""

    def stored_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of one stored boundary of this shape, without the reference, of which there is one a stack."""


@dataclasses.dataclass(frozen=True)
class Exact:
    """As it is."""

    def start(self, shape):
        return ()

    def store(self, h, reference, key):
        return h, reference

    def restore(self, stored, reference, key):
        return stored, reference

    def stored_bytes(self, shape):
        return 4 * math.prod(shape)


@dataclasses.dataclass(frozen=True)
class Bf16:
    """The upper 16 bits of float32, rounded to nearest or stochastically; held as ``uint16``.

    As ``bfloat16`` they would be held in float32 after all: XLA:CPU widens the update of a bfloat16 array in a
    loop, and the whole stack with it.
    """

    stochastic: bool = False

    def start(self, shape):
        return ()

    def store(self, h, reference, key):
        return (self._stochastic(h, key) if self.stochastic else _nearest_bf16(h)), reference

    def restore(self, stored: UInt16[Array, "B T D"], reference, key):
        return jax.lax.bitcast_convert_type(stored.astype(jnp.uint32) << 16, jnp.float32), reference

    def stored_bytes(self, shape):
        return 2 * math.prod(shape)

    def _stochastic(self, h, key):
        """16 random bits are added below: they carry with the probability of the fraction that is dropped."""
        noise = uniform_bits(element_indices(h.shape), key) & jnp.uint32(0xFFFF)
        bits = jax.lax.bitcast_convert_type(h, jnp.uint32) + noise
        return jnp.where(jnp.isfinite(h), (bits >> 16).astype(jnp.uint16), _nearest_bf16(h))


class Int8Change(NamedTuple):
    """One boundary's change in 8 bits: ``(code - dither) * scale * channel``.

    Attributes:
      codes: int8.
      scale: one for each block of a row; the last block may be shorter than the others.
      channel: one for each channel of all rows.
    """

    codes: Int[Array, "B T D"]
    scale: Float32[Array, "B T blocks"]
    channel: Float32[Array, " D"]


@dataclasses.dataclass(frozen=True)
class Int8:
    """The change since the boundary before, in symmetric 8-bit codes with one scale for each ``block`` values::

        delta = h_l - r_(l-1),   r_(-1) = 0                          closed loop: errors do not add up over layers
        c_d   = (mean over B, T of |delta_d|) ^ (1/2)                  a channel's share of its size
        s     = max |delta / c| / 126.5  over the block
        code  = round(delta / (c s) + u),   u uniform in [-1/2, 1/2)
        r_l   = r_(l-1) + (code - u) c s

    ``u`` is a hash of the element's index and the key, made again to restore: subtractive dither (Roberts 1962;
    Gray and Stockham 1993, IEEE Trans. Inf. Theory 39, 805-812). The error is uniform in half a step to both sides
    whatever the value: unbiased as stochastic rounding is, at half its variance. A block of zeros is zeros again.
    The backward pass starts from ``r`` of the last boundary and subtracts: ``r_(l-1)`` comes back within float32
    rounding of the largest value on the way.

    Where ``start`` is used with every row of a batch on another device, the mean over rows is a small all-reduce.
    """

    block: int = 32

    def start(self, shape):
        return jnp.zeros(shape, jnp.float32)

    def store(self, h, reference, key):
        stored, change = self._encode(h - reference, key)
        return stored, reference + change

    def restore(self, stored: Int8Change, reference, key):
        return reference, reference - self._decode(stored, key)

    def stored_bytes(self, shape):
        *rows, width = shape
        return math.prod(shape) + 4 * math.prod(rows) * -(-width // self.block) + 4 * width

    def _encode(self, delta, key):
        size = jnp.mean(jnp.abs(delta), axis=tuple(range(delta.ndim - 1)))
        channel = jnp.where(size < TINY, 1.0, jnp.sqrt(size))
        levelled = delta / channel
        top = jnp.max(jnp.abs(self._blocks(levelled)), axis=-1)
        inverse = jnp.where(top < TINY, 0.0, TOP_CODE / top)
        scale = jnp.where(top < TINY, 0.0, top / TOP_CODE)
        codes = jnp.round(levelled * self._spread(inverse, delta.shape) + _dither(delta.shape, key))
        stored = Int8Change(codes.astype(jnp.int8), scale, channel)
        return stored, self._decode(stored, key)

    def _decode(self, stored, key):
        shape = stored.codes.shape
        steps = stored.codes.astype(jnp.float32) - _dither(shape, key)
        return steps * self._spread(stored.scale, shape) * stored.channel

    def _blocks(self, x):
        """``[..., D] -> [..., blocks, Q]``; zeros fill the last block."""
        missing = -x.shape[-1] % self.block
        padded = jnp.pad(x, ((0, 0),) * (x.ndim - 1) + ((0, missing),)) if missing else x
        return padded.reshape(*x.shape[:-1], -1, self.block)

    def _spread(self, per_block, shape):
        """``[..., blocks] -> [..., D]``: each block's value at each of its places."""
        wide = jnp.broadcast_to(per_block[..., None], (*per_block.shape, self.block))
        return wide.reshape(*shape[:-1], -1)[..., : shape[-1]]


BOUNDARIES: dict[str, Boundary] = {"f32": Exact(), "bf16": Bf16(), "int8": Int8()}


def boundary_named(kind: str | Boundary) -> Boundary:
    """The storage of that name; one that was made by hand is given back.

    Raises:
      ConfigError: unknown name.

    Example:
      >>> int8, h = boundary_named("int8"), jnp.linspace(-1.0, 1.0, 64).reshape(1, 1, 64)
      >>> stored, reference = int8.store(h, int8.start(h.shape), 3)
      >>> restored, _ = int8.restore(stored, reference, 3)
      >>> bool(jnp.abs(restored - h).max() <= 0.5 / 126)
      True
    """
    if not isinstance(kind, str):
        return kind
    if kind not in BOUNDARIES:
        raise ConfigError(f"unknown boundaries {kind!r}; there are: {', '.join(BOUNDARIES)}")
    return BOUNDARIES[kind]


def stored_bytes(kind: str | Boundary, shape: tuple[int, ...]) -> int:
    """Bytes of one stored boundary.

    >>> [stored_bytes(kind, (1, 512, 576)) for kind in ("f32", "bf16", "int8")]
    [1179648, 589824, 334080]
    """
    return boundary_named(kind).stored_bytes(shape)


def batch_key(tokens: Int[ArrayLike, "B T"]) -> UInt32[Array, ""]:
    """A key made of what is trained on: the same batch rounds the same way, another one independently."""
    places = lowbias32(element_indices(tokens.shape) + jnp.uint32(1))
    return jnp.sum(lowbias32(jnp.asarray(tokens).astype(jnp.uint32) ^ places), dtype=jnp.uint32)


def layer_key(key: Int[ArrayLike, ""], layer: Int[ArrayLike, ""]) -> UInt32[Array, ""]:
    """The key of one layer's boundary, from the batch's."""
    return jnp.asarray(key).astype(jnp.uint32) + jnp.asarray(layer).astype(jnp.uint32)


def _dither(shape: tuple[int, ...], key):
    return uniform(element_indices(shape), key) - 0.5


def _nearest_bf16(h):
    return jax.lax.bitcast_convert_type(h.astype(jnp.bfloat16), jnp.uint16)
