"""What a run's trees really take, counted after they were made: bytes, bits an element, and which leaves are wide.

A setting promises bytes; the receipt shows what was allocated for it. Bytes a parameter are those of weights, gradients
and optimizer state together, over the number of parameters that train.
"""

import dataclasses
import math
from typing import Any

import jax

from edgejax.core.arrays import PyTree
from edgejax.core.trees import tree_bytes, tree_paths
from edgejax.core.units import format_bytes
from edgejax.memory.layer_stack import group_of, kept_boundaries
from edgejax.memory.residuals import boundary_named
from edgejax.models import ModelConfig
from edgejax.models.kept import KeptValues
from edgejax.optim.moments import SMALLEST_QUANTIZED, QuantizedMoment
from edgejax.quant import Bfloat16Array, QuantizedArray
from edgejax.train.layerwise_state import TABLES, table_parts
from edgejax.train.recipe import StepRecipe
from edgejax.train.state import TrainState

PACKED = (QuantizedArray, Bfloat16Array, QuantizedMoment)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TreeReceipt:
    """One tree as it is stored."""

    name: str
    n_bytes: int
    n_elements: int  # that its leaves stand for
    bits_per_element: float
    wide_bytes: int  # of leaves left in float32 beside narrower ones
    wide_leaves: tuple[str, ...]
    why_wide: str | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """The account of a run; see the module's docstring."""

    trees: tuple[TreeReceipt, ...]
    boundaries_bytes: int  # stored inputs of layers, of all micro-steps that wait at once
    kept_bytes: int  # values of layers that wait beside their inputs (remat)
    gradients_bytes: int  # that exist at once: the tree (whole), or the largest layer or part of a table
    trained_parameters: int

    @property
    def bytes_per_parameter(self) -> float:
        """Weights that train, their gradients and the optimizer's state, over the number of trained parameters."""
        held = sum(tree.n_bytes for tree in self.trees if tree.name != "frozen weights")
        return (held + self.gradients_bytes) / self.trained_parameters

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self) | {"bytes_per_parameter": self.bytes_per_parameter}

    def entries(self) -> dict[str, str]:
        """What a person reads of each tree, by its name."""
        found = {}
        for tree in self.trees:
            wide = f"; {len(tree.wide_leaves)} leaves in float32: {tree.why_wide}" if tree.wide_leaves else ""
            found[tree.name] = (
                f"{format_bytes(tree.n_bytes)}, {tree.bits_per_element:.2f} bits an element{wide}"
            )
        found["gradients"] = f"{format_bytes(self.gradients_bytes)} at once"
        found["layer inputs"] = f"{format_bytes(self.boundaries_bytes)} at once"
        if self.kept_bytes:
            found["kept beside them"] = f"{format_bytes(self.kept_bytes)} at once"
        found["all that trains"] = f"{self.bytes_per_parameter:.2f} bytes a parameter"
        return found

    def __str__(self) -> str:
        return "\n".join(f"  {name:<16}{text}" for name, text in self.entries().items())


def make_receipt(
    recipe: StepRecipe,
    config: ModelConfig,
    state: TrainState,
    frozen: PyTree,
    batch_shape: tuple[int, int, int],
) -> Receipt:
    """Count the trees of a run.

    Args:
      recipe: how its steps are computed.
      config: the decoder's.
      state: before or after any step; arrays or their shapes.
      frozen: weights that do not train.
      batch_shape: ``(A, B, T)`` of a step.
    """
    trees = [
        _tree("frozen weights", frozen, None),
        _tree("weights" if recipe.mode == "full" else "adapters", state.trainable, "vectors are not rounded"),
        _tree(
            "optimizer", state.opt_state, f"below {SMALLEST_QUANTIZED} elements, or counters and projections"
        ),
    ]
    micro_steps, *rows = batch_shape
    at_once = micro_steps if recipe.schedule != "whole" else 1
    waiting = kept_boundaries(config.n_layers, group_of(recipe.remat, config.n_layers))
    stored = boundary_named(recipe.boundaries).stored_bytes((*rows, config.d_model))
    kept = KeptValues.of(recipe.remat, recipe.boundaries).stored_bytes(config, *rows)
    return Receipt(
        trees=tuple(tree for tree in trees if tree.n_bytes),
        boundaries_bytes=at_once * waiting * stored,
        kept_bytes=at_once * config.n_layers * kept,
        gradients_bytes=4 * _gradient_elements(recipe, config, state.trainable),
        trained_parameters=_elements(state.trainable),
    )


def _tree(name: str, tree: PyTree, why_wide: str | None) -> TreeReceipt:
    leaves = tree_paths(tree, is_leaf=lambda leaf: isinstance(leaf, PACKED))
    packed = [leaf for leaf in leaves.values() if isinstance(leaf, PACKED)]
    wide = {name: leaf for name, leaf in leaves.items() if not isinstance(leaf, PACKED)} if packed else {}
    size = tree_bytes(tree)
    elements = _elements(tree)
    return TreeReceipt(
        name=name,
        n_bytes=size,
        n_elements=elements,
        bits_per_element=8 * size / elements if elements else 0.0,
        wide_bytes=tree_bytes(list(wide.values())),
        wide_leaves=tuple(wide) if why_wide else (),
        why_wide=why_wide if wide else None,
    )


def _elements(tree: PyTree) -> int:
    leaves = jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, PACKED))
    return sum(_size(leaf) for leaf in leaves)


def _size(leaf: Any) -> int:
    """Elements a leaf stands for; a quantised moment counts the zeros its last unit is filled up with."""
    return 128 * leaf.scale.size if isinstance(leaf, QuantizedMoment) else math.prod(leaf.shape)


def _gradient_elements(recipe: StepRecipe, config: ModelConfig, trainable: PyTree) -> int:
    if recipe.schedule == "whole":
        return _elements(trainable)
    largest = _elements(trainable["blocks"]) // config.n_layers
    for name, leaf in TABLES:
        if name in trainable:
            vocab, width = trainable[name][leaf].shape
            parts = table_parts(vocab)
            largest = max(largest, width * max(parts.rows, parts.rest))
    return largest
