"""The step that memory is compared with computes what ours does: otherwise the comparison says nothing."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layer_gradients import FAMILIES

from edgejax.data import Batch
from edgejax.measure.tables import newest, with_table
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


def test_the_readme_has_the_table_of_the_newest_result():
    spec = importlib.util.spec_from_file_location("card_memory_render", FOLDER / "render.py")
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, render.render(newest(FOLDER / "results"))) == readme
