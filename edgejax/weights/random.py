"""Weights drawn from N(0, 0.02^2), where a file stands else: to measure speed and memory of a shape with."""

import dataclasses

import numpy as np

from edgejax.models import ModelConfig
from edgejax.weights.form import Form, float_form
from edgejax.weights.names import LeafName, leaf_names


@dataclasses.dataclass(frozen=True)
class RandomSource:
    """A ``params.LeafReader`` without a file.

    Attributes:
      config: the decoder's.
      seed: of all weights; each depends on it and on its own place alone.
      path: what stands where a file's would.
    """

    config: ModelConfig
    seed: int
    path: str = "random weights"

    @property
    def leaves(self) -> tuple[LeafName, ...]:
        return leaf_names(self.config)

    def shape(self, leaf: LeafName, layer: int) -> tuple[int, ...]:
        return leaf.shape

    def form(self, leaf: LeafName, layer: int) -> Form:
        return float_form(np.float32)

    def type_name(self, leaf: LeafName, layer: int) -> str:
        return "F32"

    def rows(self, leaf: LeafName, layer: int, start: int, stop: int) -> np.ndarray:
        if leaf.kind == "norm":
            return np.ones((1, *leaf.shape), np.float32)
        rng = np.random.default_rng([self.seed, layer, start, *leaf.hf_name(layer).encode()])
        shape = (stop - start, leaf.shape[-1])
        return rng.standard_normal(shape, dtype=np.float32) * np.float32(0.02)

    def row_order(self, leaf: LeafName) -> None:
        return None

    def offset(self, leaf: LeafName) -> float:
        return 0.0
