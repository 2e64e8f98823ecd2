"""What a layer keeps for its backward pass changes the memory of a step and not its numbers.

Bounds between policies: loss 1e-6 relative, each gradient leaf a cosine of 1 - 1e-6 and a norm within 1e-6.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CONFIGS, LORAS, random_adapters, random_params

from edgejax.core.errors import ConfigError
from edgejax.data import Batch
from edgejax.measure.memory import xla_memory
from edgejax.memory.remat import KEPT_VALUES, rematerialize
from edgejax.models import Decoder, ModelConfig, hidden_states, loss

MOST_TO_LEAST = ("none", "mlp", "attention", "full")  # what is kept
DEEP = ModelConfig(
    family="llama", vocab_size=256, d_model=64, n_layers=6, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160,
    max_position=256, tie_embeddings=True,
)  # fmt: skip
CASES = {"adapters": (DEEP, 256), "all parameters": (CONFIGS["gemma3"], 40)}  # what is trained: model, length


def batch(config: ModelConfig, length: int) -> Batch:
    """One row of two documents and a little padding."""
    random = np.random.default_rng(0)
    first = length // 3
    segments = np.repeat([1, 2, 0], [first, length - first - 3, 3])[None].astype(np.int32)
    positions = np.concatenate([np.arange(first), np.arange(length - first)])[None].astype(np.int32)
    tokens, targets = random.integers(0, config.vocab_size, (2, 1, length)).astype(np.int32)
    return Batch(tokens, targets, (segments > 0) & (random.random((1, length)) < 0.8), segments, positions)


@pytest.fixture(scope="module", params=CASES)
def programs(request):
    """(for each policy the compiled loss and gradient, what they take)."""
    config, length = CASES[request.param]
    params = jax.tree.map(jnp.asarray, random_params(config))
    lora = LORAS["all"] if request.param == "adapters" else None

    def compiled(policy: str):
        def loss_sum(trained, frozen, rows):
            base, adapters = (frozen, trained) if lora else (trained, {})
            decoder = Decoder(config, lora)
            return loss(decoder, base, adapters, rows, frozen_head=lora is not None, remat=policy)[0]

        return jax.jit(jax.value_and_grad(loss_sum)).lower(*arguments).compile()

    trees = (random_adapters(config, lora), params) if lora else (params, {})
    arguments = (*trees, batch(config, length))
    return {policy: compiled(policy) for policy in MOST_TO_LEAST}, arguments


def test_every_policy_gives_the_same_loss_and_gradients(programs):
    by_policy, arguments = programs
    expected_loss, expected = jax.device_get(by_policy["none"](*arguments))
    for policy in MOST_TO_LEAST[1:]:
        value, gradients = jax.device_get(by_policy[policy](*arguments))
        assert float(value) == pytest.approx(float(expected_loss), rel=1e-6), policy
        for (path, ours), theirs in zip(
            jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
        ):
            a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
            where = policy + jax.tree_util.keystr(path)
            assert np.linalg.norm(b) > 0, where
            assert a @ b / (np.linalg.norm(a) * np.linalg.norm(b)) >= 1 - 1e-6, where
            assert np.linalg.norm(a) / np.linalg.norm(b) == pytest.approx(1, rel=1e-6), where


def test_memory_of_a_step_falls_with_what_is_kept(programs):
    figures = [xla_memory(programs[0][policy]).temp_bytes for policy in MOST_TO_LEAST]
    assert all(more > less for more, less in itertools.pairwise(figures)), figures


@pytest.mark.quick
def test_the_policies_are_these():
    assert set(KEPT_VALUES) == set(MOST_TO_LEAST)


@pytest.mark.quick
def test_an_unknown_policy_is_refused_with_the_ones_there_are():
    with pytest.raises(ConfigError, match=r"'some'.*there are: none, attention, mlp, full"):
        rematerialize(lambda x: x, "some")
    config = CONFIGS["llama"]
    with pytest.raises(ConfigError, match="'half'"):
        hidden_states(Decoder(config), random_params(config), {}, jnp.zeros((1, 2), jnp.int32), remat="half")
