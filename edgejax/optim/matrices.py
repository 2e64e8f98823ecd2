"""Which leaves an optimizer of matrices treats as matrices, and Adam for the others.

A leaf is a matrix, or a stack of them in its last two axes, if it has two axes or more and is not named
``scale`` or ``bias``: the norm scales of L stacked layers, ``[L, D]``, are vectors still. Leaves are told
apart by their dotted names, like ``blocks.q_proj.kernel``; a choice of leaves is a function of that name, or
a tree of bools.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_paths

Choice = PyTree | Callable[[str], bool] | None

VECTOR_NAMES = ("scale", "bias")


def is_matrix(name: str, shape: tuple[int, ...]) -> bool:
    """The rule of the module's docstring.

    >>> is_matrix("blocks.q_proj.kernel", (3, 8, 8)), is_matrix("blocks.attn_norm.scale", (3, 8))
    (True, False)
    """
    return len(shape) >= 2 and name.rpartition(".")[2] not in VECTOR_NAMES


def matrix_leaves(tree: PyTree, choice: Choice = None) -> list[bool]:
    """For each leaf, whether it is a matrix: as ``choice`` says, or by ``is_matrix`` where that is None.

    Raises:
      ConfigError: a chosen leaf with fewer than two axes.
    """
    names, leaves = list(tree_paths(tree)), jax.tree.leaves(tree)
    if choice is None:
        return [is_matrix(name, leaf.shape) for name, leaf in zip(names, leaves, strict=True)]
    flags = chosen_leaves(tree, choice)
    for name, leaf, flag in zip(names, leaves, flags, strict=True):
        if flag and leaf.ndim < 2:
            raise ConfigError(
                f"matrix_mask chooses {name!r} of shape {leaf.shape}, not a matrix; leave it out of the mask"
            )
    return flags


def chosen_leaves(tree: PyTree, choice: PyTree | Callable[[str], bool]) -> list[bool]:
    """For each leaf of ``tree``, in the order of ``jax.tree.leaves``, whether ``choice`` names it.

    Args:
      tree: any tree of arrays.
      choice: a function of the dotted name, or a tree of bools of the same structure.

    Raises:
      ConfigError: a tree of another structure, or of anything but bools.

    Example:
      >>> chosen_leaves({"embed": {"table": 0}, "head": {"kernel": 0}}, lambda name: name.startswith("head"))
      [False, True]
    """
    if callable(choice):
        return [bool(choice(name)) for name in tree_paths(tree)]
    try:
        flags = [flag for _, flag in zip_leaves(tree, choice)]
    except (ValueError, TypeError):
        flags = [None]
    if not all(isinstance(flag, bool) for flag in flags):
        raise ConfigError(
            f"a mask of leaves must be a tree of bools like the parameters, {jax.tree.structure(tree)}, not "
            f"{choice}; where an optimizer sees only some leaves (optax.partition), give a function of the "
            "leaf's dotted name"
        )
    return flags


def zip_leaves(tree: PyTree, *others: PyTree) -> list[tuple]:
    """The leaves of ``tree``, each with what the other trees hold in its place, be it a leaf or not.

    >>> zip_leaves({"a": 1, "b": 2}, {"a": optax.MaskedNode(), "b": 3})
    [(1, MaskedNode()), (2, 3)]
    """
    rows: list[tuple] = []
    jax.tree.map(lambda *row: rows.append(row), tree, *others)
    return rows


def masked_zeros(tree: PyTree, shapes: list[tuple[int, ...] | None]) -> PyTree:
    """Float32 zeros of the given shape for each leaf; where that is None, a node without an array.

    >>> masked_zeros({"a": 0, "b": 0}, [(2,), None])
    {'a': Array([0., 0.], dtype=float32), 'b': MaskedNode()}
    """
    zeros = [optax.MaskedNode() if shape is None else jnp.zeros(shape, jnp.float32) for shape in shapes]
    return jax.tree.unflatten(jax.tree.structure(tree), zeros)


def adam_direction(
    gradient: Float[Array, "..."], mu: Float[Array, "..."], nu: Float[Array, "..."], count: Array, b1, b2, eps
) -> tuple[Float[Array, "..."], Float[Array, "..."], Float[Array, "..."]]:
    """Direction and new moments of Adam (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), all float32.

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g^2
    direction = (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
    """
    mu = b1 * mu + (1 - b1) * gradient
    nu = b2 * nu + (1 - b2) * gradient**2
    return mu / (1 - b1**count) / (jnp.sqrt(nu / (1 - b2**count)) + eps), mu, nu


def check_number(name: str, value: Any, low: float, high: float = math.inf, *, above: bool = False) -> None:
    """Raises ConfigError for a number outside of ``[low, high)``, or of ``(low, high)`` if ``above``.

    A traced value, as ``optax.inject_hyperparams`` gives, has no value to look at and passes.
    """
    if isinstance(value, jax.Array):
        return
    if not (low < value < high or (value == low and not above)):
        lower = f"above {low}" if above else f"at least {low}"
        upper = "finite" if high == math.inf else f"below {high}"
        raise ConfigError(f"{name} must be {lower} and {upper}, not {value}")
