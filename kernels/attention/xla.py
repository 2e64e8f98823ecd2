"""Causal attention in memory linear in T, forward and backward, in portable XLA.

A query block sees whole rows of scores for the keys its mask leaves, so a plain softmax serves and the upper
triangle is never computed. Saved for the backward pass: q, k, v, out and the log-sum-exp of each row; the
probabilities are made again (Dao et al. 2022, arXiv 2205.14135, algorithm 4):

    P = exp(S - lse),  dV += P^T dO,  dS = P * (dO V^T - rowsum(dO * O)),  dQ = scale dS K,  dK += scale dS^T Q

Heads that share keys are laid side by side as rows of one matrix, so that every product is a plain batched
matmul ``[B K, G Q, C] x [B K, S, C]``: on CPU that is 2.5 times faster than an einsum over grouped heads.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.attention.reference import visible
from edgejax.kernels.attention.tiles import Bundle, padded_length, plan_bundles

MASKED = -1e30  # finite: a row always sees itself, so no row is all masked, and exp gives exact zeros


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def attention_xla(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None,
    use_window: Bool[Array, ""] | None,
    scale: float,
    window: int | None,
) -> Float[Array, "B T H C"]:
    """Causal attention inside segments; see ``edgejax.kernels.attention.attention``."""
    return _forward(q, k, v, segment_ids, use_window, scale, window)[0]


def _forward(q, k, v, segment_ids, use_window, scale, window):
    run = partial(_forward_static, q, k, v, segment_ids, scale)
    out, lse = _by_kind(run, use_window, window)
    # Named so that a remat policy may keep the two and not run this forward pass again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segment_ids, use_window, out, lse)


def _backward(scale, window, residuals, d_out):
    q, k, v, segment_ids, use_window, out, lse = residuals
    run = partial(_backward_static, q, k, v, segment_ids, out, lse, d_out, scale)
    dq, dk, dv = _by_kind(run, use_window, window)
    return dq, dk, dv, None, None


attention_xla.defvjp(_forward, _backward)


def attention_keeping_xla(
    q, k, v, segment_ids, use_window, scale, window
) -> tuple[Float[Array, "B T H C"], Float[Array, "B_K G padded"]]:
    """What ``attention_xla`` gives and the log-sum-exp of each row: all that its backward pass needs of it."""
    out, residuals = _forward(q, k, v, segment_ids, use_window, scale, window)
    return out, residuals[-1]


@partial(jax.custom_vjp, nondiff_argnums=(7, 8))
def attention_recalled_xla(
    q, k, v, segment_ids, use_window, out, lse, scale: float, window: int | None
) -> Float[Array, "B T H C"]:
    """``out``, with the derivative in q, k and v of the attention that gave ``out`` and ``lse``."""
    return out


def _recall(q, k, v, segment_ids, use_window, out, lse, scale, window):
    return out, (q, k, v, segment_ids, use_window, out, lse)


def _recalled_backward(scale, window, residuals, d_out):
    return *_backward(scale, window, residuals, d_out), None, None


attention_recalled_xla.defvjp(_recall, _recalled_backward)


def _by_kind(run, use_window, window):
    """A stack may mix sliding and global layers: the layer's own flag picks the program at run time."""
    if window is None or use_window is None:
        return run(window)
    return lax.cond(use_window, lambda: run(window), lambda: run(None))


def _forward_static(q, k, v, segment_ids, scale, window):
    length, n_heads = q.shape[1], q.shape[2]
    block, padded = padded_length(length)
    rows = _RowLayout(q.shape, k.shape[2], padded)
    qh, kh, vh = rows.queries(q), rows.keys(k), rows.keys(v)
    segments = _pad_rows(segment_ids, padded)
    outs, lses = [], []
    for bundle in plan_bundles(padded, block, window):
        keys = slice(bundle.key_start, bundle.key_stop)
        kb, vb = kh[:, keys], vh[:, keys]

        def one_block(start, kb=kb, vb=vb, bundle=bundle):
            qb = lax.dynamic_slice_in_dim(qh, start, block, axis=2)
            scores = _scores(qb, kb, scale, _mask(start, block, bundle, window, segments, rows))
            top = scores.max(axis=-1, keepdims=True)
            weights = jnp.exp(scores - top)
            total = weights.sum(axis=-1, keepdims=True)
            out = _rows_times(weights, vb) / total
            return out, (top + jnp.log(total))[..., 0]

        out, lse = _over_blocks(one_block, bundle, block)
        outs.append(out)
        lses.append(lse)
    out = rows.back(jnp.concatenate(outs, axis=2), n_heads)[:, :length]
    return out.astype(q.dtype), jnp.concatenate(lses, axis=2)


def _backward_static(q, k, v, segment_ids, out, lse, d_out, scale, window):
    length = q.shape[1]
    block, padded = padded_length(length)
    rows = _RowLayout(q.shape, k.shape[2], padded)
    qh, kh, vh, doh = rows.queries(q), rows.keys(k), rows.keys(v), rows.queries(d_out)
    delta = jnp.sum(doh * rows.queries(out), axis=-1)
    segments = _pad_rows(segment_ids, padded)
    dq_parts, dk, dv = [], jnp.zeros_like(kh), jnp.zeros_like(vh)
    for bundle in plan_bundles(padded, block, window):
        keys = slice(bundle.key_start, bundle.key_stop)
        kb, vb = kh[:, keys], vh[:, keys]

        def one_block(start, kb=kb, vb=vb, bundle=bundle):
            qb, dob, lse_b, delta_b = (
                lax.dynamic_slice_in_dim(a, start, block, axis=2) for a in (qh, doh, lse, delta)
            )
            scores = _scores(qb, kb, scale, _mask(start, block, bundle, window, segments, rows))
            p = jnp.exp(scores - lse_b[..., None])
            dp = _rows_times_transposed(dob, vb)
            ds = p * (dp - delta_b[..., None]) * scale
            return _rows_times(ds, kb), _columns_times(ds, qb), _columns_times(p, dob)

        dq_b, dk_b, dv_b = _over_blocks_summing_keys(one_block, bundle, block)
        dq_parts.append(dq_b)
        dk, dv = dk.at[:, keys].add(dk_b), dv.at[:, keys].add(dv_b)
    dq = rows.back(jnp.concatenate(dq_parts, axis=2), q.shape[2])[:, :length]
    return (
        dq.astype(q.dtype),
        rows.keys_back(dk)[:, :length].astype(k.dtype),
        rows.keys_back(dv)[:, :length].astype(v.dtype),
    )


class _RowLayout:
    """Between ``[B, T, H, C]`` and the matmul layout ``[B K, G, T, C]`` / ``[B K, T, C]`` (float32)."""

    def __init__(self, q_shape, n_kv: int, padded: int):
        self.batch, self.length, n_heads, self.width = q_shape
        self.n_kv, self.group, self.padded = n_kv, n_heads // n_kv, padded

    def queries(self, x):
        x = _pad_rows(x.astype(jnp.float32), self.padded)
        x = x.reshape(self.batch, self.padded, self.n_kv, self.group, self.width)
        return x.transpose(0, 2, 3, 1, 4).reshape(-1, self.group, self.padded, self.width)

    def keys(self, x):
        x = _pad_rows(x.astype(jnp.float32), self.padded)
        return x.transpose(0, 2, 1, 3).reshape(-1, self.padded, self.width)

    def back(self, x, n_heads):
        x = x.reshape(self.batch, n_heads, self.padded, self.width)
        return x.transpose(0, 2, 1, 3)

    def keys_back(self, x):
        return self.back(x, self.n_kv)


def _pad_rows(x, padded: int):
    if x is None or x.shape[1] == padded:
        return x
    return jnp.pad(x, ((0, 0), (0, padded - x.shape[1])) + ((0, 0),) * (x.ndim - 2))


def _mask(start, block: int, bundle: Bundle, window, segments, rows: _RowLayout):
    """Float32 ``[B K or 1, 1, Q, S]`` added to scores: 0 for keys the block from row ``start`` sees, else MASKED.

    Added, not selected: XLA would hoist the select's constant operand out of the layer scan at full size.
    """
    key_index = jnp.arange(bundle.key_start, bundle.key_stop)
    seen = visible(start + jnp.arange(block), key_index, window)[None, None]
    if segments is None:
        return jnp.where(seen, 0.0, MASKED)
    own = lax.dynamic_slice_in_dim(segments, start, block, axis=1)
    same = own[:, :, None] == segments[:, None, bundle.key_start : bundle.key_stop]
    return jnp.repeat(jnp.where(same[:, None] & seen, 0.0, MASKED), rows.n_kv, axis=0)


def _scores(qb, kb, scale: float, mask):
    return _rows_times_transposed(qb, kb) * scale + mask


def _rows_times_transposed(x, keys):
    """``[BK, G, Q, C] x [BK, S, C] -> [BK, G, Q, S]`` as one batched matmul over G Q rows."""
    flat = x.reshape(x.shape[0], -1, x.shape[-1])
    return jnp.einsum("nqc,nsc->nqs", flat, keys).reshape(*x.shape[:3], keys.shape[1])


def _rows_times(weights, values):
    """``[BK, G, Q, S] x [BK, S, C] -> [BK, G, Q, C]``."""
    flat = weights.reshape(weights.shape[0], -1, weights.shape[-1])
    return jnp.einsum("nqs,nsc->nqc", flat, values).reshape(*weights.shape[:3], values.shape[-1])


def _columns_times(weights, x):
    """``[BK, G, Q, S] x [BK, G, Q, C] -> [BK, S, C]``, summed over the group's rows."""
    flat_w = weights.reshape(weights.shape[0], -1, weights.shape[-1])
    return jnp.einsum("nqs,nqc->nsc", flat_w, x.reshape(x.shape[0], -1, x.shape[-1]))


def _over_blocks(one_block, bundle: Bundle, block: int):
    """Outputs of all blocks of a bundle, joined along the row axis 2."""
    if bundle.n_blocks == 1:
        return one_block(bundle.query_start)
    starts = bundle.query_start + block * jnp.arange(bundle.n_blocks)
    return jax.tree.map(_join_rows, lax.map(one_block, starts))


def _over_blocks_summing_keys(one_block, bundle: Bundle, block: int):
    if bundle.n_blocks == 1:
        return one_block(bundle.query_start)

    def add(carry, start):
        dq, dk, dv = one_block(start)
        return (carry[0] + dk, carry[1] + dv), dq

    starts = bundle.query_start + block * jnp.arange(bundle.n_blocks)
    shapes = jax.eval_shape(one_block, starts[0])
    zeros = tuple(jnp.zeros(s.shape, s.dtype) for s in shapes[1:])
    (dk, dv), dq = lax.scan(add, zeros, starts)
    return _join_rows(dq), dk, dv


def _join_rows(stacked):
    """``[blocks, BK, G, Q, ...] -> [BK, G, blocks * Q, ...]``."""
    moved = jnp.moveaxis(stacked, 0, 2)
    return moved.reshape(*moved.shape[:2], -1, *moved.shape[4:])
