"""The step that memory is compared with computes what ours does: otherwise the comparison says nothing."""

import doctest
import importlib.util
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layer_gradients import FAMILIES
from hypothesis import given
from hypothesis import strategies as st

from edgejax.data import Batch
from edgejax.measure.tables import newest
from edgejax.models import Decoder, LoraConfig, init_lora
from edgejax.models import loss as our_loss

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "card_memory"


@pytest.fixture(scope="module")
def baseline():
    spec = importlib.util.spec_from_file_location("card_memory_baseline", FOLDER / "baseline.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mode", ["lora", "full"])
def test_loss_and_gradient_are_those_of_the_decoder(baseline, family, mode):
    config, lora = FAMILIES[family], LoraConfig(rank=4)
    params = Decoder(config).init(jax.random.key(0))
    adapters = jax.tree.map(lambda x: x + 0.02, init_lora(config, lora, jax.random.key(1)))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (2, 17)).astype(np.int32)
    rows, targets = tokens[:, :-1], tokens[:, 1:]
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), rows.shape)
    ones = np.ones(rows.shape, np.int32)
    batch = jax.tree.map(jnp.asarray, Batch(rows, targets, ones > 0, ones, positions))

    def ours(params, adapters):
        decoder = Decoder(config, lora if adapters else None)
        total, n = our_loss(decoder, params, adapters, batch, frozen_head=mode == "lora")
        return total / n

    def theirs(params, adapters):
        return baseline.mean_loss(config, lora, params, adapters, rows, targets, jnp.float32)

    given = (params, adapters if mode == "lora" else {})
    argument = 1 if mode == "lora" else 0
    a, b = (jax.jit(jax.value_and_grad(f, argnums=argument))(*given) for f in (ours, theirs))
    assert float(a[0]) == pytest.approx(float(b[0]), rel=1e-5)
    for x, y in zip(jax.tree.leaves(a[1]), jax.tree.leaves(b[1]), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-3, atol=2e-5)


@pytest.fixture
def module_of(monkeypatch):
    """Imports a script of the experiment, as it is when it runs."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name):
        spec = importlib.util.spec_from_file_location(f"card_memory_{name}", FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield load
    for name in ("lengths", "measure"):
        sys.modules.pop(name, None)


def test_the_readme_has_the_tables_of_the_newest_results(module_of):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert module_of("render").with_tables(readme) == readme


def test_examples_of_the_longest_row(module_of):
    for name in ("lengths", "sequences"):
        assert doctest.testmod(module_of(name)).failed == 0


@pytest.mark.parametrize("parabola", [False, True])
@given(
    fixed=st.integers(0, 10**9),
    each=st.integers(1, 10**6),
    pair=st.integers(0, 100),
    budget=st.integers(0, 2 * 10**9),
)
def test_the_longest_row_is_the_last_that_fits(parabola, fixed, each, pair, budget):
    spec = importlib.util.spec_from_file_location("card_memory_lengths", FOLDER / "lengths.py")
    lengths = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lengths)
    size = lambda n: fixed + each * n + (pair * n * n if parabola else 0)  # noqa: E731
    points = [{"seq": seq, "peak_bytes": size(seq)} for seq in (512, 1024, 2048)]
    found = lengths.longest(points, budget, 4096, parabola=parabola)
    fitting = [seq for seq in range(128, 4097, 128) if size(seq) <= budget]
    near = [seq for seq in range(128, 4097, 128) if abs(size(seq) - budget) <= 1e-6 * size(4096)]
    assert found.seq == max(fitting, default=0) or found.seq in near  # of the rounding of a fit
    if found.seq:
        assert found.n_bytes == pytest.approx(size(found.seq), rel=1e-6, abs=1e3)


def test_beyond_the_first_that_is_too_long_nothing_is_looked_at(module_of):
    points = [
        {"seq": 512, "peak_bytes": 100},
        {"seq": 1024, "peak_bytes": 190},
        {"seq": 2048, "peak_bytes": 340},
    ]
    found = module_of("lengths").longest(points, 341, 32768, parabola=True)  # which comes down again
    assert found == (2048, 340)


def test_what_was_found_is_true_for_the_cards_that_were_asked(module_of):
    """Compiled for the card itself, the step of the length that was found takes at most what is left for errors above what was said."""
    record = json.loads(newest(FOLDER / "sequences").read_text(encoding="utf-8"))
    checks = [one for one in record["results"]["checks"] if one["seq"]]
    assert len(checks) >= 8
    assert {one["side"] for one in checks} == {"ours", "usual, bfloat16"}
    for one in checks:
        budget = record["config"]["cards"][one["card"]] - record["config"]["reserve_bytes"]
        assert one["predicted_bytes"] <= budget
        assert one["compiled_bytes"] <= (1 + module_of("lengths").SPARE) * one["predicted_bytes"]
