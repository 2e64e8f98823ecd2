"""Checkpoints at two levels (remat "sqrt"): the numbers of one level, fewer boundaries, for any number of layers."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.layer_gradients import DEEP, FAMILIES, MODES, assert_same, by_layer, cosines, outcome

from edgejax.core.errors import ConfigError
from edgejax.memory import kept_boundaries, rematerialize, run_layers, sqrt_group, stored_bytes
from edgejax.memory.residuals import Bf16, Exact, Int8

TALL = dataclasses.replace(DEEP, n_layers=20, d_ff=64)


@pytest.mark.quick
@pytest.mark.parametrize("n_layers", [*range(1, 40), 80, 126])
def test_the_group_keeps_the_fewest_boundaries_and_of_those_recomputes_the_least(n_layers):
    group = sqrt_group(n_layers)
    others = [(kept_boundaries(n_layers, k), k) for k in range(1, n_layers + 1)]
    assert (kept_boundaries(n_layers, group), group) == min(others)
    assert kept_boundaries(n_layers, group) <= 2 * np.sqrt(n_layers) + 1 or group == 1


def layer(h, weights, shared):
    return h + jnp.tanh(h @ weights["w"] + shared) * weights["scale"]


def toy(n_layers: int):
    random = np.random.default_rng(n_layers)
    stack = {
        "w": jnp.asarray(random.standard_normal((n_layers, 8, 8)), jnp.float32),
        "scale": jnp.asarray(random.standard_normal((n_layers, 8)), jnp.float32),
    }
    return stack, jnp.asarray(random.standard_normal((2, 3, 8)), jnp.float32)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("n_layers", "group"), [(1, 1), (2, 2), (3, 2), (5, 2), (6, 3), (7, 3), (7, 4), (7, 7), (3, 5)]
)
def test_any_number_of_layers_in_any_groups(n_layers, group):
    stack, h = toy(n_layers)

    def grouped(stack, h):
        return run_layers(layer, h, stack, jnp.float32(0.1), boundary=Exact(), group=group).sum()

    def plain(stack, h):
        for i in range(n_layers):
            h = layer(h, jax.tree.map(lambda x, i=i: x[i], stack), jnp.float32(0.1))
        return h.sum()

    ours = jax.jit(jax.value_and_grad(grouped, (0, 1)))(stack, h)
    theirs = jax.jit(jax.value_and_grad(plain, (0, 1)))(stack, h)
    assert_same(ours, theirs, 1e-6)


@pytest.mark.quick
@pytest.mark.parametrize("boundary", [Bf16(), Int8(block=4)], ids=str)
def test_narrow_boundaries_of_groups_that_do_not_fill_up(boundary):
    """Both kinds of loops, chains of references included; 7 layers in groups of 3."""
    stack, h = toy(7)

    def total(stack, boundary):
        return run_layers(layer, h, stack, jnp.float32(0.1), boundary=boundary, group=3, key=5).sum()

    narrow = jax.jit(jax.grad(total), static_argnums=1)(stack, boundary)
    exact = jax.jit(jax.grad(total), static_argnums=1)(stack, Exact())
    assert not np.array_equal(narrow["w"], exact["w"])
    assert_same(narrow, exact, 0.05)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_gradients_of_full_remat(family, mode):
    full, sqrt = (outcome(FAMILIES[family], 41, 2, mode, remat=remat) for remat in ("full", "sqrt"))
    assert sqrt.loss == pytest.approx(full.loss, rel=1e-6)
    assert_same(sqrt.gradients, full.gradients, 2e-6)


@pytest.mark.parametrize("mode", MODES)
def test_memory_falls_to_the_boundaries_that_wait_at_once(mode):
    """20 layers in groups of 4 keep 9 boundaries; bf16 halves those."""
    shape = (1, 384, TALL.d_model)
    full, sqrt, narrow = (
        outcome(TALL, 384, 1, mode, remat=remat, boundaries=boundaries)
        for remat, boundaries in (("full", "f32"), ("sqrt", "f32"), ("sqrt", "bf16"))
    )
    one, kept = stored_bytes("f32", shape), kept_boundaries(20, sqrt_group(20))
    assert kept == 9
    assert full.temp_bytes - sqrt.temp_bytes >= 0.9 * (20 - kept) * one
    assert sqrt.temp_bytes - narrow.temp_bytes >= 0.9 * kept * (one - stored_bytes("bf16", shape))
    exact = by_layer(full.gradients)
    assert cosines(by_layer(sqrt.gradients), exact).min() >= 1 - 1e-9
    assert cosines(by_layer(narrow.gradients), exact).min() >= 0.9999


@pytest.mark.quick
def test_it_is_no_policy_of_a_single_layer():
    with pytest.raises(ConfigError, match=r"'sqrt' of one layer; there are: none, attention, mlp, full"):
        rematerialize(layer, "sqrt")
