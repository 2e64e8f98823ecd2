"""Codes, moments and roundings against their definitions, in float64 or by counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.core.counter_hash import element_indices, uniform, uniform_bits
from edgejax.optim.adamw import scale_by_adam
from edgejax.optim.codes import FAMILIES, Code
from edgejax.optim.moments import UNIT, encode_moment, from_units, to_units
from edgejax.optim.rounding import round_stochastically, stochastic_rounding
from edgejax.optim.streaming import PIECE_UNITS

pytestmark = pytest.mark.quick
CODES = [Code(family, bits, signed) for family in FAMILIES for bits in (4, 8) for signed in (True, False)]


def levels(code: Code) -> np.ndarray:
    first = -code.largest if code.signed else 0
    return np.asarray(code.decode(jnp.arange(first, code.largest + 1)), np.float64)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_every_level_comes_back_and_the_nearest_is_chosen(code):
    table = levels(code)
    first = -code.largest if code.signed else 0
    assert (np.diff(table) > 0).all()
    assert table[-1] == 1
    assert (0.0 in table) == code.signed
    assert np.array_equal(code.encode(jnp.asarray(table, jnp.float32)), np.arange(first, code.largest + 1))
    x = np.linspace(-1 if code.signed else 0, 1, 5001).astype(np.float32)
    found = np.asarray(code.decode(code.encode(jnp.asarray(x))), np.float64)
    best = np.abs(table[None] - x[:, None]).min(axis=1)
    if not code.signed:  # roots: the nearest in squares
        found, x, table = found**2, x.astype(np.float64) ** 2, table**2
        best = np.abs(table[None] - x[:, None]).min(axis=1)
    assert (np.abs(found - x) <= best + 1e-6).all()


def test_dynamic_levels_are_those_of_the_formula():
    table = levels(Code("dynamic", 8, signed=True))[128:]
    wanted = [10.0 ** (d - 6) * (0.1 + 0.9 * (f + 0.5) / 2**d) for d in range(7) for f in range(2**d)]
    np.testing.assert_allclose(table, [*wanted[:-1], 1.0], rtol=1e-5)


@pytest.mark.parametrize("code", CODES, ids=str)
def test_stochastic_rounding_is_right_on_average(code):
    lowest = levels(code)[0] if not code.signed else -1.0
    x = np.random.default_rng(0).uniform(lowest, 1, 64).astype(np.float32)
    noise = uniform(element_indices((4000, 64)), 7)
    decoded = np.asarray(code.decode(code.encode(jnp.asarray(x)[None], noise)), np.float64)
    if not code.signed:  # roots, whose squares are to be right
        decoded, x = decoded**2, x**2
    spread = decoded.std(axis=0) / np.sqrt(4000)
    assert (np.abs(decoded.mean(axis=0) - x) < 5 * spread + 1e-6).all()


@given(st.integers(1, 3 * UNIT + 5), st.sampled_from(CODES))
def test_a_moment_of_any_size_is_within_a_step_and_zero_is_exactly_zero(size, code):
    random = np.random.default_rng(size)
    leaf = random.standard_normal(size).astype(np.float32)
    leaf = leaf if code.signed else np.abs(leaf)
    leaf[: size // 2] = 0 if code.signed else leaf[: size // 2]
    moment, held = encode_moment(to_units(jnp.asarray(leaf)), code)
    np.testing.assert_allclose(held, moment.decode(), rtol=1e-5, atol=1e-7)
    back = np.asarray(from_units(moment.decode(), leaf.shape))
    largest = np.repeat(np.asarray(moment.scale).ravel(), 128)[:size]
    if code.signed:
        assert (np.abs(back - leaf) <= np.diff(levels(code)).max() * largest / 2 + 1e-7).all()
        assert not back[: size // 2].any()
    else:  # roots: within half a step of squares, or at the lowest level
        squares = levels(code) ** 2
        half_step = np.maximum(np.diff(squares).max() / 2, squares[0]) * largest**2
        assert (np.abs(back**2 - leaf**2) <= half_step * (1 + 1e-5)).all()
    zeros, _ = encode_moment(jnp.zeros((2, 8, 128)), code)
    assert not np.asarray(zeros.decode()).any()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("units", [5, PIECE_UNITS, PIECE_UNITS + 1, 3 * PIECE_UNITS + 2])
def test_a_leaf_walked_in_pieces_is_updated_to_its_last_element(bits, units):
    """The first direction of Adam is the gradient's sign, whatever the code: nothing was rounded yet."""
    random = np.random.default_rng(0).standard_normal(units * UNIT - 3)
    leaf = jnp.asarray(np.sign(random) * (0.1 + np.abs(random)), jnp.float32)  # epsilon does not show
    transform = scale_by_adam(bits=bits)
    update, state = jax.jit(transform.update)({"w": leaf}, transform.init({"w": leaf}))
    np.testing.assert_allclose(update["w"], np.sign(leaf), rtol=1e-3)
    moment = np.asarray(from_units(state.mu["w"].decode() * state.nu["w"].decode(), leaf.shape))
    assert np.corrcoef(moment, leaf)[0, 1] > (0.999 if bits == 8 else 0.97)


@pytest.mark.parametrize("bits", [8, 4])
def test_second_moments_follow_their_average_over_many_steps(bits):
    """b2 = 0.999 moves a moment far less than half a level a step: rounded to the nearest it would stay."""
    size, steps = 8 * UNIT, 600
    scale = np.geomspace(0.3, 3, size).astype(np.float32)
    np.random.default_rng(0).shuffle(scale)
    transform = scale_by_adam(bits=bits)

    @jax.jit
    def run(key):
        def step(carry, key):
            gradient = {"w": scale * jax.random.normal(key, (size,))}
            return transform.update(gradient, carry)[1], None

        start = transform.init({"w": jnp.zeros(size)})
        return jax.lax.scan(step, start, jax.random.split(key, steps))[0]

    state = run(jax.random.key(0))
    second = np.asarray(from_units(state.nu["w"].decode(), (size,)), np.float64) ** 2
    wanted = scale.astype(np.float64) ** 2 * (1 - 0.999**steps)
    for low, high in ((0.3, 0.6), (0.6, 1.2), (1.2, 3.0)):
        group = (scale >= low) & (scale < high)
        assert second[group].mean() == pytest.approx(wanted[group].mean(), rel=0.02 if bits == 8 else 0.12)


@pytest.mark.parametrize(("bits", "cosine"), [(8, 0.998), (4, 0.85)])
def test_updates_of_elements_far_below_their_blocks_largest_are_not_noise(bits, cosine):
    """With m itself in a code and not its ratio to the root, the cosines are 0.9973 and 0.58; with it 0.9990 and 0.88."""
    size, steps = 4 * UNIT, 60
    scale = np.random.default_rng(0).permutation(np.geomspace(0.03, 1, size)).astype(np.float32)
    transforms = scale_by_adam(bits=bits), scale_by_adam()

    def step(states, key):
        gradient = {"w": scale * (0.3 + jax.random.normal(key, (size,)))}
        moved = [t.update(gradient, s) for t, s in zip(transforms, states, strict=True)]
        return [state for _, state in moved], [update["w"] for update, _ in moved]

    start = [t.init({"w": jnp.zeros(size)}) for t in transforms]
    _, (held, exact) = jax.lax.scan(jax.jit(step), start, jax.random.split(jax.random.key(1), steps))
    held, exact = np.asarray(held[20:], np.float64).ravel(), np.asarray(exact[20:], np.float64).ravel()
    assert held @ exact / np.sqrt((held @ held) * (exact @ exact)) > cosine
    assert held @ exact / (exact @ exact) == pytest.approx(1, abs=0.05)


@given(st.floats(-(2.0**99), 2.0**99, width=32), st.integers(0, 2**32 - 1))
def test_rounding_to_bfloat16_gives_a_neighbour(value, key):
    x = jnp.full(64, value, jnp.float32)
    rounded = np.asarray(
        round_stochastically(x, uniform_bits(jnp.arange(64), key)).astype(jnp.float32), np.float64
    )
    step = 2.0**-7 * max(abs(value), 2.0**-126)
    assert (np.abs(rounded - np.float64(np.float32(value))) < step).all()


def test_rounding_is_right_on_average_and_keeps_what_is_not_finite():
    x = jnp.asarray(np.random.default_rng(1).standard_normal(32), jnp.float32)
    many = round_stochastically(
        jnp.broadcast_to(x, (20000, 32)), uniform_bits(element_indices((20000, 32)), 3)
    )
    many = np.asarray(many.astype(jnp.float32), np.float64)
    np.testing.assert_allclose(
        many.mean(axis=0), x, atol=5 * (many.std(axis=0) / np.sqrt(20000)).max() + 1e-7
    )
    odd = jnp.array([np.inf, -np.inf, np.nan, 0.0, -0.0, 3.4e38], jnp.float32)
    rounded = np.asarray(round_stochastically(odd, jnp.full(6, 0xFFFF, jnp.uint32)).astype(jnp.float32))
    assert rounded[0] == np.inf
    assert rounded[1] == -np.inf
    assert np.isnan(rounded[2])
    assert not rounded[3:5].any()


def test_small_updates_of_bfloat16_weights_add_up():
    """1000 updates of a thousandth of a step each: rounded to the nearest, none would be seen."""
    transform = stochastic_rounding(seed=3)
    weights = {"w": jnp.ones(4096, jnp.bfloat16)}

    @jax.jit
    def run(weights):
        def step(carry, _):
            weights, state = carry
            updates, state = transform.update({"w": jnp.full(4096, 1e-4)}, state, weights)
            weights = {"w": (weights["w"].astype(jnp.float32) + updates["w"]).astype(jnp.bfloat16)}
            return (weights, state), None

        return jax.lax.scan(step, (weights, transform.init(weights)), None, length=1000)[0][0]

    final = np.asarray(run(weights)["w"].astype(jnp.float32))
    assert final.mean() == pytest.approx(1.1, rel=2e-3)


def test_layers_and_steps_round_differently():
    transform = stochastic_rounding()
    weights, updates = {"w": jnp.ones(4096, jnp.bfloat16)}, {"w": jnp.full(4096, 2.0**-9)}
    state = transform.init(weights)
    draws = [np.asarray(transform.update(updates, state, weights, salt=salt)[0]["w"]) for salt in (0, 1)]
    later = np.asarray(
        transform.update(updates, transform.update(updates, state, weights)[1], weights)[0]["w"]
    )
    for other in (draws[1], later):
        assert 0.2 < (draws[0] != other).mean() < 0.6
