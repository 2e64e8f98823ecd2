"""The loss of next-token prediction over a batch of packed rows."""

import jax.numpy as jnp
from jaxtyping import Float, Int

from edgejax.core.arrays import Array
from edgejax.data.batch import Batch
from edgejax.kernels.linear_ce import linear_cross_entropy
from edgejax.quant import Weight


def next_token_loss(
    hidden: Float[Array, "B T D"], head: Weight, batch: Batch, *, frozen_head: bool
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of the losses of the batch's counted tokens, and how many there are.

    Args:
      hidden: after the last norm.
      head: ``[V, D]``.
      batch: rows where ``loss_mask`` is False never reach the head.
      frozen_head: True where the head gets no gradient.

    Returns:
      (float32 loss sum, int32 count). The sum, not the mean, so that micro-steps with different counts add up
      to the gradient of the whole step.
    """
    width = hidden.shape[-1]
    mask = batch.loss_mask.reshape(-1)
    loss_sum = linear_cross_entropy(
        hidden.reshape(-1, width), head, batch.targets.reshape(-1), mask, frozen=frozen_head
    )
    return loss_sum, jnp.sum(mask, dtype=jnp.int32)
