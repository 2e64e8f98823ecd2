"""What every optimizer of ``edgejax.optim`` promises, collected from what it exports."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import edgejax.optim as optim
from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_bytes, tree_paths
from edgejax.optim.moments import QuantizedMoment
from edgejax.optim.momentum import scale_by_lion, trace

pytestmark = pytest.mark.quick

FACTORIES = {
    name: getattr(optim, name)
    for name in optim.__all__
    if callable(getattr(optim, name))
    and "learning_rate" in inspect.signature(getattr(optim, name)).parameters
}
VARIANTS = {
    name: (factory, {"bits": bits} if bits else {})
    for label, factory in FACTORIES.items()
    for bits in ((32, 8, 4) if "bits" in inspect.signature(factory).parameters else (None,))
    for name in [f"{label}-{bits}" if bits else label]
}


def params(seed: int = 0, dtype=jnp.float32) -> dict:
    """Two layers' matrices, a table, a vector; sizes that no block divides among them."""
    random = np.random.default_rng(seed)
    draw = lambda *shape: jnp.asarray(random.standard_normal(shape), dtype)  # noqa: E731
    return {
        "embed": {"table": draw(130, 64)},
        "blocks": {"q_proj": {"kernel": draw(2, 67, 64)}, "norm": {"scale": draw(2, 64)}},
    }


@pytest.fixture(params=VARIANTS)
def variant(request):
    factory, options = VARIANTS[request.param]
    return lambda rate=1e-2, **more: factory(rate, **options, **more)


def test_there_are_optimizers():
    assert {"adamw", "adamw8bit", "adamw4bit", "lion8bit", "sgd8bit"} <= set(FACTORIES)


def test_state_and_updates_keep_shapes_and_dtypes_and_nothing_is_compiled_twice(variant):
    optimizer, start = variant(), params()
    step = jax.jit(optimizer.update)
    state = jax.jit(optimizer.init)(start)
    form = lambda tree: jax.tree.map(lambda x: (x.shape, x.dtype), tree)  # noqa: E731
    first = form(state)
    for seed in (1, 2):
        updates, state = step(params(seed), state, start)
        assert form(updates) == form(start)
        assert form(state) == first
    assert step._cache_size() == 1


def test_zero_gradients_move_nothing(variant):
    optimizer, start = variant(), params()
    state, zeros = optimizer.init(start), jax.tree.map(jnp.zeros_like, start)
    for _ in range(3):
        updates, state = optimizer.update(zeros, state, start)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(updates))
    assert all(np.isfinite(np.asarray(x, np.float32)).all() for x in jax.tree.leaves(state))


def test_a_parameter_whose_gradient_is_always_zero_stays_where_it_is(variant):
    optimizer, start = variant(), params()
    state = optimizer.init(start)
    column = np.arange(64) % 2 == 0
    for seed in range(1, 20):
        gradient = jax.tree.map(lambda leaf: leaf * column, params(seed))
        updates, state = optimizer.update(gradient, state, start)
        for leaf in jax.tree.leaves(updates):
            assert not np.asarray(leaf)[..., ~column].any()


def test_it_finds_the_minimum_of_a_parabola(variant):
    optimizer, goal = variant(optax.cosine_decay_schedule(0.05, 400)), params()
    start = jax.tree.map(jnp.zeros_like, goal)

    @jax.jit
    def run(x):
        def step(carry, _):
            x, state = carry
            updates, state = optimizer.update(jax.tree.map(jnp.subtract, x, goal), state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, optimizer.init(x)), None, length=400)[0][0]

    distance = lambda x: float(optax.tree.norm(jax.tree.map(jnp.subtract, x, goal)))  # noqa: E731
    assert distance(run(start)) < 0.2 * distance(start)


def test_bfloat16_gradients_give_bfloat16_updates(variant):
    optimizer, start = variant(), params(dtype=jnp.bfloat16)
    updates, _ = optimizer.update(params(1, jnp.bfloat16), optimizer.init(start), start)
    assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {jnp.dtype(jnp.bfloat16)}


def test_hyperparameters_can_be_injected(variant):
    factory = optax.inject_hyperparams(lambda learning_rate: variant(learning_rate))
    optimizer, start = factory(learning_rate=lambda step: 0.5 ** (step + 1)), params()
    state = optimizer.init(start)
    sizes = []
    for _ in range(2):
        updates, state = jax.jit(optimizer.update)(params(1), state, start)
        sizes.append(float(state.hyperparams["learning_rate"]))
    assert sizes == [0.5, 0.25]
    assert jax.tree.leaves(updates)[0].any()


def test_it_can_be_one_of_several(variant):
    labels = lambda tree: jax.tree_util.tree_map_with_path(  # noqa: E731
        lambda path, _: "frozen" if path[0].key == "embed" else "ours", tree
    )
    optimizer, start = (
        optax.multi_transform({"ours": variant(), "frozen": optax.set_to_zero()}, labels),
        params(),
    )
    updates, _ = optimizer.update(params(1), optimizer.init(start), start)
    assert not np.asarray(updates["embed"]["table"]).any()
    assert np.asarray(updates["blocks"]["q_proj"]["kernel"]).any()


def test_a_saved_state_goes_on_with_the_same_bits(variant):
    optimizer, start = variant(), params()
    step = jax.jit(
        lambda x, state, g: (lambda u, s: (optax.apply_updates(x, u), s))(*optimizer.update(g, state, x))
    )

    def run(x, state, seeds):
        for seed in seeds:
            x, state = step(x, state, params(seed))
        return x, state

    x, state = run(start, optimizer.init(start), (1, 2))
    saved = [np.asarray(leaf).copy() for leaf in jax.tree.leaves((x, state))]
    unbroken = run(x, state, (3, 4))
    restored = jax.tree.unflatten(jax.tree.structure((x, state)), [jnp.asarray(leaf) for leaf in saved])
    again = run(*restored, (3, 4))
    for ours, theirs in zip(jax.tree.leaves(again), jax.tree.leaves(unbroken), strict=True):
        assert np.array_equal(np.asarray(ours), np.asarray(theirs))


@pytest.mark.parametrize(
    ("transform", "bound"),
    [
        (optim.scale_by_adam(bits=8), 2.07),
        (optim.scale_by_adam(bits=4), 1.07),
        (scale_by_lion(bits=8), 1.04),
        (trace(0.9, bits=8), 1.04),
        (trace(0.9, bits=4), 0.54),
    ],
    ids=["adam-8", "adam-4", "lion-8", "sgd-8", "sgd-4"],
)
def test_bytes_of_state_and_the_update_in_place(transform, bound):
    """Temporary memory of a whole update stays below 5% of the state, and the state is updated in its own buffers."""
    shapes = {
        "table": jax.ShapeDtypeStruct((49152, 576), jnp.float32),
        "stack": jax.ShapeDtypeStruct((30, 1536, 576), jnp.float32),
        "small": jax.ShapeDtypeStruct((576,), jnp.float32),
    }
    state = jax.eval_shape(transform.init, shapes)
    size = tree_bytes(state)
    assert size / sum(leaf.size for leaf in shapes.values()) < bound
    update = jax.jit(transform.update, donate_argnums=(0, 1))
    memory = update.lower(shapes, state).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.05 * size
    assert memory.alias_size_in_bytes >= tree_bytes(shapes) + size - 64


@pytest.mark.parametrize("bits", [0, 2, 16, 7, "4"])
def test_other_widths_are_refused(bits):
    for factory in (optim.adamw, optim.lion, optim.sgd):
        with pytest.raises(ConfigError, match="32, 8, 4 bits"):
            factory(1e-3, bits=bits)
    with pytest.raises(ConfigError, match="no code named 'log'"):
        optim.adamw(1e-3, bits=8, code="log")


def test_small_leaves_stay_wide():
    state = optim.adamw4bit(1e-3).init(params())[0]
    kinds = {
        name: type(leaf) is QuantizedMoment
        for name, leaf in tree_paths(state.mu, is_leaf=lambda x: isinstance(x, QuantizedMoment)).items()
    }
    assert kinds == {"embed.table": True, "blocks.q_proj.kernel": True, "blocks.norm.scale": False}


def test_float32_moments_are_those_of_optax():
    start, ours, theirs = params(), optim.adamw(1e-2, weight_decay=0.1), optax.adamw(1e-2, weight_decay=0.1)
    x, y, s, t = start, start, ours.init(start), theirs.init(start)
    for seed in range(1, 6):
        u, s = ours.update(params(seed), s, x)
        v, t = theirs.update(params(seed), t, y)
        x, y = optax.apply_updates(x, u), optax.apply_updates(y, v)
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("ours", "theirs"), [("lion", "lion"), ("sgd", "sgd")])
def test_the_others_are_those_of_optax_too(ours, theirs):
    options = {"momentum": 0.9, "nesterov": True} if ours == "sgd" else {"b1": 0.9, "b2": 0.99}
    start = params()
    decay = {} if ours == "sgd" else {"weight_decay": 0.0}
    a, b = getattr(optim, ours)(1e-2, **options, **decay), getattr(optax, theirs)(1e-2, **options, **decay)
    s, t = a.init(start), b.init(start)
    for seed in range(1, 5):
        u, s = a.update(params(seed), s, start)
        v, t = b.update(params(seed), t, start)
    for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-7)
