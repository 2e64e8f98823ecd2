"""The next token: against the warpers of transformers, and the frequencies of many draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.models.sampling import NOT_FINITE, likeliest, make_sampling, next_token

V = 40
ranked, draw = jax.jit(likeliest), jax.jit(next_token)
SETTINGS = st.tuples(
    st.floats(0.05, 20.0), st.one_of(st.just(1.0), st.floats(0.01, 0.99)), st.integers(0, V + 5)
)


def probabilities(logits: np.ndarray, temperature: float, top_p: float, top_k: int) -> np.ndarray:
    """What each token of a row is drawn with, in the order of the ids."""
    weights, order = ranked(jnp.asarray(logits)[None], make_sampling(temperature, top_p, top_k))
    found = np.zeros(logits.shape[-1])
    found[np.asarray(order[0])] = np.exp(np.asarray(weights[0], np.float64))
    return found / found.sum()


def by_the_definition(logits, temperature, top_p, top_k) -> np.ndarray:
    """The module's formula in float64, token by token."""
    z = logits.astype(np.float64) / temperature
    p = np.exp(z - z.max())
    by_rank = np.argsort(-p, kind="stable")[: top_k or None]
    p = p / p[by_rank].sum()
    kept, mass = [], 0.0
    for token in by_rank:
        if mass >= top_p and top_p < 1:
            break
        kept.append(token)
        mass += p[token]
    out = np.zeros_like(p)
    out[kept] = p[kept] / p[kept].sum()
    return out


@pytest.mark.quick
@given(seed=st.integers(0, 2**16), settings=SETTINGS)
def test_probabilities_follow_the_definition(seed, settings):
    logits = 3 * np.random.default_rng(seed).standard_normal(V).astype(np.float32)
    np.testing.assert_allclose(
        probabilities(logits, *settings), by_the_definition(logits, *settings), rtol=2e-4, atol=1e-7
    )


def test_probabilities_are_those_of_transformers():
    torch = pytest.importorskip("torch")
    warpers = pytest.importorskip("transformers.generation.logits_process")
    random = np.random.default_rng(0)
    for temperature in (0.3, 1.0, 4.0):
        for top_p in (0.05, 0.5, 0.9, 1.0):
            for top_k in (0, 1, 7, V):
                logits = 3 * random.standard_normal(V).astype(np.float32)
                chain = [warpers.TemperatureLogitsWarper(temperature)]
                chain += [warpers.TopKLogitsWarper(top_k)] if top_k else []
                chain += [warpers.TopPLogitsWarper(top_p)] if top_p < 1 else []
                theirs = torch.as_tensor(logits)[None]
                for warp in chain:
                    theirs = warp(None, theirs)
                expected = torch.softmax(theirs[0].double(), -1).numpy()
                ours = probabilities(logits, temperature, top_p, top_k)
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.quick
def test_draws_have_these_frequencies():
    """20000 draws: each frequency within 4.5 standard deviations of its probability."""
    n, logits = 20_000, np.array([0.0, 2.0, 1.0, -1.0, 1.5], np.float32)
    for settings in ((1.0, 1.0, 0), (2.0, 1.0, 3), (0.7, 0.8, 0)):
        keys = jax.random.split(jax.random.key(0), n)
        sampling = make_sampling(*settings)
        tokens = jax.vmap(lambda key, s=sampling: draw(jnp.asarray(logits)[None], key, s)[0])(keys)
        p = by_the_definition(logits, *settings)
        counts = np.bincount(np.asarray(tokens), minlength=5)
        assert (counts[p == 0] == 0).all()
        assert (np.abs(counts - n * p) <= 4.5 * np.sqrt(n * p * (1 - p))).all()


@pytest.mark.quick
def test_rows_are_drawn_apart_from_each_other():
    rows = jnp.zeros((64, V))
    tokens = draw(rows, jax.random.key(0), make_sampling(temperature=1.0))
    assert len(set(tokens.tolist())) > 20


@pytest.mark.quick
def test_of_equally_likely_tokens_the_lowest_id_goes_first():
    logits = jnp.array([[1.0, 5.0, 5.0, 5.0, 0.0]])
    assert draw(logits, jax.random.key(0), make_sampling()).tolist() == [1]
    only_one = make_sampling(temperature=1.0, top_k=1)
    assert [draw(logits, jax.random.key(i), only_one).item() for i in range(8)] == [1] * 8
    two = make_sampling(temperature=1.0, top_k=2)
    assert {draw(logits, jax.random.key(i), two).item() for i in range(16)} == {1, 2}


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [0.0, 1e-30, 1e-6, 1.0, 1e30])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_extreme_values_stay_numbers(temperature, scale):
    logits = jnp.array([[-1.0, 3.0, 2.0]]) * scale
    token = draw(logits, jax.random.key(0), make_sampling(temperature)).item()
    assert token in (0, 1, 2)
    if temperature < 1e-7 * scale:
        assert token == 1


@pytest.mark.quick
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_that_are_not_finite_have_no_token_and_others_do(temperature, bad):
    logits = jnp.array([[0.0, 1.0, 2.0], [0.0, bad, 2.0], [2.0, 1.0, 0.0]])
    tokens = draw(logits, jax.random.key(0), make_sampling(temperature)).tolist()
    assert tokens[1] == NOT_FINITE
    assert {tokens[0], tokens[2]} <= {0, 1, 2}
    if temperature == 0:
        assert tokens == [2, NOT_FINITE, 0]


@pytest.mark.quick
def test_settings_are_no_reason_to_compile_again():
    traces = []

    @jax.jit
    def traced(logits, key, sampling):
        traces.append(sampling)
        return next_token(logits, key, sampling)

    for sampling in (make_sampling(), make_sampling(0.5, 0.9, 3), make_sampling(1.0)):
        traced(jnp.zeros((1, V)), jax.random.key(0), sampling)
    assert len(traces) == 1
