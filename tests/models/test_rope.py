"""Rotary embedding: frequencies and rotation of transformers, and what rotation must keep."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CONFIGS

from edgejax.models import RopeScaling
from edgejax.models.rope import frequencies, rope_tables, rotate

# name: theta, head size, scaling as transformers' config has it, context of the model
MODELS = {
    "SmolLM2": (100_000.0, 64, None, 8192),
    "Llama 3.1": (500_000.0, 128, {"factor": 8.0, "low": 1.0, "high": 4.0, "original": 8192}, 131072),
    "Llama 3.2": (500_000.0, 64, {"factor": 32.0, "low": 1.0, "high": 4.0, "original": 8192}, 131072),
    "other bounds": (10_000.0, 96, {"factor": 5.0, "low": 0.5, "high": 9.0, "original": 512}, 4096),
    "linear": (1_000_000.0, 256, {"factor": 8.0}, 131072),
}


def our_scaling(values: dict | None) -> RopeScaling | None:
    if values is None or len(values) == 1:
        return None if values is None else RopeScaling(kind="linear", **values)
    return RopeScaling(
        kind="llama3", factor=values["factor"], low_freq_factor=values["low"], high_freq_factor=values["high"],
        original_max_position=values["original"],
    )  # fmt: skip


def their_rotary(name: str):
    """The rotary module of a Llama of transformers."""
    transformers = pytest.importorskip("transformers")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theta, head_dim, values, context = MODELS[name]
    names = {
        "low": "low_freq_factor",
        "high": "high_freq_factor",
        "original": "original_max_position_embeddings",
    }
    scaling = values and {
        "rope_type": "llama3" if len(values) > 1 else "linear", **{names.get(k, k): v for k, v in values.items()}
    }  # fmt: skip
    config = transformers.LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_theta=theta, rope_scaling=scaling,
        max_position_embeddings=context,
    )  # fmt: skip
    return llama.LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("name", MODELS)
def test_frequencies_are_those_of_transformers(name):
    theta, head_dim, values, _ = MODELS[name]
    ours = frequencies(theta, head_dim, our_scaling(values))
    assert ours.dtype == np.float32
    np.testing.assert_allclose(ours, their_rotary(name).inv_freq.numpy(), rtol=2e-6)
    if values:  # the comparison would notice that scaling is left out
        assert np.abs(ours / frequencies(theta, head_dim, None) - 1).max() > 0.5


@pytest.mark.parametrize("name", ["Llama 3.2", "linear"])
def test_rotated_heads_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    theta, head_dim, values, context = MODELS[name]
    config = dataclasses.replace(
        CONFIGS["llama"],
        head_dim=head_dim,
        rope_theta=theta,
        rope_scaling=our_scaling(values),
        max_position=context,
    )
    random = np.random.default_rng(0)
    x = random.standard_normal((2, 5, 3, head_dim)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4], [0, 7, 100, 1000, 8191]], np.int32)
    tables = rope_tables(config, positions)
    ours = rotate(jnp.asarray(x), *tables.of_layer(None))
    heads_first = torch.as_tensor(x.swapaxes(1, 2))
    cos, sin = their_rotary(name)(heads_first, torch.as_tensor(positions))
    theirs, _ = llama.apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    # An angle of 8191 radians is known to 5e-4 in float32, and both round it their own way.
    np.testing.assert_allclose(ours, theirs.numpy().swapaxes(1, 2), atol=5e-3)
    np.testing.assert_allclose(ours[0], theirs.numpy().swapaxes(1, 2)[0], atol=1e-5)


@pytest.mark.quick
def test_llama3_keeps_fast_turns_stretches_slow_ones_and_blends_between():
    scaling = RopeScaling(kind="llama3", factor=8.0, original_max_position=8192)
    plain, scaled = (frequencies(500_000.0, 128, s).astype(np.float64) for s in (None, scaling))
    wavelengths = 2 * np.pi / plain
    fast, slow = wavelengths < 8192 / 4, wavelengths > 8192
    np.testing.assert_array_equal(scaled[fast], plain[fast])
    np.testing.assert_allclose(scaled[slow], plain[slow] / 8, rtol=1e-6)
    between = scaled[~fast & ~slow] / plain[~fast & ~slow]
    assert len(between) > 3
    assert ((between > 1 / 8) & (between < 1)).all()
    assert (np.diff(between) < 0).all()


@pytest.mark.quick
def test_rotation_keeps_lengths_and_sees_differences_of_positions_only():
    config = dataclasses.replace(CONFIGS["llama"], head_dim=32)
    random = np.random.default_rng(0)
    q, k = (jnp.asarray(random.standard_normal((1, 1, 2, 32)), jnp.float32) for _ in range(2))

    def at(x, position):
        return rotate(x, *rope_tables(config, jnp.full((1, 1), position)).of_layer(None))

    np.testing.assert_array_equal(at(q, 0), q)
    np.testing.assert_allclose(jnp.linalg.norm(at(q, 77)), jnp.linalg.norm(q), rtol=1e-6)
    products = [jnp.sum(at(q, start + 9) * at(k, start)) for start in (0, 1, 50, 90)]
    np.testing.assert_allclose(products, products[0], rtol=1e-4)
    assert abs(jnp.sum(at(q, 3) * at(k, 0)) / products[0] - 1) > 1e-2


@pytest.mark.quick
def test_sliding_layers_turn_at_their_own_rate_without_scaling():
    scaling = RopeScaling(kind="linear", factor=8.0)
    config = dataclasses.replace(CONFIGS["gemma3"], rope_scaling=scaling)
    positions = np.arange(6, dtype=np.int32)[None]
    tables = rope_tables(config, positions)

    def angles(theta, factor):
        return positions[..., None] / theta ** (np.arange(0, config.head_dim, 2) / config.head_dim) / factor

    for sliding, expected in ((True, angles(10_000.0, 1.0)), (False, angles(1_000_000.0, 8.0))):
        cos, sin = tables.of_layer(jnp.asarray(sliding))
        np.testing.assert_allclose(cos, np.cos(expected), atol=1e-6)
        np.testing.assert_allclose(sin, np.sin(expected), atol=1e-6)
    same = dataclasses.replace(config, rope_theta_sliding=None)
    cos, sin = rope_tables(same, positions).of_layer(jnp.asarray(True))
    np.testing.assert_array_equal(
        cos, tables.cos
    )  # no rate of their own: that of the others, scaled as theirs
    np.testing.assert_array_equal(sin, tables.sin)
    assert rope_tables(CONFIGS["llama"], positions).cos_sliding is None
