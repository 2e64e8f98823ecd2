"""Loss of a head that is itself trained, in chunks of rows and vocabulary.

The head's gradient needs each row's normaliser before any of it can be written, so the logits are made twice:
once for the log-sum-exp, once in the backward pass, where each chunk of W gives

    G = g (exp(z_c - lse) - onehot_c),   dE += G W_c,   dW_c += G^T E,

with dW written into its final place. Nothing of size N x V exists at any time, and dW only in the backward pass.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.linear_ce.chunks import (
    head_chunk,
    logit_gradient,
    rows_back,
    valid_rows_first,
    vocab_starts,
)


@jax.custom_vjp
def linear_cross_entropy_trainable(
    hidden: Float[Array, "N D"],
    weight: Float[Array, "V D"],
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
) -> Float[Array, ""]:
    """Sum of the masked rows' losses (float32), differentiable in ``hidden`` and ``weight``."""
    return _forward(hidden, weight, targets, mask)[0]


def _forward(hidden, weight, targets, mask):
    rows = valid_rows_first(hidden, targets, mask)

    def one_chunk(i, carry):
        loss_sum, lse_rows = carry
        start = i * rows.chunk
        h, y, keep = rows.take(start)
        lse = _log_sum_exp(h, weight)
        picked = jnp.sum(h * weight[y].astype(jnp.float32), axis=1)
        loss_sum += jnp.sum(jnp.where(keep, lse - picked, 0.0))
        return loss_sum, lax.dynamic_update_slice_in_dim(lse_rows, lse, start, axis=0)

    start_state = (jnp.float32(0), jnp.zeros(rows.hidden.shape[0]))
    loss_sum, lse_rows = lax.fori_loop(0, rows.n_chunks, one_chunk, start_state)
    return loss_sum, (hidden, weight, targets, mask, lse_rows)


def _backward(residuals, d_loss):
    hidden, weight, targets, mask, lse_rows = residuals
    rows = valid_rows_first(hidden, targets, mask)
    chunk, starts = vocab_starts(weight)

    def over_vocabulary(carry, start):
        d_rows, d_weight = carry
        wide, first, fresh = head_chunk(weight, start, chunk)

        def over_rows(i, inner):
            d_rows, d_wide = inner
            at = i * rows.chunk
            h, g = logit_gradient(rows, lse_rows, at, wide, first)
            g = jnp.where(fresh, g * d_loss, 0.0)
            d_h = lax.dynamic_slice_in_dim(d_rows, at, rows.chunk) + g @ wide
            return lax.dynamic_update_slice_in_dim(d_rows, d_h, at, axis=0), d_wide + g.T @ h

        d_rows, d_wide = lax.fori_loop(0, rows.n_chunks, over_rows, (d_rows, jnp.zeros_like(wide)))
        d_wide += lax.dynamic_slice_in_dim(d_weight, first, chunk)
        return (d_rows, lax.dynamic_update_slice_in_dim(d_weight, d_wide, first, axis=0)), None

    zeros = (jnp.zeros_like(rows.hidden), jnp.zeros(weight.shape, jnp.float32))
    (d_rows, d_weight), _ = lax.scan(over_vocabulary, zeros, starts)
    return rows_back(d_rows, rows.order, hidden.dtype), d_weight.astype(weight.dtype), None, None


linear_cross_entropy_trainable.defvjp(_forward, _backward)


def _log_sum_exp(h, weight):
    chunk, starts = vocab_starts(weight)

    def step(carry, start):
        top, total = carry
        wide, _, fresh = head_chunk(weight, start, chunk)
        logits = jnp.where(fresh, h @ wide.T, -jnp.inf)
        new_top = jnp.maximum(top, logits.max(axis=1))
        total = total * jnp.exp(top - new_top) + jnp.exp(logits - new_top[:, None]).sum(axis=1)
        return (new_top, total), None

    (top, total), _ = lax.scan(step, (jnp.full(h.shape[0], -jnp.inf), jnp.zeros(h.shape[0])), starts)
    return top + jnp.log(total)
