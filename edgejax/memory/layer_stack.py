"""A stack of layers with a backward pass of its own: which boundaries wait for it, and in how many bits.

Groups of k layers keep the input of the group; the backward pass goes through the groups from the last to the
first, makes the inputs of the k layers again, and then differentiates one layer at a time. Kept at once::

    ceil(L / k) + k  boundaries,   smallest near k = sqrt(L)   (Chen et al. 2016, arXiv 1604.06174, section 4.2)
    L                boundaries    for k = 1

at the cost of one more forward pass of the k - 1 first layers of each group (their "sublinear" scheme recomputes a
group with all its values; here only the boundaries are made first, as in treeverse, Griewank 1992, with two levels).
Any L will do: the last group is shorter, and its loop ends earlier.

Autodiff of two nested scans would do the same with a copy of each group's weights, since the inner scan needs its
slice of the stack as an array. Here every loop indexes the one stack, gradients are written into one stack in the
carry, and weights that do not train have none.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal
from jaxtyping import Float, Int

from edgejax.core.arrays import Array, ArrayLike, PyTree
from edgejax.core.errors import ConfigError
from edgejax.memory.residuals import Boundary, layer_key

Layer = Callable[[Any, PyTree, PyTree], Any]  # (h, one layer's slice of the stack, shared) -> h


class Keeping(NamedTuple):
    """A layer that hands out values beside its output and takes them back instead of making them again.

    Attributes:
      forward: ``(h, one layer's slice, shared) -> (h, values)``; not differentiated. The values wait as they are given.
      again: ``(h, one layer's slice, shared, values) -> h``, differentiable in h and the slice.
    """

    forward: Callable[[Any, PyTree, PyTree], tuple[Any, PyTree]]
    again: Callable[[Any, PyTree, PyTree, PyTree], Any]


def sqrt_group(n_layers: int) -> int:
    """Layers of a group so that the fewest boundaries wait at once; of equals the smallest, which recomputes less.

    >>> [sqrt_group(n) for n in (1, 4, 7, 16, 30, 32)]
    [1, 1, 2, 4, 5, 4]
    """
    return min(range(1, n_layers + 1), key=lambda k: (kept_boundaries(n_layers, k), k))


def group_of(remat: str, n_layers: int) -> int:
    """Layers of a group under a remat policy: ``sqrt_group`` for ``sqrt``, 1 for the others."""
    return sqrt_group(n_layers) if remat == "sqrt" else 1


def kept_boundaries(n_layers: int, group: int) -> int:
    """Boundaries that wait at once: one a group, and those inside of one group.

    >>> kept_boundaries(30, 1), kept_boundaries(30, 5)
    (30, 11)
    """
    return n_layers if group == 1 else -(-n_layers // group) + group


def run_layers(
    layer: Layer,
    h: Float[Array, "B T D"],
    stack: PyTree,
    shared: PyTree,
    *,
    boundary: Boundary,
    group: int = 1,
    keeping: Keeping | None = None,
    key: Int[ArrayLike, ""] | int = 0,
) -> Float[Array, "B T D"]:
    """``h`` after all layers of ``stack``; differentiable once, in ``h`` and in the stack's float leaves.

    Args:
      layer: one layer, a pure function that closes over no traced value.
      h: float32.
      stack: leaves ``[L, ...]``. What is differentiated gets a gradient; packed and frozen leaves get none and are
        not copied.
      shared: what all layers read (rotary tables, segment ids, None); has no gradient.
      boundary: how inputs of layers wait for the backward pass.
      group: layers of a group, k.
      keeping: the same layer where more than its input waits; with groups of one layer.
      key: uint32 scalar, decides the rounding (``residuals.batch_key``).

    Raises:
      ConfigError: ``keeping`` with groups of several layers.
    """
    if keeping is not None and group != 1:
        raise ConfigError(f"groups of {group} layers keep inputs alone; values beside them need groups of 1")
    passes = _Passes(layer, boundary, group, keeping or _keeping_nothing(layer))
    run = jax.custom_vjp(passes.forward)
    run.defvjp(passes.forward_keeping, passes.backward, symbolic_zeros=True)
    return run(h, jax.tree.map(jnp.asarray, stack), shared, jnp.asarray(key, jnp.uint32))


class _Passes:
    """The forward and the backward pass over a stack; holds static values only."""

    def __init__(self, layer: Layer, boundary: Boundary, group: int, keeping: Keeping):
        self.layer, self.boundary, self.group, self.keeping = layer, boundary, group, keeping

    def forward(self, h, stack, shared, key):
        return lax.fori_loop(0, _length(stack), lambda i, h: self.layer(h, _slice(stack, i), shared), h)

    def forward_keeping(self, h, stack, shared, key):
        """``h`` after all layers, and for the backward pass the input of each group."""
        trained, frozen = _split(stack)
        h, stack, shared, key = _values((h, stack, shared, key))
        n_layers = _length(stack)

        def one_group(carry, first):
            h, reference = carry
            stored, reference = self.boundary.store(h, reference, layer_key(key, first))
            if self.group == 1:
                h, values = self.keeping.forward(h, _slice(stack, first), shared)
                return (h, reference), (stored, values)

            def one_layer(j, h):
                return self.layer(h, _slice(stack, first + j), shared)

            return (_loop(self._count(first, n_layers), one_layer, h), reference), (stored, None)

        start = (h, self.boundary.start(h.shape))
        (h, reference), boundaries = lax.scan(one_group, start, jnp.arange(0, n_layers, self.group))
        return h, (boundaries, reference, trained, frozen, shared, key)

    def backward(self, kept, dh):
        """Gradients of ``h`` and of the trained leaves."""
        boundaries, reference, trained, frozen, shared, key = kept
        n_layers = _length((trained, frozen))

        def one_group(carry, group):
            (dh, gradients, reference), (first, (stored, values)) = carry, group
            h, reference = self.boundary.restore(stored, reference, layer_key(key, first))

            def weights_of(layer):
                return _slice(trained, layer), _slice(frozen, layer)

            def one_layer(h, layer, dh, gradients, again=self.layer):
                weights, constant = weights_of(layer)
                _, pull = jax.vjp(lambda h, w: again(h, _joined(w, constant), shared), h, weights)
                dh, found = pull(dh)
                return dh, _put(gradients, found, layer)

            if self.group == 1:
                recalling = lambda h, w, shared: self.keeping.again(h, w, shared, values)  # noqa: E731
                dh, gradients = one_layer(h, first, dh, gradients, recalling)
            else:
                count = self._count(first, n_layers)
                again = lambda h, layer: self.layer(h, _joined(*weights_of(layer)), shared)  # noqa: E731
                inner = self._inputs_of_group(h, first, count, again, key)
                dh, gradients = self._back_through_group(inner, first, count, one_layer, (dh, gradients), key)
            return (dh, gradients, reference), None

        start = (dh, jax.tree.map(jnp.zeros_like, trained), reference)
        groups = (jnp.arange(0, n_layers, self.group), boundaries)
        (dh, gradients, _), _ = lax.scan(one_group, start, groups, reverse=True)
        return dh, gradients, None, None

    def _inputs_of_group(self, h, first, count, again, key):
        """(stored inputs ``[k, ...]`` of the layers of a group, their reference), from the input of its first."""

        def store(h, reference, j, inputs):
            stored, reference = self.boundary.store(h, reference, layer_key(key, first + j))
            return _put(inputs, stored, j), reference

        def one_layer(j, carry):
            h, inputs, reference = carry
            h = again(h, first + j)
            return h, *store(h, reference, j + 1, inputs)

        start = self.boundary.start(h.shape)
        shapes = jax.eval_shape(lambda: self.boundary.store(h, start, key)[0])
        empty = jax.tree.map(lambda leaf: jnp.zeros((self.group, *leaf.shape), leaf.dtype), shapes)
        return _loop(count - 1, one_layer, (h, *store(h, start, 0, empty)))[1:]

    def _back_through_group(self, inner, first, count, one_layer, carry, key):
        inputs, reference = inner

        def last_to_first(j, carry):
            dh, gradients, reference = carry
            j = count - 1 - j
            h, reference = self.boundary.restore(_slice(inputs, j), reference, layer_key(key, first + j))
            return *one_layer(h, first + j, dh, gradients), reference

        return _loop(count, last_to_first, (*carry, reference))[:2]

    def _count(self, first, n_layers: int):
        """Layers of the group that starts at ``first``: static where all groups are equal."""
        return self.group if n_layers % self.group == 0 else jnp.minimum(self.group, n_layers - first)


def _keeping_nothing(layer: Layer) -> Keeping:
    return Keeping(lambda *args: (layer(*args), ()), lambda h, w, shared, _: layer(h, w, shared))


def _loop(count, body, carry):
    """``body`` for j = 0, 1, ... count - 1; without a loop where that is nothing or one."""
    if isinstance(count, int) and count <= 1:
        return body(0, carry) if count else carry
    return lax.fori_loop(0, count, body, carry)


def _split(stack):
    """(leaves that are differentiated, the others), each with None in the place of the others."""
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    trains = lambda p: p.perturbed and jnp.issubdtype(p.value.dtype, jnp.inexact)  # noqa: E731
    trained = jax.tree.map(lambda p: p.value if trains(p) else None, stack, is_leaf=is_primal)
    frozen = jax.tree.map(lambda p: None if trains(p) else p.value, stack, is_leaf=is_primal)
    return trained, frozen


def _joined(trained, frozen):
    return jax.tree.map(lambda a, b: b if a is None else a, trained, frozen, is_leaf=lambda x: x is None)


def _values(tree):
    is_primal = lambda leaf: isinstance(leaf, CustomVJPPrimal)  # noqa: E731
    return jax.tree.map(lambda p: p.value, tree, is_leaf=is_primal)


def _length(stack) -> int:
    return jax.tree.leaves(stack)[0].shape[0]


def _slice(stack, index):
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def _put(stack, values, index):
    return jax.tree.map(
        lambda into, value: lax.dynamic_update_index_in_dim(into, value.astype(into.dtype), index, 0),
        stack,
        values,
    )
