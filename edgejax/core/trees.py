"""Counting what a pytree of arrays really holds."""

import jax

from edgejax.core.arrays import PyTree


def tree_bytes(tree: PyTree) -> int:
    """Bytes of all array leaves as they are stored (a quantised leaf counts its codes and its scales).

    >>> import numpy as np
    >>> tree_bytes({"a": np.zeros((2, 3), np.float32), "b": np.zeros(4, np.int8)})
    28
    """
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def tree_size(tree: PyTree) -> int:
    """Number of elements in all leaves (codes of a quantised leaf count as stored words)."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def tree_paths(tree: PyTree, is_leaf=None) -> dict[str, PyTree]:
    """Leaves by their path, joined with dots.

    >>> tree_paths({"attn": {"q_proj": 1}})
    {'attn.q_proj': 1}
    """
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return {".".join(_key_name(k) for k in path): leaf for path, leaf in flat}


def _key_name(key) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            return str(getattr(key, attribute))
    return str(key)
