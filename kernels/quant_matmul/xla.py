"""Products with a frozen weight that stays packed: forward and backward read the same codes.

The derivative rule is our own for one reason: autodiff would keep the *widened* weight of every layer of a
``scan`` as a residual, a float32 copy of the whole model. Here the residual is the packed weight itself, which
``scan`` forwards without a copy, and the weight has no cotangent at all.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from edgejax.core.arrays import Array
from edgejax.quant.array import Weight, dequantize


@jax.custom_vjp
def quant_matmul_xla(x: Float[Array, "... I"], weight: Weight) -> Float[Array, "... O"]:
    """``x [..., I]`` times the transpose of a frozen ``weight [O, I]``, accumulated in float32.

    Differentiable in ``x`` only: dx = dy W, from the same codes. The result has the dtype of ``x``.
    """
    return _product(x, weight, contract_weight_axis=1)


def _product(x, weight, contract_weight_axis: int):
    wide = dequantize(weight, x.dtype)
    contraction = (((x.ndim - 1,), (contract_weight_axis,)), ((), ()))
    return jax.lax.dot_general(x, wide, contraction, preferred_element_type=jnp.float32).astype(x.dtype)


def _forward(x, weight):
    return _product(x, weight, contract_weight_axis=1), weight


def _backward(weight, dy):
    return _product(dy, weight, contract_weight_axis=0), None


quant_matmul_xla.defvjp(_forward, _backward)
