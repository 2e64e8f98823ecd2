"""The MLP by parts of its hidden units: the same numbers, and memory that does not grow with them."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import LORAS, random_adapters, random_params
from helpers.layer_gradients import DEEP, FAMILIES, MODES, assert_same, batch_of, outcome

from edgejax.models import Decoder, hidden_parts, loss
from edgejax.quant import quantize_int4

WIDE = dataclasses.replace(DEEP, n_layers=2, d_ff=8192)


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 32 hidden units."""
    monkeypatch.setattr(hidden_parts, "PART_ELEMENTS", 1)


def config_of(family: str):
    return dataclasses.replace(FAMILIES[family], d_ff=96, mlp_bias=False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_same_loss_and_gradients(family, mode, monkeypatch):
    config = config_of(family)
    plain = outcome(config, 40, 2, mode, remat="full")
    wanted = config.d_model * config.d_ff // 3
    monkeypatch.setattr(hidden_parts, "PART_ELEMENTS", wanted)
    assert hidden_parts.count_hidden_parts(config) == 3
    found = outcome(config, 40, 2, mode, remat="full", in_parts=True)
    assert found.loss == pytest.approx(plain.loss, rel=1e-6)
    assert_same(found.gradients, plain.gradients, 1e-5)


@pytest.mark.parametrize("targets", ["all", "attention-rslora"])
def test_packed_weights_are_cut_at_blocks(targets, small_parts):
    config = dataclasses.replace(config_of("llama"), d_model=64)
    lora = LORAS[targets]
    params = jax.tree.map(jnp.asarray, random_params(config))
    for name in ("gate_proj", "up_proj", "down_proj"):
        kernel = params["blocks"][name]["kernel"]
        params["blocks"][name]["kernel"] = jax.tree.map(jnp.asarray, quantize_int4(np.asarray(kernel)))
    adapters = jax.tree.map(jnp.asarray, random_adapters(config, lora))
    batch = batch_of(config, 24)

    def gradients(in_parts: bool):
        decoder = Decoder(config, lora, None, in_parts)
        return jax.jit(jax.grad(lambda a: loss(decoder, params, a, batch, frozen_head=True)[0]))(adapters)

    assert_same(gradients(True), gradients(False), 1e-5)


def test_memory_of_a_wide_mlp_falls_with_the_number_of_parts():
    """T = 512, F = 8192 with D = 64: gate, up and what their derivatives need are five arrays of 16 MiB, or of 4."""
    temp = {}
    for in_parts in (False, True):
        temp[in_parts] = outcome(WIDE, 512, 1, "adapters", remat="full", in_parts=in_parts).temp_bytes
    assert hidden_parts.count_hidden_parts(WIDE) == 1
    assert temp[True] == temp[False]
    wider = dataclasses.replace(WIDE, d_model=512, head_dim=128)
    assert hidden_parts.count_hidden_parts(wider) == 8
    plain, parts = (
        outcome(wider, 512, 1, "adapters", remat="full", in_parts=in_parts).temp_bytes
        for in_parts in (False, True)
    )
    array = 4 * 512 * wider.d_ff
    assert plain - parts > 3 * array * (1 - 1 / 4)


@pytest.mark.parametrize(
    ("d_model", "d_ff", "n_parts"),
    [(896, 4864, 19), (2048, 11008, 43), (576, 1536, 2), (1024, 4096, 8), (2048, 5600, 25), (1024, 4099, 1)],
)
def test_parts_are_the_fewest_of_whole_blocks(d_model, d_ff, n_parts):
    config = dataclasses.replace(DEEP, d_model=d_model, d_ff=d_ff)
    assert hidden_parts.count_hidden_parts(config) == n_parts
    if n_parts > 1:
        assert d_ff // n_parts % 32 == 0
        assert d_model * d_ff / n_parts <= hidden_parts.PART_ELEMENTS


def test_a_bias_would_be_added_once_a_part():
    config = dataclasses.replace(DEEP, d_model=1024, d_ff=4096, mlp_bias=True)
    assert hidden_parts.count_hidden_parts(config) == 1


def test_the_sum_is_that_of_the_parts():
    random = np.random.default_rng(0)
    parts, x = jnp.asarray(random.standard_normal((5, 3, 3))), jnp.asarray(random.standard_normal((1, 7, 3)))
    from edgejax.memory.tiles import sum_over_parts

    found = sum_over_parts(lambda part, x: jnp.sin(x @ part), parts, x)
    assert np.allclose(found, sum(jnp.sin(x @ part) for part in parts), rtol=1e-6)
