"""Attention of one new position over a cache: the row that attention over the whole text has there."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgejax.kernels.attention import attention, decode_attention

pytestmark = pytest.mark.quick
LENGTH, CAPACITY, WIDTH = 20, 32, 8
SCALE = 0.4
GARBAGE = 1e4  # what the cache holds beyond the text


def inputs(heads=(6, 2), dtype=np.float32):
    """q, k, v of a whole text, ``[B, T, H or K, C]``."""
    rng = np.random.default_rng(0)
    n_heads, n_kv = heads
    return [rng.normal(size=(2, LENGTH, n, WIDTH)).astype(dtype) for n in (n_heads, n_kv, n_kv)]


def cache(x, position):
    """Keys or values ``[B, K, S, C]`` as decoding has them at ``position``: written up to it, garbage beyond."""
    batch, _, n_kv, width = x.shape
    held = np.full((batch, n_kv, CAPACITY, width), GARBAGE, x.dtype)
    held[:, :, : position + 1] = x[:, : position + 1].transpose(0, 2, 1, 3)
    return held


whole = jax.jit(functools.partial(attention, scale=SCALE), static_argnames="window")
one = jax.jit(functools.partial(decode_attention, scale=SCALE), static_argnames="window")


def decoded(q, k, v, position, **settings):
    return one(q[:, position], cache(k, position), cache(v, position), jnp.int32(position), **settings)


@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)], ids=lambda heads: "H{}K{}".format(*heads))
def test_every_position_is_the_row_of_attention(heads):
    q, k, v = inputs(heads)
    expected = whole(q, k, v)
    for position in range(LENGTH):
        np.testing.assert_allclose(decoded(q, k, v, position), expected[:, position], atol=1e-5)


def test_the_last_row_follows_the_equation():
    q, k, v = (np.asarray(x, np.float64) for x in inputs())
    k, v = (np.repeat(x, 3, axis=2) for x in (k, v))  # a key/value head serves 3 query heads
    weights = np.exp(SCALE * np.einsum("bhc,bshc->bhs", q[:, -1], k))
    expected = np.einsum("bhs,bshc->bhc", weights / weights.sum(axis=-1, keepdims=True), v)
    np.testing.assert_allclose(decoded(*inputs(), LENGTH - 1), expected, atol=1e-5)


@pytest.mark.parametrize("window", [1, 5, LENGTH, 100])
def test_every_position_sees_its_window(window):
    q, k, v = inputs()
    expected = whole(q, k, v, window=window)
    for position in range(LENGTH):
        got = decoded(q, k, v, position, window=window)
        np.testing.assert_allclose(got, expected[:, position], atol=1e-5)


@pytest.mark.parametrize("use_window", [True, False])
def test_flag_decides_at_run_time_whether_the_window_holds(use_window):
    q, k, v = inputs()
    expected = whole(q, k, v, window=5 if use_window else None)
    got = decoded(q, k, v, LENGTH - 1, window=5, use_window=jnp.array(use_window))
    np.testing.assert_allclose(got, expected[:, -1], atol=1e-5)


def test_a_full_cache_is_read_to_its_end():
    q, k, v = inputs()
    keys, values = (x.transpose(0, 2, 1, 3) for x in (k, v))
    got = one(q[:, -1], keys, values, jnp.int32(LENGTH - 1))
    np.testing.assert_allclose(got, whole(q, k, v)[:, -1], atol=1e-5)


def test_a_bfloat16_cache_gives_a_bfloat16_row_rounded_once():
    q, k, v = inputs(dtype=jnp.bfloat16)
    expected = whole(*(x.astype(jnp.float32) for x in (q, k, v)))[:, -1]
    got = decoded(q, k, v, LENGTH - 1)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected, rtol=1.01 * 2.0**-8, atol=1e-5)
