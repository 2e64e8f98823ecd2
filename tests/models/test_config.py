"""Configurations of models and adapters: what is refused, and numbers that must agree with the arrays."""

import dataclasses

import jax
import numpy as np
import pytest
from export_cases import CONFIGS, random_params

from edgejax.core.errors import ConfigError
from edgejax.data import Batch
from edgejax.models import LINEAR_NAMES, Decoder, LoraConfig, init_lora, loss


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"family": "mamba"}, "'mamba' is not supported; supported: llama, qwen2, qwen3, gemma3"),
        ({"n_heads": 4, "n_kv_heads": 3}, "4 query heads do not divide among 3 key/value heads"),
        ({"head_dim": 9}, "even head size, not 9"),
        ({"sliding_layers": (True,), "sliding_window": 4}, "1 layer kinds for 2 layers"),
        ({"sliding_layers": (True, False)}, "need sliding_window"),
        ({"sliding_layers": (True, False), "sliding_window": 0}, "need sliding_window"),
    ],
    ids=str,
)
def test_models_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        dataclasses.replace(CONFIGS["llama"], **changes)


@pytest.mark.quick
@pytest.mark.parametrize("family", CONFIGS)
def test_number_of_parameters_is_what_the_tree_holds(family):
    config = CONFIGS[family]
    shapes = jax.eval_shape(Decoder(config).init, jax.random.key(0))
    assert config.n_params() == sum(leaf.size for leaf in jax.tree.leaves(shapes))
    # The tree that the readers of weight files make has the same leaves and shapes.
    assert jax.tree.map(lambda leaf: leaf.shape, shapes) == jax.tree.map(np.shape, random_params(config))


@pytest.mark.quick
def test_scale_of_attention():
    assert CONFIGS["llama"].query_scale == 8**-0.5
    assert CONFIGS["gemma3"].query_scale == 256**-0.5
    assert dataclasses.replace(CONFIGS["llama"], attention_scale=0.3).query_scale == 0.3


@pytest.mark.quick
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"alpha": float("nan")}, "alpha must be a finite number, not nan"),
        ({"alpha": float("inf")}, "alpha must be a finite number, not inf"),
        ({"targets": ()}, f"at least one target layer; there are: {', '.join(LINEAR_NAMES)}"),
        ({"targets": ("q_proj", "lm_head")}, "no linear layer named lm_head; there are: q_proj, "),
        ({"targets": "q_proj"}, "no linear layer named"),
    ],
    ids=str,
)
def test_adapters_that_cannot_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**changes)


@pytest.mark.quick
def test_what_multiplies_an_adapter():
    assert LoraConfig(rank=4, alpha=6.0).scaling == 1.5
    assert LoraConfig(rank=4, alpha=6.0, rslora=True).scaling == 3.0


@pytest.mark.quick
def test_new_adapters_have_the_start_of_peft():
    config, lora = CONFIGS["gemma3"], LoraConfig(rank=3, targets=("q_proj", "down_proj"))
    blocks = init_lora(config, lora, jax.random.key(0))["blocks"]
    assert set(blocks) == set(lora.targets)
    for name, pair in blocks.items():
        n_out, n_in = config.linear_shapes()[name]
        a, b = np.asarray(pair["lora_a"]), np.asarray(pair["lora_b"])
        assert a.shape == (config.n_layers, 3, n_in)
        assert b.shape == (config.n_layers, n_out, 3)
        assert not b.any()
        bound = n_in**-0.5
        assert 0.95 * bound < np.abs(a).max() <= bound
        assert a.std() == pytest.approx(bound / 3**0.5, rel=0.15)  # of a uniform distribution
        assert len(np.unique(a)) > 0.99 * a.size  # layers and ranks start apart
    other = init_lora(config, lora, jax.random.key(1))["blocks"]
    assert (np.asarray(other["q_proj"]["lora_a"]) != np.asarray(blocks["q_proj"]["lora_a"])).any()


def test_new_adapters_change_no_bit_of_the_loss():
    config, lora = CONFIGS["llama"], LoraConfig(rank=2)
    tokens, row = np.arange(8, dtype=np.int32)[None], np.ones((1, 8), np.int32)
    batch = Batch(tokens, tokens + 1, row.astype(bool), row, tokens)
    params, adapters = random_params(config), init_lora(config, lora, jax.random.key(0))
    with_them, _ = jax.jit(lambda p, a, b: loss(Decoder(config, lora), p, a, b))(params, adapters, batch)
    without, _ = jax.jit(lambda p, b: loss(Decoder(config), p, {}, b))(params, batch)
    assert float(with_them) == float(without)
