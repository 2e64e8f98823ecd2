"""Updating a large leaf piece by piece, so that no wide copy of its moments ever exists.

An update of a leaf is a function from a piece of the gradient and the same piece of each moment, all float32, to a
piece of the update and the new moments. Leaves with quantised moments are walked in pieces of ``PIECE_UNITS`` units:
decode, update, encode, in place in the donated buffers.

On a mesh of devices, units may be split over an axis (``units_split_over``): each device walks its own. Left to itself,
XLA would gather all units on every device, for it cannot tell that a loop's turns touch different ones.
"""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from edgejax.core.arrays import Array
from edgejax.core.counter_hash import GOLDEN, element_indices, lowbias32, uniform
from edgejax.core.in_place import replace_rows
from edgejax.optim.moments import UNIT, Moment, QuantizedMoment, encode_moment, from_units, to_units

PIECE_UNITS = 64  # 256 KiB of float32: a gradient, an update and two moments of it stay in a core's cache

# (gradient, *moments) -> (update, *new moments), each float32 of one shape. A new moment that is to be quantised may be a
# function instead, of those before it as they will be decoded.
Rule = Callable[..., Sequence[Any]]


class _Split(NamedTuple):
    mesh: Mesh
    axis: str

    @property
    def n_parts(self) -> int:
        return self.mesh.shape[self.axis]


_split: contextvars.ContextVar[_Split | None] = contextvars.ContextVar("units_split_over", default=None)


@contextlib.contextmanager
def units_split_over(mesh: Mesh, axis: str) -> Iterator[None]:
    """While a step is traced: units of quantised moments are split over an axis of ``mesh``, where it divides them.

    The noise of an element depends on its place in the whole leaf, so the rounding is that of one device.
    """
    token = _split.set(_Split(mesh, axis) if mesh.shape[axis] > 1 else None)
    try:
        yield
    finally:
        _split.reset(token)


def update_leaf(
    rule: Rule, gradient: Array, moments: Sequence[Moment], key: Array
) -> tuple[Array, list[Moment]]:
    """The update (dtype and shape of ``gradient``) and the new moments of one leaf.

    Args:
      rule: elementwise; sees float32 arrays of any one shape. Zeros must give zeros, for a filled-up unit has them.
      gradient: the leaf's gradient.
      moments: all wide (float32, the leaf's shape) or all quantised.
      key: uint32 scalar, another one each step: decides the stochastic rounding of quantised moments.
    """
    if not isinstance(moments[0], QuantizedMoment):
        update, *new = rule(gradient.astype(jnp.float32), *moments)
        return update.astype(gradient.dtype), list(new)
    quantized = cast(list[QuantizedMoment], list(moments))
    split = _split.get()
    if split is None or quantized[0].n_units % split.n_parts:
        update, new = _walk(rule, to_units(gradient), quantized, key, 0)
        return from_units(update, gradient.shape), list(new)
    update, new = _walk_parts(rule, to_units(_lengthwise(gradient, split)), quantized, key, split)
    return _lengthwise(from_units(update, gradient.shape), split), list(new)


def step_key(seed, count: Array, leaf_number: int, salt) -> Array:
    """A uint32 that differs between steps, leaves and slices of a leaf, from nothing but these and the seed."""
    key = jnp.asarray(seed).astype(jnp.uint32)
    for part in (count, leaf_number, salt):
        key = lowbias32(key + jnp.uint32(GOLDEN)) ^ jnp.asarray(part).astype(jnp.uint32)
    return lowbias32(key)


def _lengthwise(leaf: Array, split: _Split) -> Array:
    """A leaf split along its first axis, so that its parts are runs of units; where that divides."""
    if leaf.shape[0] % split.n_parts:
        return leaf
    return lax.with_sharding_constraint(leaf, NamedSharding(split.mesh, PartitionSpec(split.axis)))


def _walk_parts(rule: Rule, gradient: Array, moments: list[QuantizedMoment], key: Array, split: _Split):
    """``_walk`` on each device's part of the units."""

    def walk(gradient, moments, key):
        first = lax.axis_index(split.axis) * gradient.shape[0]
        return _walk(rule, gradient, moments, key, first)

    part, whole = PartitionSpec(split.axis), PartitionSpec()
    over_parts = jax.shard_map(
        walk, mesh=split.mesh, in_specs=(part, part, whole), out_specs=(part, part), check_vma=False
    )
    return over_parts(gradient, moments, key)


def _walk(rule: Rule, gradient: Array, moments: list[QuantizedMoment], key: Array, first):
    """Updates all units in pieces; ``first`` is the number of the first unit in its leaf."""
    n_units = gradient.shape[0]
    n_pieces = -(-n_units // PIECE_UNITS)
    size = n_units // n_pieces  # even pieces: nearly always nothing is left over

    update = functools.partial(_update_piece, rule, key)

    def at(start, size, carry):
        return replace_rows(carry, start, size, lambda rows, _: (update(rows, first + start), ()))[0]

    carry: Any = (gradient, moments)
    if n_pieces == 1:
        return update(carry, first)
    carry = lax.fori_loop(0, n_pieces, lambda i, carry: at(i * size, size, carry), carry)
    done = n_pieces * size
    # Its place is computed, not a constant: XLA must not know it, see replace_rows.
    return (
        at(done + jnp.minimum(key, 0).astype(jnp.int32), n_units - done, carry) if done < n_units else carry
    )


def _update_piece(rule: Rule, key, piece, start):
    gradient, moments = piece
    update, *new = rule(gradient.astype(jnp.float32), *(moment.decode() for moment in moments))
    index = element_indices(gradient.shape) + jnp.asarray(start).astype(jnp.uint32) * UNIT
    encoded: list[QuantizedMoment] = []
    held: list[Array] = []
    for number, (values, moment) in enumerate(zip(new, moments, strict=True)):
        values = values(*held) if callable(values) else values
        encoded_now, held_now = encode_moment(values, moment.code, uniform(index, key + jnp.uint32(number)))
        encoded.append(encoded_now)
        held.append(held_now)
    return update.astype(gradient.dtype), encoded
