"""Every optimizer by name keeps the contract of a training step; every option is honoured or refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from edgejax.core.errors import ConfigError
from edgejax.train import decay_mask, make_optimizer, make_schedule, optimizer_names

pytestmark = pytest.mark.quick

COMPILED = ("adamw", "adafactor", "lion", "lamb", "sgd", "nadamw")  # the others are traced: compiling is slow
CONSTANT_ONLY = ("rprop", "sm3")


def tree(seed: int = 0):
    random = np.random.default_rng(seed)
    shapes = {"q_proj": {"kernel": (2, 130, 131), "bias": (2, 4)}, "norm": {"scale": (2, 5)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(random.standard_normal(shape), jnp.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def avals(value):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), value)


@pytest.mark.parametrize("name", optimizer_names())
def test_state_keeps_its_shapes_and_dtypes(name):
    rate = 1e-3 if name in CONSTANT_ONLY else make_schedule("cosine", 1e-3, steps=10, warmup=2)
    optimizer = make_optimizer(name, rate)

    def step(params, gradients):
        state = optimizer.init(params)
        updates, after = optimizer.update(gradients, state, params)
        return state, after, optax.apply_updates(params, updates)

    params = tree()
    before, after, updated = jax.eval_shape(step, params, params)
    assert jax.tree.structure(before) == jax.tree.structure(after)
    assert avals(before) == avals(after)
    assert avals(updated) == avals(params)


@pytest.mark.parametrize("name", COMPILED)
def test_second_step_does_not_compile_again_and_updates_everything(name):
    optimizer = make_optimizer(name, 1e-2)

    @jax.jit
    def step(params, state, gradients):
        updates, state = optimizer.update(gradients, state, params)
        return optax.apply_updates(params, updates), state

    params = start = tree()
    state = optimizer.init(params)
    for seed in (1, 2):
        params, state = step(params, state, tree(seed))
    assert step._cache_size() == 1
    for old, new in zip(jax.tree.leaves(start), jax.tree.leaves(params), strict=True):
        assert np.isfinite(new).all()
        assert (np.asarray(old) != np.asarray(new)).any()


def test_names_are_those_of_optax():
    names = optimizer_names()
    assert {"adamw", "adam", "sgd", "lion", "adafactor", "lamb", "rmsprop", "nadamw"} <= set(names)
    assert not {"lbfgs", "noisy_sgd", "scale_by_learning_rate", "clip", "optimistic_adam"} & set(names)


@pytest.mark.parametrize("name", ["adamww", "", "lbfgs", "chain", "Array", "__name__"])
def test_unknown_name_lists_those_there_are(name):
    with pytest.raises(ConfigError, match=r"there are: .*adamw.*lion.*sgd"):
        make_optimizer(name, 1e-3)


def test_reason_for_an_optimizer_left_out():
    with pytest.raises(ConfigError, match="line search"):
        make_optimizer("lbfgs", 1e-3)


def test_unknown_option_is_named():
    with pytest.raises(ConfigError, match=r"'sgd' has no option 'b1'; it has: momentum, nesterov"):
        make_optimizer("sgd", 1e-3, options={"b1": 0.9})


@pytest.mark.parametrize("option", ["learning_rate", "weight_decay", "mask"])
def test_settings_of_their_own_are_no_options(option):
    with pytest.raises(ConfigError, match=f"{option}.*setting of its own"):
        make_optimizer("adamw", 1e-3, options={option: 1})


def test_option_of_the_wrong_kind_is_found_before_training():
    with pytest.raises(ConfigError, match="cannot be used with options"):
        make_optimizer("adamw", 1e-3, options={"b1": "much"})


@pytest.mark.parametrize("name", ["sgd", "adam", "rmsprop"])
def test_weight_decay_is_never_ignored(name):
    with pytest.raises(
        ConfigError, match=rf"'{name}' has no weight decay \(asked for 0.1\); those that have: .*adamw"
    ):
        make_optimizer(name, 1e-3, weight_decay=0.1)
    make_optimizer(name, 1e-3, weight_decay=0.0)


@pytest.mark.parametrize("name", CONSTANT_ONLY)
def test_schedule_for_an_optimizer_that_takes_none(name):
    make_optimizer(name, 1e-3)
    with pytest.raises(ConfigError, match="constant learning rate"):
        make_optimizer(name, make_schedule("cosine", 1e-3, steps=5))


@pytest.mark.parametrize(
    ("field", "value"), [("clip_norm", 0.0), ("clip_norm", -1.0), ("weight_decay", -0.1)]
)
def test_values_out_of_range(field, value):
    with pytest.raises(ConfigError, match=f"{field}.*{value}"):
        make_optimizer("adamw", 1e-3, **{field: value})


def test_zero_decay_turns_off_the_default_of_optax():
    params = tree()
    optimizer = make_optimizer("adamw", 1.0)  # optax's own default would be 1e-4
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", ["adamw", "lion", "lamb", "adan"])
def test_decay_leaves_norms_and_biases_alone(name):
    params = tree()
    optimizer = make_optimizer(name, 0.1, weight_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = optimizer.update(zeros, optimizer.init(params), params)
    assert np.asarray(updates["q_proj"]["kernel"]).any()
    assert not np.asarray(updates["q_proj"]["bias"]).any()
    assert not np.asarray(updates["norm"]["scale"]).any()


def test_adamw_decay_is_the_decoupled_one():
    params = {"lora_a": jnp.array([2.0, -4.0])}
    optimizer = make_optimizer("adamw", 0.1, weight_decay=0.5)
    updates, _ = optimizer.update({"lora_a": jnp.zeros(2)}, optimizer.init(params), params)
    np.testing.assert_allclose(updates["lora_a"], [-0.1, 0.2], rtol=1e-6)  # -rate * decay * parameter
    assert decay_mask(params) == {"lora_a": True}


@pytest.mark.parametrize(("clip_norm", "expected"), [(1.0, 1.0), (10.0, 5.0), (None, 5.0)])
def test_clipping_is_by_the_norm_of_all_leaves(clip_norm, expected):
    gradients = {"a": jnp.array([3.0]), "b": jnp.array([[4.0]])}
    optimizer = make_optimizer("sgd", 1.0, clip_norm=clip_norm)
    updates, _ = optimizer.update(gradients, optimizer.init(gradients), gradients)
    np.testing.assert_allclose(optax.tree.norm(updates), expected, rtol=1e-6)


def test_options_reach_the_optimizer():
    params = {"w": jnp.ones(3)}
    state = make_optimizer("adamw", 1e-3, options={"mu_dtype": "bfloat16"}).init(params)
    assert jnp.bfloat16 in [leaf.dtype for leaf in jax.tree.leaves(state)]
