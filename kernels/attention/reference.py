"""Attention as the equation says it, with the whole score matrix in memory.

    out[t, h] = sum_s softmax_s(scale * q[t, h] . k[s, h // G] + mask[t, s]) v[s, h // G],   G = H / K

(Vaswani et al. 2017, arXiv 1706.03762, equation 1; grouped heads: Ainslie et al. 2023, arXiv 2305.13245.)
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array


def visible(
    query_index: Int[Array, " T"],
    key_index: Int[Array, " S"],
    window: int | None,
) -> Bool[Array, "T S"]:
    """Which keys a query sees: itself and those before it, at most ``window`` of them."""
    distance = query_index[:, None] - key_index[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def attention_reference(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
) -> Float[Array, "B T H C"]:
    """Causal attention inside segments; every score is kept, so memory is quadratic in T."""
    batch, length, n_heads, width = q.shape
    n_kv = k.shape[2]
    grouped = q.reshape(batch, length, n_kv, n_heads // n_kv, width).astype(jnp.float32)
    scores = scale * jnp.einsum("btkgc,bskc->bkgts", grouped, k.astype(jnp.float32))
    index = jnp.arange(length)
    seen = visible(index, index, window)[None]
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    probabilities = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bkgts,bskc->btkgc", probabilities, v.astype(jnp.float32))
    return out.reshape(q.shape).astype(q.dtype)
