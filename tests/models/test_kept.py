"""What a layer keeps for a backward pass that is written by hand: its bytes are counted, its values come back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CONFIGS, random_params

from edgejax.core.trees import tree_bytes
from edgejax.memory import KEPT_VALUES, check_kept
from edgejax.models import Decoder
from edgejax.models.kept import EXACT, KeptValues

WAYS = [("full", "f32"), ("attention", "f32"), ("mlp", "f32"), ("attention", "bf16"), ("mlp", "bf16")]


def one_layer(config, rows=2, length=21):
    """The decoder, its first layer's parameters and what it is given."""
    decoder = Decoder(config)
    block = jax.tree.map(lambda leaf: jnp.asarray(leaf[0]), random_params(config)["blocks"])
    h = jnp.asarray(np.random.default_rng(0).normal(size=(rows, length, config.d_model)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    flags = decoder.sliding_flags()
    sliding = None if flags is None else jnp.asarray(flags[0])
    segments = jnp.asarray(np.repeat([1, 2, 0], [9, length - 12, 3])[None].repeat(rows, axis=0), jnp.int32)
    return decoder, block, h, (decoder.rope(positions), segments, sliding)


@pytest.mark.quick
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("way", WAYS, ids="-".join)
def test_what_is_stored_takes_the_bytes_that_are_counted(family, way):
    check_kept(*way)
    decoder, block, h, how = one_layer(CONFIGS[family])
    values = KeptValues.of(*way)
    stored = jax.eval_shape(lambda block, h, how: values.run(decoder, block, {}, h, *how)[1], block, h, how)
    assert tree_bytes(stored) == values.stored_bytes(CONFIGS[family], *h.shape[:2])
    assert set(stored) == set(KEPT_VALUES[way[0]])


@pytest.mark.parametrize("family", CONFIGS)
def test_a_layer_run_again_from_what_it_kept_is_the_layer(family):
    decoder, block, h, how = one_layer(CONFIGS[family])
    expected, pull = jax.vjp(lambda h, block: decoder.block(block, {}, h, *how), h, block)
    dh = jnp.cos(jnp.arange(h.size, dtype=jnp.float32)).reshape(h.shape)
    for remat, boundaries in WAYS:
        values = KeptValues.of(remat, boundaries)
        out, stored = jax.jit(lambda h, values=values: values.run(decoder, block, {}, h, *how))(h)
        np.testing.assert_allclose(out, expected, rtol=0, atol=1e-5 * float(jnp.abs(expected).max()))
        kept = values.restore(stored)
        again, pull_again = jax.vjp(lambda h, b, kept=kept: decoder.block(b, {}, h, *how, kept), h, block)
        tolerance = 1e-5 if boundaries == "f32" else 2e-2
        assert float(jnp.linalg.norm(again - expected)) <= tolerance * float(jnp.linalg.norm(expected))
        for ours, theirs in zip(jax.tree.leaves(pull_again(dh)), jax.tree.leaves(pull(dh)), strict=True):
            difference = float(jnp.linalg.norm(ours - theirs))
            assert difference <= tolerance * float(jnp.linalg.norm(theirs)), (remat, boundaries)


@pytest.mark.quick
def test_log_sum_exps_are_never_narrow():
    decoder, block, h, how = one_layer(CONFIGS["llama"])
    stored = jax.eval_shape(lambda h: KeptValues.of("mlp", "bf16").run(decoder, block, {}, h, *how)[1], h)
    assert {name: leaf.dtype.name for name, leaf in stored.items()} == {
        name: "float32" if name in EXACT else "uint16" for name in KEPT_VALUES["mlp"]
    }
