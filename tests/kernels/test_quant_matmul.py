"""Products with packed weights against the same products in float64: values, gradients, scans, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgejax.kernels.quant_matmul import lora_matmul, quant_matmul, quant_matmul_reference
from edgejax.kernels.quant_matmul.few_rows import FEW_ROWS
from edgejax.measure.memory import xla_memory
from edgejax.quant import QuantizedArray, quantize_int4, quantize_int8, quantize_ternary

N_OUT, N_IN, RANK = 24, 96, 3
SCALING = 1.7
BF16_ROUNDING = 2.0**-8  # of 8 bits, to nearest, relative


def symmetric_int4(weights):
    """4 bits around 8 without a minimum; packing does not make it, the type allows it."""
    return QuantizedArray(quantize_int4(weights).codes, quantize_int4(weights).scale, None, bits=4)


def affine_int8(weights):
    """8 bits with a minimum, as GGUF's Q5_1 and Q5_K are held."""
    symmetric = quantize_int8(weights)
    return QuantizedArray(
        symmetric.codes, symmetric.scale, (0.3 * symmetric.scale).astype(np.float16), bits=8
    )


FORMS = {
    "int8": quantize_int8,
    "int4": quantize_int4,
    "int8 with minimum": affine_int8,
    "int4 without minimum": symmetric_int4,
    "int4 in blocks of 16": functools.partial(quantize_int4, block=16),
    "ternary": quantize_ternary,
    "ternary in blocks of 24": functools.partial(quantize_ternary, block=24),
    "bf16": lambda weights: jnp.asarray(weights, jnp.bfloat16),
    "f32": lambda weights: weights,
}
EVERY_FORM = pytest.mark.parametrize("form", FORMS)
SHAPES = [(), (1,), (FEW_ROWS,), (FEW_ROWS + 1,), (2, 2), (3, 5), (1, 1, 1), (2, 1, 2), (2, 4, 3)]
EVERY_SHAPE = pytest.mark.parametrize("lead", SHAPES, ids=str)
pytestmark = pytest.mark.quick


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def weight_of(form, *lead):
    return FORMS[form](random(*lead, N_OUT, N_IN, seed=1))


def wide(weight):
    """float64 weights from the documented layout of the codes."""
    if not isinstance(weight, QuantizedArray):
        return np.asarray(weight, np.float64)
    codes = np.asarray(weight.codes)
    if weight.bits == 4:
        codes = np.stack([(codes >> (4 * i)) & 15 for i in range(8)], axis=-1).reshape(weight.shape)
    if weight.bits == 2:
        codes = np.stack([(codes >> (2 * i)) & 3 for i in range(16)], axis=-1).reshape(weight.shape) - 1.0
    scale, minimum = (
        0 if x is None else np.repeat(np.asarray(x, np.float64), weight.block, axis=-1)
        for x in (weight.scale, weight.minimum)
    )
    return codes * scale + minimum


def rows(x):
    """Leading axes joined, float64."""
    return np.asarray(x, np.float64).reshape(-1, x.shape[-1])


def assert_close(actual, expected, relative=1e-5):
    """No element is off by more than ``relative`` of the largest one."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


@jax.jit
def run(x, weight, dy):
    """The product and the gradient of ``x``."""
    y, pull_back = jax.vjp(lambda x: quant_matmul(x, weight), x)
    return y, *pull_back(dy)


@jax.jit
def run_lora(x, weight, lora_a, lora_b, dy):
    """The product and the gradients of ``x``, ``A`` and ``B``."""
    y, pull_back = jax.vjp(lambda x, a, b: lora_matmul(x, weight, a, b, SCALING), x, lora_a, lora_b)
    return y, *pull_back(dy)


def adapter(*lead):
    return random(*lead, RANK, N_IN, seed=2), random(*lead, N_OUT, RANK, seed=3)


# --- one product ------------------------------------------------------------------------------------------


def assert_product_and_gradient(weight, lead):
    x, dy = random(*lead, N_IN), random(*lead, N_OUT, seed=4)
    y, dx = run(x, weight, dy)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    assert_close(rows(y), rows(x) @ wide(weight).T)
    assert_close(rows(dx), rows(dy) @ wide(weight))


@EVERY_FORM
@pytest.mark.parametrize("n_rows", [1, FEW_ROWS + 1])
def test_every_form_of_weight_has_its_product_and_gradient(form, n_rows):
    assert_product_and_gradient(weight_of(form), (n_rows,))


@pytest.mark.parametrize("block", [4, 12, 24])  # not whole words of eight codes, and three words
@pytest.mark.parametrize("n_rows", [1, FEW_ROWS + 1])
def test_blocks_of_other_lengths_than_words(n_rows, block):
    weight, x = quantize_int4(random(N_OUT, 48, seed=1), block=block), random(n_rows, 48)
    assert_close(quant_matmul(x, weight), rows(x) @ wide(weight).T)


@EVERY_SHAPE
def test_every_leading_shape_has_its_product_and_gradient(lead):
    assert_product_and_gradient(weight_of("int4"), lead)


@EVERY_FORM
def test_product_is_that_of_the_reference(form):
    x, weight = random(FEW_ROWS + 1, N_IN), weight_of(form)
    y, _ = run(x, weight, random(FEW_ROWS + 1, N_OUT))
    assert_close(y, jax.jit(quant_matmul_reference)(x, weight))


@pytest.mark.parametrize("form", ["int4", "f32"])
def test_the_weight_has_no_gradient(form):
    x, weight = random(FEW_ROWS + 1, N_IN), weight_of(form)
    loss = jax.jit(jax.grad(lambda w: quant_matmul(x, w).sum(), allow_int=True))
    for leaf in jax.tree.leaves(loss(weight)):
        assert leaf.dtype == jax.dtypes.float0 or not np.any(leaf)


@EVERY_FORM
@pytest.mark.parametrize("n_rows", [2, 64])
def test_bfloat16_rows_give_float32_sums_of_rounded_weights(form, n_rows):
    """Each product may be off by one rounding of its weight, the sum by one more of its own."""
    x, dy = (jnp.asarray(random(n_rows, n, seed=n), jnp.bfloat16) for n in (N_IN, N_OUT))
    weight = weight_of(form)
    y, dx = run(x, weight, dy)
    for actual, left, matrix in ((y, rows(x), wide(weight).T), (dx, rows(dy), wide(weight))):
        assert actual.dtype == jnp.bfloat16
        bound = BF16_ROUNDING * (np.abs(left @ matrix) + np.abs(left) @ np.abs(matrix))
        assert np.all(np.abs(np.asarray(actual, np.float64) - left @ matrix) <= 1.01 * bound)


# --- with an adapter --------------------------------------------------------------------------------------


def assert_adapted_product_and_gradients(weight, lead):
    x, dy = random(*lead, N_IN), random(*lead, N_OUT, seed=4)
    lora_a, lora_b = adapter()
    a, b = rows(lora_a), rows(lora_b)
    adapted = wide(weight) + SCALING * b @ a
    y, dx, d_a, d_b = run_lora(x, weight, lora_a, lora_b, dy)
    assert (y.shape, dx.shape) == (dy.shape, x.shape)
    assert_close(rows(y), rows(x) @ adapted.T)
    assert_close(rows(dx), rows(dy) @ adapted)
    assert_close(d_a, SCALING * (rows(dy) @ b).T @ rows(x))
    assert_close(d_b, SCALING * rows(dy).T @ (rows(x) @ a.T))


@EVERY_FORM
def test_every_form_of_weight_takes_an_adapter(form):
    assert_adapted_product_and_gradients(weight_of(form), (6,))


@EVERY_SHAPE
def test_every_leading_shape_takes_an_adapter(lead):
    assert_adapted_product_and_gradients(weight_of("int4"), lead)


def test_an_adapter_of_zeros_changes_nothing():
    """The state that training starts from: B = 0, so that only B has a gradient."""
    x, weight, dy = random(6, N_IN), weight_of("int4"), random(6, N_OUT, seed=4)
    lora_a, lora_b = adapter()
    y, dx, d_a, d_b = run_lora(x, weight, lora_a, np.zeros_like(lora_b), dy)
    for actual, expected in zip((y, dx), run(x, weight, dy), strict=True):
        assert_close(actual, expected, 1e-6)
    assert not np.any(d_a)
    assert np.any(d_b)


def test_bfloat16_rows_train_a_float32_adapter():
    """Roundings of weight, adapter, factors and result: together less than four."""
    x, dy = (jnp.asarray(random(64, n, seed=n), jnp.bfloat16) for n in (N_IN, N_OUT))
    weight, (lora_a, lora_b) = weight_of("int4"), adapter()
    actual = run_lora(x, weight, lora_a, lora_b, dy)
    expected = run_lora(np.asarray(x, np.float32), weight, lora_a, lora_b, np.asarray(dy, np.float32))
    assert [leaf.dtype.name for leaf in actual] == ["bfloat16", "bfloat16", "float32", "float32"]
    for got, wanted in zip(actual, expected, strict=True):
        assert_close(got, wanted, 4 * BF16_ROUNDING)


# --- a stack of layers in a scan --------------------------------------------------------------------------


def layer_sum(product, x, stack):
    """Sum over a stack of layers ``x <- tanh(product(x, layer) / sqrt(I))``; square weights."""
    out, _ = jax.lax.scan(lambda h, layer: (jnp.tanh(product(h, layer) / x.shape[-1] ** 0.5), None), x, stack)
    return out.sum()


@pytest.mark.parametrize("form", ["int8", "int4", "ternary", "bf16"])
@pytest.mark.parametrize("n_rows", [1, 6])
def test_a_scan_over_stacked_weights_is_the_loop_over_them(form, n_rows):
    stack = FORMS[form](random(3, N_IN, N_IN, seed=1))
    x = random(n_rows, N_IN)

    def loop(x):
        for i in range(3):
            x = jnp.tanh(quant_matmul(x, stack[i]) / N_IN**0.5)
        return x.sum()

    in_loop = jax.jit(jax.value_and_grad(loop))(x)
    in_scan = jax.jit(jax.value_and_grad(functools.partial(layer_sum, quant_matmul)))(x, stack)
    for actual, expected in zip(in_scan, in_loop, strict=True):
        assert_close(actual, expected)


def test_a_scan_over_stacked_adapters_is_the_loop_over_them():
    stack = quantize_int4(random(3, N_IN, N_IN, seed=1))
    adapters = random(3, RANK, N_IN, seed=2), random(3, N_IN, RANK, seed=3)
    x = random(6, N_IN)

    def layer(x, weight, a, b):
        return jnp.tanh(lora_matmul(x, weight, a, b, SCALING) / N_IN**0.5)

    def scan(x, adapters):
        return jax.lax.scan(lambda h, one: (layer(h, *one), None), x, (stack, *adapters))[0].sum()

    def loop(x, adapters):
        for i in range(3):
            x = layer(x, stack[i], *(leaf[i] for leaf in adapters))
        return x.sum()

    in_scan, in_loop = (jax.jit(jax.grad(f, (0, 1)))(x, adapters) for f in (scan, loop))
    for actual, expected in zip(jax.tree.leaves(in_scan), jax.tree.leaves(in_loop), strict=True):
        assert_close(actual, expected)


# --- memory -----------------------------------------------------------------------------------------------


def temp_bytes_per_weight_byte(product, form):
    """XLA's temporary memory of value and gradient over 8 layers, over the bytes of the stack in float32."""
    n_layers, width = 8, 256
    stack = FORMS[form](random(n_layers, width, width))
    x = jax.ShapeDtypeStruct((8, width), jnp.float32)
    program = jax.jit(jax.value_and_grad(functools.partial(layer_sum, product)))
    return xla_memory(program.lower(x, stack).compile()).temp_bytes / (4 * n_layers * width**2)


def with_adapter(x, weight):
    width = x.shape[-1]
    return lora_matmul(x, weight, jnp.ones((RANK, width)), jnp.ones((width, RANK)), SCALING)


@pytest.mark.parametrize("form", ["int8", "int4", "ternary"])
@pytest.mark.parametrize("product", [quant_matmul, with_adapter])
def test_no_wide_copy_of_the_stack_is_kept_for_the_backward_pass(product, form):
    assert temp_bytes_per_weight_byte(product, form) < 0.5


def test_a_wide_copy_of_the_stack_is_kept_where_jax_derives_the_reference():
    """So the measure above does see such a copy."""
    assert temp_bytes_per_weight_byte(quant_matmul_reference, "int4") >= 1
