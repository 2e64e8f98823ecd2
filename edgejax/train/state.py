"""What a training run carries from step to step."""

from typing import NamedTuple

import jax.numpy as jnp
import optax
from jaxtyping import Int

from edgejax.core.arrays import Array, PyTree
from edgejax.train.held import wide


class TrainState(NamedTuple):
    """Everything that changes in training, and nothing that does not.

    Attributes:
      step: int32, optimizer steps taken.
      trainable: adapters (LoRA) or all parameters, as they are held (``held``).
      opt_state: the optimizer's state over ``trainable``.
    """

    step: Int[Array, ""]
    trainable: PyTree
    opt_state: PyTree


def init_state(trainable: PyTree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; what an optimizer keeps of bfloat16 weights is float32, as their gradients are."""
    return TrainState(jnp.zeros((), jnp.int32), trainable, optimizer.init(wide(trainable)))
