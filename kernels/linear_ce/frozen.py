"""Loss and dE of a frozen head in one pass over it; no logit is kept and none is made twice.

For one row e with target y,

    loss = logsumexp(W e) - W[y] . e,        dloss/de = softmax(W e)^T W - W[y].

Walking the vocabulary in chunks c with a running maximum m, sum s and weighted sum a (the online softmax of
Milakov and Gimelshein 2018, arXiv 1805.02867, with W itself in the place of attention's values),

    m' = max(m, max z_c),  s' = s exp(m - m') + sum exp(z_c - m'),  a' = a exp(m - m') + exp(z_c - m') W_c,

ends with logsumexp = m + log s and softmax^T W = a / s: two products a chunk, where recomputing takes three.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.linear_ce.chunks import HeadRows, head_chunk, rows_back, valid_rows_first, vocab_starts
from edgejax.quant.array import Weight, take_rows


@jax.custom_vjp
def linear_cross_entropy_frozen(
    hidden: Float[Array, "N D"],
    weight: Weight,
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
) -> Float[Array, ""]:
    """Sum of the masked rows' losses (float32), differentiable in ``hidden`` only."""
    loss_sum, _, _ = one_pass(valid_rows_first(hidden, targets, mask), weight, with_gradient=False)
    return loss_sum


def _forward(hidden, weight, targets, mask):
    rows = valid_rows_first(hidden, targets, mask)
    loss_sum, gradient, _ = one_pass(rows, weight, with_gradient=True)
    return loss_sum, rows_back(gradient, rows.order, hidden.dtype)


def _backward(gradient, d_loss):
    return (gradient * d_loss).astype(gradient.dtype), None, None, None


linear_cross_entropy_frozen.defvjp(_forward, _backward)


def one_pass(
    rows: HeadRows, weight: Weight, *, with_gradient: bool
) -> tuple[Float[Array, ""], Float[Array, "M D"], Float[Array, " M"]]:
    """Loss sum, its gradient in the rows (no rows if it is not wanted) and each row's log-sum-exp."""
    row_chunk = rows.chunk

    def one_chunk(i, carry):
        loss_sum, gradient, lse_rows = carry
        start = i * row_chunk
        h, y, keep = rows.take(start)
        own = take_rows(weight, y)
        lse, pulled = _over_vocabulary(h, weight, with_gradient)
        loss_sum += jnp.sum(jnp.where(keep, lse - jnp.sum(h * own, axis=1), 0.0))
        if with_gradient:
            d_h = jnp.where(keep[:, None], pulled - own, 0.0)
            gradient = lax.dynamic_update_slice_in_dim(gradient, d_h, start, axis=0)
        return loss_sum, gradient, lax.dynamic_update_slice_in_dim(lse_rows, lse, start, axis=0)

    n_rows, width = rows.hidden.shape
    start = (jnp.float32(0), jnp.zeros((n_rows if with_gradient else 0, width)), jnp.zeros(n_rows))
    return lax.fori_loop(0, rows.n_chunks, one_chunk, start)


def _over_vocabulary(h, weight, with_gradient: bool):
    """log-sum-exp of all logits of rows ``h [n, D]`` and, if wanted, softmax(h W^T) W ``[n, D]``."""
    chunk, starts = vocab_starts(weight)

    def step(carry, start):
        top, total, pulled = carry
        wide, _, fresh = head_chunk(weight, start, chunk)
        logits = jnp.where(fresh, h @ wide.T, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=1))
        shrink = jnp.exp(top - new_top)
        weights = jnp.exp(logits - new_top[:, None])
        total = total * shrink + weights.sum(axis=1)
        if with_gradient:
            pulled = pulled * shrink[:, None] + weights @ wide
        return (new_top, total, pulled), None

    n = h.shape[0]
    start_state = (
        jnp.full(n, -jnp.inf),
        jnp.zeros(n),
        jnp.zeros_like(h) if with_gradient else jnp.zeros((0, h.shape[1])),
    )
    (top, total, pulled), _ = lax.scan(step, start_state, starts)
    return top + jnp.log(total), (pulled / total[:, None] if with_gradient else None)
