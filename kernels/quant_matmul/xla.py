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

WIDE_ELEMENTS = 4 * 2**20  # a float32 matrix of 16 MiB is widened at once; a larger one
PART_ELEMENTS = 2**20  # in parts of about 4 MiB


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
    y = _by_rows(x, (weight, lora_b), partial(_adapted, lora_a=lora_a, scaling=scaling, dtype=x.dtype), 1)
    return y, (x, weight, lora_a, lora_b)


def _lora_backward(scaling, residuals, dy):
    x, weight, lora_a, lora_b = residuals
    dx = _by_rows(dy, (weight, lora_b), partial(_adapted, lora_a=lora_a, scaling=scaling, dtype=dy.dtype), 0)
    d_a = _rows_dot(_dot(dy, lora_b, 0) * scaling, x)
    d_b = _rows_dot(_dot(x, lora_a, 1) * scaling, dy).T
    return dx, None, d_a.astype(lora_a.dtype), d_b.astype(lora_b.dtype)


def _adapted(rows, *, lora_a, scaling: float, dtype):
    """``W + scaling B A``, widened, for rows ``(W [o, I], B [o, R])``."""
    weight, lora_b = rows
    update = jnp.dot(
        lora_b.astype(jnp.float32), lora_a.astype(jnp.float32), preferred_element_type=jnp.float32
    )
    return (dequantize(weight) + scaling * update).astype(dtype)


lora_matmul_xla.defvjp(_lora_forward, _lora_backward)


def _product(x, weight, weight_axis: int):
    if weight_axis == 1 and x.size <= FEW_ROWS * x.shape[-1]:
        rows = few_rows_matmul(x.reshape(-1, x.shape[-1]), weight)
        return rows.reshape(*x.shape[:-1], -1).astype(x.dtype)
    return _by_rows(x, weight, partial(dequantize, dtype=x.dtype), weight_axis)


def _by_rows(x, rows, widen, matrix_axis: int):
    """``_dot`` with ``widen(rows)``, of which at most ``WIDE_ELEMENTS`` exist at a time where the matrix is larger.

    Args:
      x: contracted along its last axis.
      rows: arrays or packed weights ``[O, ...]``.
      widen: from some of the rows to that part of the matrix ``[o, I]``.
      matrix_axis: the axis that is contracted.
    """
    shape = jax.eval_shape(widen, rows).shape
    n_parts = _parts(*shape)
    if n_parts == 1:
        return _dot(x, widen(rows), matrix_axis)
    size = shape[0] // n_parts

    def part(i):
        cut = partial(jax.lax.dynamic_slice_in_dim, start_index=i * size, slice_size=size, axis=0)
        return widen(jax.tree.map(cut, rows))

    if matrix_axis == 1:

        def put(i, whole):
            return jax.lax.dynamic_update_slice_in_dim(whole, _dot(x, part(i), 1), i * size, axis=-1)

        return jax.lax.fori_loop(0, n_parts, put, jnp.zeros((*x.shape[:-1], shape[0]), x.dtype))

    def add(i, total):
        own = jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=x.ndim - 1)
        return total + _dot(own.astype(jnp.float32), part(i), 0)

    total = jax.lax.fori_loop(0, n_parts, add, jnp.zeros((*x.shape[:-1], shape[1]), jnp.float32))
    return total.astype(x.dtype)


def _parts(n_rows: int, n_columns: int) -> int:
    """Equal parts that a matrix is widened in: 1 up to ``WIDE_ELEMENTS``, or if no number near the wanted one divides.

    >>> _parts(1536, 576), _parts(4864, 896), _parts(11008, 2048)
    (1, 8, 32)
    """
    wanted = -(-n_rows * n_columns // PART_ELEMENTS)
    if n_rows * n_columns <= WIDE_ELEMENTS:
        return 1
    return next((n for n in range(wanted, min(4 * wanted, n_rows) + 1) if n_rows % n == 0), 1)


def _dot(x, matrix, matrix_axis: int):
    """Contract the last axis of ``x`` with one axis of a matrix, in float32; dtype of ``x``."""
    contraction = (((x.ndim - 1,), (matrix_axis,)), ((), ()))
    wide = jax.lax.dot_general(x, matrix.astype(x.dtype), contraction, preferred_element_type=jnp.float32)
    return wide.astype(x.dtype)


def _rows_dot(left, right):
    """``left^T right`` over all leading axes: ``[..., M], [..., N] -> [M, N]``, float32."""
    left, right = left.reshape(-1, left.shape[-1]), right.reshape(-1, right.shape[-1])
    return jax.lax.dot_general(left, right, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
