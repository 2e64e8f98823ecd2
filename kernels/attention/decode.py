"""Attention of one new position over cached keys and values: the last row of ``attention_reference``.

    out[b, h] = sum_s softmax_s(scale * q[b, h] . k[b, h // G, s]) v[b, h // G, s],   s <= position,   G = H / K

The keys beyond ``position`` are whatever the buffer holds; they are masked, so the buffer may be longer than the
text. Heads before positions (``[B, K, S, C]``) make both products plain batched matmuls, as in ``xla.py``.
"""

import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.attention.xla import MASKED


def decode_attention(
    q: Float[Array, "B H C"],
    keys: Float[Array, "B K S C"],
    values: Float[Array, "B K S C"],
    position: Int[Array, ""],
    *,
    scale: float,
    window: int | None = None,
    use_window: Bool[Array, ""] | None = None,
) -> Float[Array, "B H C"]:
    """What the query at ``position`` takes from positions ``0 .. position``.

    Args:
      q: queries of one position; H is a multiple of K.
      keys, values: cached; position ``position`` must have been written, later ones may hold anything finite.
      position: int32 scalar, the same for all rows.
      scale: what q . k is multiplied with.
      window: keys the query sees, itself included; None: all.
      use_window: for a stack that mixes sliding and global layers: this layer's kind, decided at run time.

    Returns:
      As ``q`` in shape and dtype; products and softmax in float32.

    Example:
      >>> cache = jnp.ones((1, 2, 16, 8))
      >>> decode_attention(jnp.ones((1, 4, 8)), cache, cache, jnp.int32(3), scale=8**-0.5).shape
      (1, 4, 8)
    """
    batch, n_heads, width = q.shape
    n_kv, capacity = keys.shape[1:3]
    seen = jnp.arange(capacity) <= position
    if window is not None:
        near = jnp.arange(capacity) > position - window
        seen &= near if use_window is None else near | ~use_window
    grouped = q.reshape(batch * n_kv, n_heads // n_kv, width).astype(jnp.float32)
    flat_keys, flat_values = (
        x.reshape(batch * n_kv, capacity, width).astype(jnp.float32) for x in (keys, values)
    )
    scores = jnp.where(seen, scale * jnp.einsum("ngc,nsc->ngs", grouped, flat_keys), MASKED)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    out = jnp.einsum("ngs,nsc->ngc", weights, flat_values) / weights.sum(axis=-1, keepdims=True)
    return out.reshape(q.shape).astype(q.dtype)
