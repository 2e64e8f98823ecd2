"""The MLP on a few positions at a time, or with a few of its hidden units."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError


def check_tile(tile: int | None) -> None:
    """Refuses what is no length of a tile.

    Raises:
      ConfigError: below 1, or no whole number.
    """
    if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 1):
        raise ConfigError(
            f"mlp_tile must be a whole number of positions of at least 1, not {tile!r}; None does not tile"
        )


def over_positions(
    function: Callable[[Float[Array, "B t D"]], Float[Array, "B t D"]],
    h: Float[Array, "B T D"],
    tile: int | None,
) -> Float[Array, "B T D"]:
    """``function(h)`` for a function that maps each position by itself, at most ``tile`` positions of a row at once.

    Forward and backward, the function's inner values exist for one tile; only ``h`` is kept (and what a policy
    around it names), so the backward pass makes them again, tile by tile. Gradients of what the function closes over
    are summed over tiles in their own dtype, which is float32 for everything that trains here.

    T is cut into ``n = ceil(T / tile)`` tiles of ``ceil(T / n)`` positions, so that at most n - 1 positions are
    padding. Rows are not cut: they may lie on different devices.

    Args:
      function: from ``[B, t, D]`` to the same shape; zeros must not make it or its derivative non-finite.
      h: its whole input.
      tile: positions of a row at once; None, or T and more: ``function(h)`` as it is.

    Example:
      >>> over_positions(lambda x: 2 * x, jnp.ones((1, 7, 4)), 3).shape
      (1, 7, 4)
    """
    batch, length, width = h.shape
    if tile is None or tile >= length:
        return function(h)
    n_tiles = -(-length // tile)
    size = -(-length // n_tiles)
    padded = jnp.pad(h, ((0, 0), (0, n_tiles * size - length), (0, 0)))
    tiles = jnp.moveaxis(padded.reshape(batch, n_tiles, size, width), 1, 0)
    out = lax.map(jax.checkpoint(function, prevent_cse=False), tiles)
    return jnp.moveaxis(out, 0, 1).reshape(batch, n_tiles * size, width)[:, :length]


def sum_over_parts(
    function: Callable[[PyTree, Float[Array, "B T D"]], Float[Array, "B T D"]],
    parts: PyTree,
    x: Float[Array, "B T D"],
) -> Float[Array, "B T D"]:
    """``sum_i function(parts[i], x)``, whose inner values exist for one part, forward and backward.

    Only ``x`` and the parts are kept, so the backward pass makes a part's inner values again. Unlike tiles of positions
    it reads each weight once a pass, whatever the number of parts.

    Args:
      function: from one part and ``x`` to a summand.
      parts: leaves with a leading axis of parts.
      x: ``[B, T, D]``.

    Example:
      >>> sum_over_parts(lambda w, x: w * x, jnp.array([1.0, 2.0]), jnp.ones((1, 2, 1))).tolist()
      [[[3.0], [3.0]]]
    """

    def add(total: Array, part: PyTree) -> tuple[Array, None]:
        return total + function(part, x), None

    return lax.scan(jax.checkpoint(add, prevent_cse=False), jnp.zeros_like(x), parts)[0]
