"""The keyed hash: known words, uniform bits, keys that do not know of each other, rounding without bias.

Bounds are five standard deviations of the statistic under true randomness, for N words.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgejax.core.counter_hash import element_indices, lowbias32, uniform, uniform_bits

pytestmark = pytest.mark.quick
N = 1 << 16
KEYS = (0, 1, 2, 29, 2**32 - 1)


def words(key: int, first: int = 0) -> np.ndarray:
    return np.asarray(uniform_bits(jnp.arange(N, dtype=jnp.uint32) + jnp.uint32(first), key))


def bits_of(array: np.ndarray) -> np.ndarray:
    return (array[:, None] >> np.arange(32, dtype=np.uint32)) & 1


def test_the_permutation_is_the_published_one():
    def in_python(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        return x ^ (x >> 16)

    values = [0, 1, 2, 0x12345678, 2**31, 2**32 - 1]
    assert np.asarray(lowbias32(jnp.array(values, jnp.uint32))).tolist() == [in_python(x) for x in values]


@pytest.mark.parametrize("key", KEYS)
def test_each_bit_is_a_fair_coin_and_no_two_bits_agree_too_often(key):
    coins = 1.0 - 2.0 * bits_of(words(key))
    correlation = coins.T @ coins / N
    bound = 5 / np.sqrt(N)
    assert np.abs(coins.mean(0)).max() < bound
    assert np.abs(correlation - np.eye(32)).max() < bound


@pytest.mark.parametrize("key", KEYS)
def test_bytes_are_uniform(key):
    for shift in (0, 8, 16, 24):
        counts = np.bincount((words(key) >> shift) & 255, minlength=256)
        chi_squared = ((counts - N / 256) ** 2 / (N / 256)).sum()  # mean 255, standard deviation sqrt(510)
        assert abs(chi_squared - 255) < 5 * np.sqrt(510)


def test_one_word_tells_nothing_of_the_next_one():
    first, second = words(3), words(3, first=1)
    agreement = (1.0 - 2.0 * bits_of(first)).T @ (1.0 - 2.0 * bits_of(second)) / N
    assert np.abs(agreement).max() < 5 / np.sqrt(N)


@pytest.mark.parametrize(("key", "other"), [(0, 1), (1, 2), (0, 2**31), (7, 2**32 - 7), (28, 29)])
def test_streams_of_two_keys_are_independent(key, other):
    one, two = words(key), words(other)
    agreement = (1.0 - 2.0 * bits_of(one)).T @ (1.0 - 2.0 * bits_of(two)) / N
    assert np.abs(agreement).max() < 5 / np.sqrt(N)
    assert np.intersect1d(one, two).size < 8, "a permuted or shifted copy (one word is expected by chance)"


def test_indices_are_row_major_and_traced_keys_give_the_same_words():
    index = element_indices((3, 5, 7))
    assert (np.asarray(index) == np.arange(105).reshape(3, 5, 7)).all()
    traced = jax.jit(uniform_bits)(index, jnp.uint32(5))
    assert (np.asarray(traced) == np.asarray(uniform_bits(index, 5))).all()
    assert element_indices(()).shape == ()
    assert element_indices((0, 3)).shape == (0, 3)


@pytest.mark.parametrize("fraction", [0.0, 1 / 256, 0.25, 0.5, 0.9])
def test_floor_of_value_plus_uniform_is_the_value_on_average(fraction):
    rounded = np.floor(3.0 + fraction + np.asarray(uniform(jnp.arange(N, dtype=jnp.uint32), 11)))
    deviation = np.sqrt(fraction * (1 - fraction) / N)
    assert abs(rounded.mean() - 3 - fraction) <= 5 * deviation
    assert set(rounded) <= {3.0, 4.0}


def test_uniform_stays_below_one():
    values = np.asarray(uniform(jnp.arange(N, dtype=jnp.uint32), 0))
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert values.dtype == np.float32
