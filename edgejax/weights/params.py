"""The parameter tree of an opened source: read whole, or only its shapes."""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from edgejax.core.arrays import PyTree
from edgejax.models.config import ModelConfig
from edgejax.quant import QuantizedArray
from edgejax.weights.leaves import Base, LeafSource, abstract_leaf, load_matrix, load_vector
from edgejax.weights.names import LeafName


class LeafReader(LeafSource, Protocol):
    """A ``LeafSource`` that knows its model: which leaves there are."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def leaves(self) -> tuple[LeafName, ...]: ...


def load_params(source: LeafReader, base: Base, notes: list[str]) -> PyTree:
    """The parameter tree of an opened source, leaves in host memory."""
    n_layers = source.config.n_layers

    def read(leaf: LeafName) -> np.ndarray | QuantizedArray:
        if leaf.kind in ("norm", "bias"):
            return load_vector(source, leaf, n_layers)
        return load_matrix(source, leaf, n_layers, base, notes)

    return tree_of(source.leaves, read)


def abstract_params(source: LeafReader, base: Base) -> PyTree:
    """Shapes and dtypes of ``load_params``, as ``jax.ShapeDtypeStruct``s."""
    return tree_of(source.leaves, lambda leaf: abstract_leaf(source, leaf, source.config.n_layers, base))


def tree_of(leaves: tuple[LeafName, ...], value_of: Callable[[LeafName], Any]) -> PyTree:
    """A tree with ``value_of(leaf)`` at the path of each leaf."""
    params: dict = {}
    for leaf in leaves:
        *parents, last = leaf.path
        node = params
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value_of(leaf)
    return params
