"""The op that the loss calls."""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.core.errors import ConfigError
from edgejax.kernels.linear_ce.frozen import linear_cross_entropy_frozen
from edgejax.kernels.linear_ce.trainable import linear_cross_entropy_trainable
from edgejax.quant.array import Weight, is_quantized


def linear_cross_entropy(
    hidden: Float[Array, "N D"],
    weight: Weight,
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
    *,
    frozen: bool,
) -> Float[Array, ""]:
    """Sum over masked rows of ``logsumexp(h W^T) - h . W[y]``, without the ``N x V`` logits.

    Rows whose mask is False are moved behind the others and never multiplied with the head.

    Args:
      hidden: rows after the last norm.
      weight: the head ``[V, D]``, plain or quantised.
      targets: int32, the token each row should predict.
      mask: which rows count.
      frozen: True: no gradient for ``weight``, and loss and gradient come from one pass (see ``frozen.py``);
        False: both gradients (see ``trainable.py``).

    Returns:
      float32 scalar; divide by the number of counted rows for the mean. Zero where there are no rows.

    Raises:
      ConfigError: a quantised head cannot be trained.
    """
    if not frozen and is_quantized(weight):
        raise ConfigError("a quantised head cannot be trained; hold the base in f32 (--base f32)")
    if hidden.shape[0] == 0:
        return jnp.zeros((), jnp.float32)
    if frozen:
        return linear_cross_entropy_frozen(hidden, weight, targets, mask)
    return linear_cross_entropy_trainable(hidden, weight, targets, mask)
