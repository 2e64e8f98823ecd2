"""The op that models call."""

from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.attention.xla import attention_xla


def attention(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    use_window: Bool[Array, ""] | None = None,
) -> Float[Array, "B T H C"]:
    """Causal attention; a query sees keys of its own segment at or before it, memory linear in T.

    Args:
      q: queries; H is a multiple of K, consecutive groups of H / K heads share a key/value head.
      k, v: keys and values.
      segment_ids: documents packed into a row; None: one document a row.
      scale: what q . k is multiplied with (usually C ** -0.5).
      window: keys a query sees, itself included; None: all before it.
      use_window: for a stack that mixes sliding and global layers: this layer's kind, decided at run time.

    Returns:
      As ``q`` in shape and dtype; products and softmax in float32.

    Example:
      >>> import jax.numpy as jnp
      >>> x = jnp.ones((1, 4, 2, 8))
      >>> attention(x, x, x, scale=8**-0.5).shape
      (1, 4, 2, 8)
    """
    return attention_xla(q, k, v, segment_ids, use_window, scale, window)
