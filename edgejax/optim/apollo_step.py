"""One step of APOLLO for one matrix, and for a stack of them; the equations are in ``apollo``.

A matrix has its *channels* first, ``[C, K]`` with C >= K; one stored the other way is transposed on the way
in and out. The arithmetic is float32.
"""

import functools
import math
import zlib
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from edgejax.core.arrays import Array

Mode = Literal["channel", "tensor"]


def leaf_key(seed, period, name: str) -> Array:
    """The random key of a leaf's projections.

    Args:
      seed: an integer, traced or not.
      period: how many times the projections have been drawn anew.
      name: of the leaf, dotted.
    """
    # The generator is named: jax_default_prng_impl may differ between the runs that a checkpoint joins.
    key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), period)
    return jax.random.fold_in(key, zlib.crc32(name.encode()))


def projections(key: Array, places: Int[Array, "N"], rank: int, width: int) -> Float[Array, "N R K"]:
    """P of some matrices of a leaf: normal numbers of variance 1 / rank, from the arguments alone.

    Args:
      key: of ``leaf_key``.
      places: of the matrices in the leaf's stack.
      rank: r.
      width: K.

    Example:
      >>> p = projections(leaf_key(0, 0, "blocks.q_proj.kernel"), jnp.arange(3), rank=4, width=4000)
      >>> p.shape, round(float(4 * jnp.var(p)), 1)
      ((3, 4, 4000), 1.0)
    """
    return _draw(key, places, rank, width) / math.sqrt(rank)


@functools.partial(jax.jit, static_argnames=("rank", "width"))
def _draw(key: Array, places: Int[Array, "N"], rank: int, width: int) -> Float[Array, "N R K"]:
    # One after the other: drawn by vmap, threefry takes twice as long to compile.
    return jax.lax.map(
        lambda place: jax.random.normal(jax.random.fold_in(key, place), (rank, width), jnp.float32), places
    )


def step_matrix(
    gradient: Float[Array, "C K"],
    mu: Float[Array, "C R"],
    nu: Float[Array, "C R"],
    norm: Float[Array, ""],
    projection: Float[Array, "R K"],
    *,
    b1,
    b2,
    eps,
    mode: Mode,
    norm_growth,
) -> tuple[Float[Array, "C K"], Float[Array, "C R"], Float[Array, "C R"], Float[Array, ""]]:
    """N, not yet corrected for bias or scaled by alpha, and the new m, v and |N'|.

    Args:
      gradient: G.
      mu: m.
      nu: v.
      norm: |N'|; 0 as long as all gradients have been zero.
      projection: P.
      b1, b2, eps, mode, norm_growth: see ``apollo.scale_by_apollo``.
    """
    projected = jnp.einsum("ck,rk->cr", gradient, projection, precision="highest")
    mu = b1 * mu + (1 - b1) * projected
    nu = b2 * nu + (1 - b2) * projected**2
    axis = 1 if mode == "channel" else None
    adapted = mu / (jnp.sqrt(nu) + eps)
    scaled = gradient * _ratio(_length(adapted, axis), _length(projected, axis))
    length = _length(scaled, None).squeeze()
    if norm_growth is not None:
        bounded = jnp.where(norm > 0, jnp.minimum(length, norm_growth * norm), length)
        scaled, length = scaled * _ratio(bounded, length), bounded
    return scaled, mu, nu, jnp.where(length > 0, length, norm)


def step_stack(
    rule: Callable,
    key: Array,
    gradient: Float[Array, "... O I"],
    mu: Float[Array, "... C R"],
    nu: Float[Array, "... C R"],
    norm: Float[Array, "..."],
    first_place,
) -> tuple[Float[Array, "... O I"], Float[Array, "... C R"], Float[Array, "... C R"], Float[Array, "..."]]:
    """A step for each matrix of a leaf, whose leading axes (layers, experts) count separate matrices.

    Args:
      rule: ``step_matrix`` with its keywords given.
      key: of ``leaf_key``.
      gradient: of the leaf.
      mu, nu, norm: the leaf's state.
      first_place: place of the first matrix.
    """
    stack, (n_out, n_in) = gradient.shape[:-2], gradient.shape[-2:]
    rank, size = mu.shape[-1], math.prod(stack)

    def one(matrix, mu, nu, norm, projection):
        channels = matrix if n_out >= n_in else matrix.T
        scaled, *new = rule(channels, mu, nu, norm, projection)
        return scaled if n_out >= n_in else scaled.T, *new

    parts = [x.reshape(size, *x.shape[len(stack) :]) for x in (gradient, mu, nu, norm)]
    parts.append(projections(key, first_place + jnp.arange(size), rank, min(n_out, n_in)))
    scaled, mu, nu, norm = jax.vmap(one)(*parts)
    return scaled.reshape(gradient.shape), *(x.reshape(*stack, *x.shape[1:]) for x in (mu, nu, norm))


def _length(x: Array, axis: int | None) -> Array:
    return jnp.sqrt(jnp.sum(x**2, axis=axis, keepdims=True))


def _ratio(above: Array, below: Array) -> Array:
    """0 where ``below`` is 0."""
    return jnp.where(below > 0, above / jnp.where(below > 0, below, 1), 0)
