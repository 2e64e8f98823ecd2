"""Keys and values of all layers for the positions that have been read, in one buffer of fixed length."""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from edgejax.core.arrays import Array
from edgejax.models.config import ModelConfig

SMALLEST_BUCKET = 32


class KVCache(NamedTuple):
    """Rotated keys, and values, float32. Sliding layers keep all positions too; the mask leaves them out."""

    keys: Float[Array, "L B K S C"]
    values: Float[Array, "L B K S C"]

    @property
    def capacity(self) -> int:
        """Positions it can hold."""
        return self.keys.shape[3]


def empty_cache(config: ModelConfig, batch: int, capacity: int) -> KVCache:
    """Zeros for ``capacity`` positions: ``2 * L * B * K * S * C * 4`` bytes.

    >>> config = ModelConfig(family="llama", vocab_size=8, d_model=4, n_layers=3, n_heads=2, n_kv_heads=1,
    ...                      head_dim=2, d_ff=4, max_position=16)
    >>> empty_cache(config, 1, 16).keys.shape
    (3, 1, 1, 16, 2)
    """
    shape = (config.n_layers, batch, config.n_kv_heads, capacity, config.head_dim)
    return KVCache(jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def write(
    cache: KVCache,
    layer: Int[Array, ""],
    start: Int[Array, ""] | int,
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
) -> KVCache:
    """The cache with positions ``start .. start + T`` of one layer filled; in place under a donated ``jit``.

    ``start + T`` must not exceed the capacity: XLA would move the write back over earlier positions.
    """
    at = (layer, 0, 0, start, 0)
    new_keys, new_values = (x.swapaxes(1, 2)[None].astype(jnp.float32) for x in (k, v))
    return KVCache(
        lax.dynamic_update_slice(cache.keys, new_keys, at),
        lax.dynamic_update_slice(cache.values, new_values, at),
    )


def bucket(length: int) -> int:
    """The next of 32, 48, 64, 96, 128, 192, ...: few lengths, so that few programs are compiled.

    >>> [bucket(n) for n in (1, 33, 64, 65, 1000)]
    [32, 48, 64, 96, 1024]
    """
    size = SMALLEST_BUCKET
    while size < length:
        size = size // 3 * 4 if size % 3 == 0 else size // 2 * 3
    return size
