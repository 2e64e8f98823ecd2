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
    """``x W^T + scaling (x A^T) B^T`` with ``W`` frozen; differentiable in ``x``, ``A`` and ``B``.

    Only ``x`` is kept for the backward pass (``x A^T`` costs R / O of the product and is made again).
    """
    return _lora_forward(x, weight, lora_a, lora_b, scaling)[0]


def _lora_forward(x, weight, lora_a, lora_b, scaling):
    low = _dot(x, lora_a, 1) * scaling
    y = _product(x, weight, weight_axis=1) + _dot(low, lora_b, 1)
    return y, (x, weight, lora_a, lora_b)


def _lora_backward(scaling, residuals, dy):
    x, weight, lora_a, lora_b = residuals
    d_low = _dot(dy, lora_b, 0) * scaling
    dx = _product(dy, weight, weight_axis=0) + _dot(d_low, lora_a, 0)
    d_a = _rows_dot(d_low, x)
    d_b = _rows_dot(_dot(x, lora_a, 1) * scaling, dy).T
    return dx, None, d_a.astype(lora_a.dtype), d_b.astype(lora_b.dtype)


lora_matmul_xla.defvjp(_lora_forward, _lora_backward)


def _product(x, weight, weight_axis: int):
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
