"""Trained parameters as they are held and as they are computed with.

With bfloat16 weights, matrices are held as bit patterns (``quant.Bfloat16Array``), and vectors (norm scales, biases, 0.03%
of a decoder) stay float32. The optimizer updates plain bfloat16 arrays (its state begins as that
of float32 ones, which their gradients are), the model computes with float32 ones.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from edgejax.core.arrays import PyTree
from edgejax.quant import Bfloat16Array, dequantize, is_quantized

MATRICES = ("kernel", "table")


def hold_weights(params: PyTree, *, bfloat16: bool) -> PyTree:
    """All parameters as they are trained: float32, or matrices in bfloat16. Never the model's own buffers.

    Args:
      params: plain or packed, as a model was loaded.
      bfloat16: how matrices are held.
    """

    def hold(path: Any, leaf: Any) -> Any:
        if bfloat16 and path[-1].key in MATRICES:
            return Bfloat16Array.hold(dequantize(leaf))
        return jnp.array(dequantize(leaf), jnp.float32, copy=True)

    return jax.tree_util.tree_map_with_path(hold, params, is_leaf=is_quantized)


def take_weights(params: dict[str, Any], *, bfloat16: bool) -> PyTree:
    """``hold_weights`` of a tree of numpy arrays that is emptied: no more than one of its leaves is there twice.

    Example:
      >>> params = {"q_proj": {"kernel": np.ones((2, 2), np.float32)}}
      >>> take_weights(params, bfloat16=True)["q_proj"]["kernel"].pattern.dtype, params
      (dtype('uint16'), {})
    """
    taken: dict[str, Any] = {}
    for name in list(params):
        leaf = params.pop(name)
        taken[name] = (
            take_weights(leaf, bfloat16=bfloat16) if isinstance(leaf, dict) else _take(name, leaf, bfloat16)
        )
    return taken


def _take(name: str, leaf: Any, bfloat16: bool) -> Any:
    values = np.asarray(dequantize(leaf)) if is_quantized(leaf) else leaf
    if bfloat16 and name in MATRICES:
        return Bfloat16Array(_own(values.astype(jnp.bfloat16, copy=False).view(np.uint16)))
    return _own(values.astype(np.float32, copy=False))


def _own(values: np.ndarray) -> jax.Array:
    """In a buffer that a step can be given. Only what a program made is one, not what ``device_put`` copied (measured)."""
    return jax.block_until_ready(_copy(values))


_copy = jax.jit(jnp.copy)


def plain(params: PyTree) -> PyTree:
    """Parameters as the optimizer sees them: bit patterns as bfloat16, everything else as it is."""
    return jax.tree.map(lambda x: x.bfloat16() if is_pattern(x) else x, params, is_leaf=is_pattern)


def wide(params: PyTree) -> PyTree:
    """Parameters as they are differentiated: float32."""
    return jax.tree.map(dequantize, params, is_leaf=is_quantized)


def held_like(params: PyTree, template: PyTree) -> PyTree:
    """The opposite of ``plain``, in the form that ``template`` has."""
    hold = lambda old, new: Bfloat16Array.hold(new) if is_pattern(old) else new  # noqa: E731
    return jax.tree.map(hold, template, params, is_leaf=is_pattern)


def on_host(params: PyTree) -> PyTree:
    """Trained parameters as a finished run gives them: bit patterns as bfloat16 numpy arrays, not copied on a CPU.

    Example:
      >>> held = hold_weights({"kernel": jnp.ones((2, 2))}, bfloat16=True)
      >>> on_host(held)["kernel"].dtype
      dtype(bfloat16)
    """

    def view(leaf: Any) -> Any:
        return np.asarray(leaf.pattern).view(jnp.bfloat16) if is_pattern(leaf) else leaf

    return jax.tree.map(view, params, is_leaf=is_pattern)


def as_patterns(params: PyTree) -> PyTree:
    """Undoes ``on_host``: bfloat16 arrays as bit patterns, not copied; computed with, they are widened a layer at a time."""

    def view(leaf: Any) -> Any:
        is_bfloat16 = not is_quantized(leaf) and leaf.dtype == jnp.bfloat16
        return Bfloat16Array(np.asarray(leaf).view(np.uint16)) if is_bfloat16 else leaf

    return jax.tree.map(view, params, is_leaf=is_quantized)


def is_pattern(leaf: Any) -> bool:
    """For ``is_leaf=``."""
    return isinstance(leaf, Bfloat16Array)
