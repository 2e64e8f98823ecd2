"""The MLP by tiles of positions: the same numbers, and memory that does not grow with T."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CONFIGS
from helpers.layer_gradients import DEEP, FAMILIES, MODES, assert_same, outcome

from edgejax.core.errors import ConfigError
from edgejax.memory import over_positions
from edgejax.models import Decoder

WIDE = dataclasses.replace(DEEP, n_layers=2, d_ff=4096, max_position=1024)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("length", "tile"), [(1, 1), (7, 1), (7, 2), (7, 3), (8, 4), (513, 512), (5, 9), (6, None)]
)
def test_each_position_is_seen_once_whatever_the_tile(length, tile):
    h = jnp.asarray(np.random.default_rng(0).standard_normal((2, length, 3)), jnp.float32)
    matrix = jnp.asarray(np.random.default_rng(1).standard_normal((3, 3)), jnp.float32)
    seen = []

    def function(x, matrix):
        seen.append(x.shape[1])
        return jnp.sin(x @ matrix)

    def tiled(h, matrix):
        return jnp.sum(over_positions(lambda x: function(x, matrix), h, tile) ** 2)

    ours = jax.value_and_grad(tiled, (0, 1))(h, matrix)
    assert max(seen) <= (tile or length)
    assert max(seen) * -(-length // max(seen)) < length + -(
        -length // max(seen)
    )  # less than a position a tile is lost
    assert_same(ours, jax.value_and_grad(lambda h, m: jnp.sum(jnp.sin(h @ m) ** 2), (0, 1))(h, matrix), 1e-5)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_same_loss_and_gradients(family, mode):
    """41 positions become four tiles of 11: three of padding, which must count nowhere."""
    plain, tiled = (
        outcome(FAMILIES[family], 41, 2, mode, remat="full", **tile) for tile in ({}, {"mlp_tile": 12})
    )
    assert tiled.loss == pytest.approx(plain.loss, rel=1e-6)
    assert_same(tiled.gradients, plain.gradients, 1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_memory_of_a_wide_mlp_falls_with_the_tile(mode):
    """T = 1024, F = 4096: gate, up and what their derivatives need are five arrays of 16 MiB, or of the tile's size."""
    temp = {
        tile: outcome(WIDE, 1024, 1, mode, remat="full", mlp_tile=tile).temp_bytes for tile in (None, 256, 64)
    }
    array = 4 * 1024 * WIDE.d_ff
    assert temp[None] - temp[256] >= 3 * array * (1 - 1 / 4), temp
    assert temp[256] > temp[64]
    assert temp[64] < 0.4 * temp[None], temp


def test_it_goes_with_every_way_to_keep_less():
    expected = outcome(DEEP, 64, 1, "adapters", remat="full")
    ways = (
        ({"remat": "none"}, 1e-5),
        ({"remat": "sqrt"}, 1e-5),
        ({"remat": "full", "boundaries": "bf16"}, 0.02),
    )
    for kept, tolerance in ways:
        found = outcome(DEEP, 64, 1, "adapters", mlp_tile=24, **kept)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert_same(found.gradients, expected.gradients, tolerance)


@pytest.mark.quick
@pytest.mark.parametrize("tile", [0, -3, 2.5, True, "64"])
def test_what_is_no_tile_is_refused(tile):
    with pytest.raises(
        ConfigError, match=r"mlp_tile must be a whole number .* at least 1, not .*None does not tile"
    ):
        Decoder(CONFIGS["llama"], None, tile)
