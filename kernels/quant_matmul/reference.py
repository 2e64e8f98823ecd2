"""y = x W^T with W widened first: the plain meaning of the op.

y[n, o] = sum_i x[n, i] * W[o, i],     W = code * scale + minimum
"""

import jax.numpy as jnp
from jaxtyping import Float

from edgejax.core.arrays import Array
from edgejax.quant.array import Weight, dequantize


def quant_matmul_reference(x: Float[Array, "... I"], weight: Weight) -> Float[Array, "... O"]:
    """``x [..., I]`` times the transpose of ``weight [O, I]``, in float32."""
    return jnp.einsum("...i,oi->...o", x.astype(jnp.float32), dequantize(weight))
