"""The op that models call."""

from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.kernels.attention.xla import attention_keeping_xla, attention_recalled_xla, attention_xla


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


def attention_keeping(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    use_window: Bool[Array, ""] | None = None,
) -> tuple[Float[Array, "B T H C"], Float[Array, "..."]]:
    """``attention``, and the log-sum-exp of its rows (float32, in the layout that ``attention_recalled`` takes).

    For a caller that writes its own backward pass and does not want to run attention in it again; not differentiable.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> x = jnp.linspace(0.0, 1.0, 64).reshape(1, 4, 2, 8)
      >>> kept = attention_keeping(x, x, x, scale=1.0)
      >>> again = jax.grad(lambda q: attention_recalled(q, x, x, *kept, scale=1.0).sum())(x)
      >>> first = jax.grad(lambda q: attention(q, x, x, scale=1.0).sum())(x)
      >>> bool(jnp.allclose(again, first, atol=1e-6))
      True
    """
    return attention_keeping_xla(q, k, v, segment_ids, use_window, scale, window)


def attention_recalled(
    q: Float[Array, "B T H C"],
    k: Float[Array, "B T K C"],
    v: Float[Array, "B T K C"],
    out: Float[Array, "B T H C"],
    lse: Float[Array, "..."],
    segment_ids: Int[Array, "B T"] | None = None,
    *,
    scale: float,
    window: int | None = None,
    use_window: Bool[Array, ""] | None = None,
) -> Float[Array, "B T H C"]:
    """``out`` as it is given, with the derivative of ``attention`` in q, k and v and without running it.

    Args:
      q, k, v: as in the call of ``attention_keeping`` that gave ``out`` and ``lse``, or near: they may have waited in
        fewer bits.
      out, lse: what it gave.
      segment_ids, scale, window, use_window: as there.
    """
    return attention_recalled_xla(q, k, v, segment_ids, use_window, out, lse, scale, window)
