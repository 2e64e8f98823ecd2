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


def is_pattern(leaf: Any) -> bool:
    """For ``is_leaf=``."""
    return isinstance(leaf, Bfloat16Array)
