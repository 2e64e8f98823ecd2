"""Random bits without a state: a hash of an element's index, keyed.

Stochastic rounding wants one cheap uniform number an element, the same on every run of the same step, and no array
of keys. The hash is ``lowbias32`` (C. Wellons, 2018, https://nullprogram.com/blog/2018/07/31/; constants with the
lowest bias found in https://github.com/skeeto/hash-prospector): a permutation ``P`` of 32-bit words in which
each input bit flips each output bit with a probability of 1/2 within about 1e-3. It is no cipher and needs none.
The key enters before and after the permutation (Even and Mansour 1997, J. Cryptology 10, 151-161)::

    bits(index, key) = P(index ^ P(key + g)) ^ P(key + 2 g),    g = 0x9e3779b9 (the golden ratio in 32 bits)

With the first mix alone, the stream of another key would be the same words in another order; with the second
alone, streams would differ by a constant. Consecutive keys may be used as they come (layer indices, step numbers).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int, UInt32

from edgejax.core.arrays import Array, ArrayLike

GOLDEN = 0x9E3779B9


def uniform_bits(index: Int[ArrayLike, "..."], key: Int[ArrayLike, ""]) -> UInt32[Array, "..."]:
    """One 32-bit word for each index: uniform, and independent between keys.

    Args:
      index: uint32; indices that differ give words that differ (modulo 2^32: an array of more elements repeats).
      key: uint32 scalar, traced or not.

    Returns:
      uint32 words of the shape of ``index``.
    """
    index, key = jnp.asarray(index, jnp.uint32), jnp.asarray(key, jnp.uint32)
    before, after = lowbias32(key + jnp.uint32(GOLDEN)), lowbias32(key + jnp.uint32(2 * GOLDEN % 2**32))
    return lowbias32(index ^ before) ^ after


def uniform(index: Int[ArrayLike, "..."], key: Int[ArrayLike, ""]) -> Float[Array, "..."]:
    """Uniform float32 in ``[0, 1)``: the upper 24 bits of ``uniform_bits``, each value exactly representable."""
    return (uniform_bits(index, key) >> 8).astype(jnp.float32) * jnp.float32(2.0**-24)


def element_indices(shape: tuple[int, ...]) -> UInt32[Array, "..."]:
    """Row-major index of each element, made of iotas that fuse into what reads them."""
    index = jnp.zeros(shape, jnp.uint32)
    stride = 1
    for axis in reversed(range(len(shape))):
        position = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        index = index + position * jnp.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def lowbias32(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """The unkeyed permutation of 32-bit words; 0 maps to 0."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
