"""The trained head's two gradients at two times, so that the head can be updated part by part.

``first_pass`` gives the loss and its gradient in the hidden rows, all that the layers below wait for, in two products a
part of the vocabulary (``frozen.py``). When they are done, ``weight_gradient`` gives the gradient of any part W_c of
the head, from the logits made again:

    dW_c = (exp(E W_c^T - lse) - onehot_c)^T E

Four products a part in all, as many as ``trainable.py`` has, and no gradient of the size of the head.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.linear_ce.chunks import HeadRows, logit_gradient, rows_back, valid_rows_first
from edgejax.kernels.linear_ce.frozen import one_pass
from edgejax.quant.array import Weight


class HeadPass(NamedTuple):
    """What the second pass needs of the first.

    Attributes:
      rows: hidden rows, those with loss first.
      lse: float32 ``[M]``, their log-sum-exps.
    """

    rows: HeadRows
    lse: Float[Array, " M"]


def first_pass(
    hidden: Float[Array, "N D"], weight: Weight, targets: Int[Array, " N"], mask: Bool[Array, " N"]
) -> tuple[Float[Array, ""], Float[Array, "N D"], HeadPass]:
    """Loss sum over the masked rows, its gradient in ``hidden``, and what ``weight_gradient`` needs."""
    rows = valid_rows_first(hidden, targets, mask)
    loss_sum, gradient, lse = one_pass(rows, weight, with_gradient=True)
    return loss_sum, rows_back(gradient, rows.order, hidden.dtype), HeadPass(rows, lse)


def weight_gradient(
    passed: HeadPass, wide: Float[Array, "c D"], first: Int[Array, ""]
) -> Float[Array, "c D"]:
    """Gradient of the loss sum in the head's rows ``wide``, which begin at token ``first``; float32."""

    def one_chunk(i, gradient):
        h, g = logit_gradient(passed.rows, passed.lse, i * passed.rows.chunk, wide, first)
        return gradient + g.T @ h

    return lax.fori_loop(0, passed.rows.n_chunks, one_chunk, jnp.zeros(wide.shape, jnp.float32))
