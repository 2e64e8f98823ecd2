"""Quantised arrays: packing, rounding, reading back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_bytes
from edgejax.quant import (
    QuantizedArray,
    codes_per_word,
    dequantize,
    pack_codes,
    quantize_int4,
    quantize_int8,
    quantize_ternary,
    take_rows,
    ternary_block,
    unpack_codes,
)

pytestmark = pytest.mark.quick
QUANTIZERS = {2: quantize_ternary, 4: quantize_int4, 8: quantize_int8}
EVERY_WIDTH = pytest.mark.parametrize("bits", QUANTIZERS)


def weights(shape=(3, 5, 96), seed=0, spread=0.1):
    return np.random.default_rng(seed).normal(0, spread, shape).astype(np.float32)


def by_formula(q: QuantizedArray) -> np.ndarray:
    """code * scale + minimum in float64, element by element from the documented bit layout."""
    if q.bits < 8:
        words, n = np.asarray(q.codes), 32 // q.bits
        codes = np.stack([(words >> (q.bits * i)) % 2**q.bits for i in range(n)], axis=-1).reshape(q.shape)
        codes = codes - 1.0 if q.bits == 2 else codes
    else:
        codes = np.asarray(q.codes)
    scale = np.repeat(np.asarray(q.scale, np.float64), q.block, axis=-1)
    minimum = 0 if q.minimum is None else np.repeat(np.asarray(q.minimum, np.float64), q.block, axis=-1)
    return codes * scale + minimum


@pytest.mark.parametrize("bits", [2, 4])
@given(
    hnp.arrays(
        np.uint8, st.tuples(st.integers(1, 3), st.sampled_from([16, 32, 80])), elements=st.integers(0, 15)
    )
)
def test_codes_come_back(bits, codes):
    codes, n = codes % 2**bits, codes_per_word(bits)
    words = pack_codes(codes, bits)
    assert words.dtype == np.uint32
    assert words.shape == (codes.shape[0], codes.shape[1] // n)
    np.testing.assert_array_equal(unpack_codes(words, bits), codes)
    for i in range(n):  # element i of a word begins at bit bits * i
        np.testing.assert_array_equal((words >> (bits * i)) % 2**bits, codes[:, i::n])


@pytest.mark.parametrize(("bits", "needs"), [(2, 16), (4, 8)])
def test_codes_need_whole_words(bits, needs):
    with pytest.raises(ConfigError, match=f"{bits}-bit codes .* multiple of {needs}, not 12"):
        pack_codes(np.zeros((2, 12), np.uint8), bits)


@given(
    st.lists(st.floats(-4, 4, width=32), min_size=16, max_size=16),
    st.floats(2.0**-10, 8, width=16),
)
def test_no_other_ternary_code_has_less_error(values, other_scale):
    w = np.array([values], np.float32)
    q = quantize_ternary(w, 16)
    error = ((by_formula(q) - w) ** 2).sum()
    nearest = np.clip(np.rint(w / np.float64(other_scale)), -1, 1) * other_scale
    # the scale is rounded up to float16, or float32 where it is small: 1 part in 2**10 of it
    slack = 16 * (float(q.scale.max()) * 2.0**-10) ** 2
    assert error <= ((nearest - w) ** 2).sum() * (1 + 1e-6) + slack + 1e-12


@given(
    hnp.arrays(np.int8, (3, 64), elements=st.integers(-1, 1)),
    st.floats(2.0**-12, 1000, width=16),
)
def test_ternary_weights_stay_as_they_are(codes, scale):
    w = codes * np.float32(scale)
    q = quantize_ternary(w)
    assert q.block == 64
    np.testing.assert_array_equal(np.asarray(q.dequantize()), w)


def test_the_block_of_ternary_codes_divides_a_row():
    assert [ternary_block(width) for width in (256, 4096, 576, 96, 1536)] == [256, 256, 64, 32, 256]


@pytest.mark.parametrize("bits", [4, 8])
@given(
    block=st.sampled_from([8, 16, 32]),
    rows=st.integers(1, 5),
    blocks=st.integers(1, 3),
    exponent=st.integers(-30, 4),
    seed=st.integers(0, 2**16),
)
def test_the_error_is_at_most_half_a_step(bits, block, rows, blocks, exponent, seed):
    w = weights((rows, blocks * block), seed, 10.0**exponent)
    q = QUANTIZERS[bits](w, block)
    steps = np.repeat(np.asarray(q.scale, np.float64), block, axis=-1)
    # float16 minima are up to 2**-11 of 15 steps away; the codes already know of it, so only clipping can add to it
    assert (np.abs(by_formula(q) - w) <= 0.51 * steps).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_no_weight_is_clipped(bits):
    w = weights((64, 512))
    q = QUANTIZERS[bits](w)
    unit = np.abs(w).reshape(64, 16, 32).max(-1)
    scale = np.asarray(q.scale, np.float64)
    if bits == 8:
        assert (scale * 127 >= unit).all()
        assert (scale * 127 <= unit * 1.001).all()  # rounded up by one float16 step at most


@EVERY_WIDTH
def test_a_block_of_zeros_is_exact_zeros(bits):
    w = weights((4, 64))
    w[1, 32:] = 0
    q = QUANTIZERS[bits](w)
    assert not np.asarray(dequantize(q))[1, 32:].any()
    assert np.asarray(dequantize(q))[1, :32].any()


@EVERY_WIDTH
def test_scales_are_float16_until_that_loses_bits(bits):
    assert QUANTIZERS[bits](weights((4, 64))).scale.dtype == np.float16
    assert QUANTIZERS[bits](weights((4, 64), spread=1e-7)).scale.dtype == np.float32
    assert QUANTIZERS[bits](weights((4, 64), spread=1e9)).scale.dtype == np.float32


@EVERY_WIDTH
def test_dequantize_is_the_formula(bits):
    q = QUANTIZERS[bits](weights())
    # one rounding of code * scale + minimum in float32
    np.testing.assert_allclose(np.asarray(q.dequantize()), by_formula(q), rtol=2e-7, atol=1e-8)
    assert q.dequantize(jnp.bfloat16).dtype == jnp.bfloat16


@EVERY_WIDTH
def test_rows_of_a_table(bits):
    q = QUANTIZERS[bits](weights((11, 64)))
    rows = np.array([[3, 0], [10, 3]])
    np.testing.assert_array_equal(take_rows(q, rows), np.asarray(q.dequantize())[rows])
    plain = jnp.asarray(weights((11, 64)))
    np.testing.assert_array_equal(take_rows(plain, rows), np.asarray(plain)[rows])


@EVERY_WIDTH
def test_layers_of_a_stack_under_jit_and_scan(bits):
    q = QUANTIZERS[bits](weights((3, 5, 96)))
    x = jnp.ones((96,))

    @jax.jit
    def all_layers(stack):
        return jax.lax.scan(lambda carry, layer: (carry, layer.dequantize() @ x), 0, stack)[1]

    np.testing.assert_allclose(all_layers(q), np.asarray(q.dequantize()) @ np.ones(96), rtol=1e-5, atol=1e-5)
    one = jax.tree.map(jnp.asarray, q)[1]
    assert (one.shape, one.block, one.bits) == ((5, 96), 32, bits)
    np.testing.assert_array_equal(one.dequantize(), q.dequantize()[1])


@pytest.mark.parametrize(("bits", "bits_per_weight"), [(2, 2.5), (4, 5.0), (8, 8.5)])
def test_bytes_are_what_the_code_promises(bits, bits_per_weight):
    q = QUANTIZERS[bits](weights((3, 5, 96)))
    assert q.bits_per_element == bits_per_weight
    assert q.nbytes == tree_bytes(q) == 3 * 5 * 96 * bits_per_weight / 8
    assert (q.shape, q.size, q.ndim) == ((3, 5, 96), 1440, 3)


@EVERY_WIDTH
def test_rows_that_do_not_divide_into_blocks(bits):
    with pytest.raises(ConfigError, match="rows of 48 weights do not divide into blocks of 32"):
        QUANTIZERS[bits](np.zeros((2, 48), np.float32), 32)
