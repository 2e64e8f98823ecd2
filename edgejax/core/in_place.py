"""Replacing rows of large buffers inside a loop, without a copy of the buffers."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from edgejax.core.arrays import ArrayLike, PyTree


def replace_row(
    buffers: PyTree,
    index: ArrayLike | int,
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree = (),
) -> tuple[PyTree, PyTree]:
    """``replace_rows`` for one row, which ``function`` sees and gives without its first axis.

    Example:
      >>> double = lambda row, total: (row * 2, total + row)
      >>> stack, total = replace_row(jnp.array([1.0, 3.0]), 1, double, jnp.float32(0))
      >>> stack.tolist(), float(total)
      ([1.0, 6.0], 3.0)
    """

    def on_row(rows: PyTree, carry: PyTree) -> tuple[PyTree, PyTree]:
        new, carry = function(jax.tree.map(lambda leaf: leaf[0], rows), carry)
        return jax.tree.map(lambda leaf: leaf[None], new), carry

    return replace_rows(buffers, index, 1, on_row, carry)


def replace_rows(
    buffers: PyTree,
    start: ArrayLike | int,
    size: int,
    function: Callable[[PyTree, PyTree], tuple[PyTree, PyTree]],
    carry: PyTree = (),
) -> tuple[PyTree, PyTree]:
    """``buffers`` with rows ``start`` to ``start + size`` of every leaf replaced by ``function`` of those rows.

    Meant for buffers that a loop carries (or a jitted function takes by donation). XLA would fuse the reading of the
    rows into each of their readers, find the whole buffer still needed when it is written, and copy all of it in
    every turn (measured with two Adam moments of 16 MiB on CPU: 20 times slower, and a second copy of the moments).
    A branch that only the run decides is not looked into: its operands, the rows, are read once, before anything is
    written, and what is written waits for all it gives.

    bfloat16 leaves are written slowly: XLA:CPU widens the whole leaf for it (measured: 24 times slower than uint16).

    Args:
      buffers: arrays with the same rows along their first axis.
      start: first row, at least 0.
      size: number of rows (static).
      function: from rows ``[size, ...]`` and ``carry`` to new ones of the same shapes and dtypes. Whatever else is
        computed from the rows must be part of the carry.
      carry: passed through the function.

    Example:
      >>> buffers, _ = replace_rows({"a": jnp.arange(4.0)}, 1, 2, lambda rows, _: ({"a": rows["a"] * 10}, ()))
      >>> buffers["a"].tolist()
      [0.0, 10.0, 20.0, 3.0]
    """

    def on_only_group(groups: Sequence[PyTree], carry: PyTree) -> tuple[Sequence[PyTree], PyTree]:
        new, carry = function(groups[0], carry)
        return (new,), carry

    (new,), carry = replace_rows_of_several(((buffers, start, size),), on_only_group, carry)
    return new, carry


def replace_rows_of_several(
    groups: Sequence[tuple[PyTree, ArrayLike | int, int]],
    function: Callable[[Sequence[PyTree], PyTree], tuple[Sequence[PyTree], PyTree]],
    carry: PyTree = (),
) -> tuple[list[PyTree], PyTree]:
    """``replace_rows`` for groups of buffers at once, each ``(buffers, start, size)`` with rows of its own.

    One inside the other would not do: what the inner one writes to is then passed through the outer one's branch, and
    copied there.

    Example:
      >>> swap = lambda rows, _: ((rows[1], rows[0]), ())
      >>> new, _ = replace_rows_of_several(((jnp.arange(3.0), 0, 1), (jnp.arange(4.0) * 10, 2, 1)), swap)
      >>> [leaf.tolist() for leaf in new]
      [[20.0, 1.0, 2.0], [0.0, 10.0, 0.0, 30.0]]
    """
    groups = [(buffers, jnp.asarray(start, jnp.int32), size) for buffers, start, size in groups]
    rows = [
        jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), buffers)  # noqa: B023
        for buffers, start, size in groups
    ]

    def change(rows: Sequence[PyTree], carry: PyTree) -> tuple[list[PyTree], PyTree]:
        new, carry = function(rows, carry)
        return list(new), carry

    new, carry = lax.cond(groups[0][1] < 0, lambda rows, carry: (rows, carry), change, rows, carry)
    put = lambda start: lambda leaf, part: lax.dynamic_update_slice_in_dim(leaf, part, start, 0)  # noqa: E731
    return [
        jax.tree.map(put(start), buffers, part) for (buffers, start, _), part in zip(groups, new, strict=True)
    ], carry
