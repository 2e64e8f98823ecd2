"""``y = x W^T`` for the few rows of cached decoding, where reading the weight is all the work.

Widening the weight first costs 1% where rows are many; with one row it is nearly all there is to do. Here packed codes
are multiplied as they are unpacked and the affine map is applied to sums of a block:

    y[n, o] = sum_q ( scale[o, q] sum_{i in q} code[o, i] x[n, i]  +  minimum[o, q] sum_{i in q} x[n, i] )

Ternary codes are taken as they are stored, 0, 1 and 2, with -scale for their minimum.

The codes of a word are taken one position at a time, so that every step runs along contiguous words and nothing
wider than a row of words is written (measured on two AVX2 cores: 0.26 ns a weight against 1.75).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Float

from edgejax.core.arrays import Array
from edgejax.quant.array import TERNARY, QuantizedArray, Weight, codes_per_word, dequantize

FEW_ROWS = 4  # beyond, widening once for all rows is faster


def few_rows_matmul(x: Float[Array, "N I"], weight: Weight) -> Float[Array, "N O"]:
    """``x [N, I]`` times the transpose of ``weight [O, I]``, in float32; meant for N up to ``FEW_ROWS``.

    Weights that are not packed codes in blocks of whole words are widened inside the product (XLA fuses the two for a
    matrix ``[N, I]``, not for a longer shape).

    Example:
      >>> few_rows_matmul(jnp.ones((1, 3)), jnp.ones((2, 3))).tolist()
      [[3.0, 3.0]]
    """
    x = x.astype(jnp.float32)
    if (
        isinstance(weight, QuantizedArray)
        and weight.bits < 8
        and weight.block % codes_per_word(weight.bits) == 0
    ):
        return jax.vmap(lambda row: _packed(row, weight))(x)
    return x @ dequantize(weight).T


def _packed(x: Float[Array, " I"], weight: QuantizedArray) -> Float[Array, " O"]:
    n_out, n_words = weight.codes.shape
    n_codes = codes_per_word(weight.bits)
    minimum = -weight.scale if weight.bits == TERNARY else weight.minimum
    n_blocks = weight.scale.shape[-1]
    # Without the barrier XLA makes x again (norms, gates) for every output that it is multiplied into.
    by_position = jax.lax.optimization_barrier(x.reshape(n_words, n_codes).T)
    words = jnp.asarray(weight.codes)
    products = jnp.zeros((n_out, n_words), jnp.float32)
    for position, factors in enumerate(by_position):
        codes = (words >> weight.bits * position) & (2**weight.bits - 1)
        products += codes.astype(jnp.int32).astype(jnp.float32) * factors
    sums = products.reshape(n_out, n_blocks, -1).sum(axis=-1)
    y = (sums * weight.scale.astype(jnp.float32)).sum(axis=-1)
    if minimum is not None:
        y += minimum.astype(jnp.float32) @ x.reshape(n_blocks, -1).sum(axis=-1)
    return y
