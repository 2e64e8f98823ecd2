"""Cross-entropy of a linear head with all logits in memory.

loss = sum over rows n with mask:  logsumexp_v(h[n] . W[v]) - h[n] . W[y[n]]
"""

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.quant.array import Weight, dequantize


def linear_cross_entropy_reference(
    hidden: Float[Array, "N D"],
    weight: Weight,
    targets: Int[Array, " N"],
    mask: Bool[Array, " N"],
) -> Float[Array, ""]:
    """Sum of the masked rows' losses, float32; ``weight`` is ``[V, D]``."""
    logits = hidden.astype(jnp.float32) @ dequantize(weight).T
    picked = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return jnp.sum(jnp.where(mask, jax.nn.logsumexp(logits, axis=1) - picked, 0.0))
