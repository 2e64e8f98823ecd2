"""Products with a frozen weight that stays packed: forward and backward read the same codes.

The derivative rules are our own for two reasons. Autodiff would keep the *widened* weight of every layer of a
``scan`` as a residual, a float32 copy of the whole model; here the residual is the packed weight, which ``scan``
forwards without a copy, and the weight has no cotangent at all. And a gradient of shape ``[O, R]`` with a small
R, written as ``dy^T (x A^T)``, runs ten times slower on CPU than its transpose ``(x A^T)^T dy``.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Float

from edgejax.core.arrays import Array
from edgejax.kernels.quant_matmul.few_rows import FEW_ROWS, few_rows_matmul
from edgejax.quant.array import Weight, dequantize


@jax.custom_vjp
def quant_matmul_xla(x: Float[Array, "... I"], weight: Weight) -> Float[Array, "... O"]:
    """``x [..., I]`` times the transpose of a frozen ``weight [O, I]``, accumulated in float32.

    Differentiable in ``x`` only: dx = dy W, from the same codes. The result has the dtype of ``x``.
    """
    return _product(x, weight, weight_axis=1)


def _forward(x, weight):
    return _product(x, weight, weight_axis=1), weight


def _backward(weight, dy):
    return _product(dy, weight, weight_axis=0), None


quant_matmul_xla.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def lora_matmul_xla(
    x: Float[Array, "... I"],
    weight: Weight,
    lora_a: Float[Array, "R I"],
    lora_b: Float[Array, "O R"],
    scaling: float,
) -> Float[Array, "... O"]:
    """``x (W + scaling B A)^T`` with ``W`` frozen; differentiable in ``x``, ``A`` and ``B``.

    The adapter is added to the widened weight, which is made for this product anyhow: that costs
    ``2 O I R`` FLOP and no array of the size of ``y``, where the two-step form ``x W^T + (x A^T) B^T`` costs
    ``2 N R (I + O)`` and two more arrays ``[N, O]``. Only ``x`` is kept for the backward pass.
    """
    return _lora_forward(x, weight, lora_a, lora_b, scaling)[0]


def _lora_forward(x, weight, lora_a, lora_b, scaling):
    y = _dot(x, _adapted(weight, lora_a, lora_b, scaling, x.dtype), 1)
    return y, (x, weight, lora_a, lora_b)


def _lora_backward(scaling, residuals, dy):
    x, weight, lora_a, lora_b = residuals
    dx = _dot(dy, _adapted(weight, lora_a, lora_b, scaling, dy.dtype), 0)
    d_a = _rows_dot(_dot(dy, lora_b, 0) * scaling, x)
    d_b = _rows_dot(_dot(x, lora_a, 1) * scaling, dy).T
    return dx, None, d_a.astype(lora_a.dtype), d_b.astype(lora_b.dtype)


def _adapted(weight, lora_a, lora_b, scaling: float, dtype):
    """``W + scaling B A``, widened, ``[O, I]``."""
    update = jnp.dot(
        lora_b.astype(jnp.float32), lora_a.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    return (dequantize(weight) + scaling * update).astype(dtype)


lora_matmul_xla.defvjp(_lora_forward, _lora_backward)


def _product(x, weight, weight_axis: int):
    if weight_axis == 1 and x.size <= FEW_ROWS * x.shape[-1]:
        rows = few_rows_matmul(x.reshape(-1, x.shape[-1]), weight)
        return rows.reshape(*x.shape[:-1], -1).astype(x.dtype)
    return _dot(x, dequantize(weight, x.dtype), weight_axis)


def _dot(x, matrix, matrix_axis: int):
    """Contract the last axis of ``x`` with one axis of a matrix, in float32; dtype of ``x``."""
    contraction = (((x.ndim - 1,), (matrix_axis,)), ((), ()))
    wide = jax.lax.dot_general(x, matrix.astype(x.dtype), contraction, preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


def _rows_dot(left, right):
    """``left^T right`` over all leading axes: ``[..., M], [..., N] -> [M, N]``, float32."""
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
