"""APOLLO: against float64 arithmetic in the paper's orientation, and what every optimizer must keep to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import optimizer_contract as contract

from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_bytes
from edgejax.optim.apollo import apollo, apollo_mini, scale_by_apollo
from edgejax.optim.apollo_step import leaf_key, projections

pytestmark = pytest.mark.quick

RANK, EVERY = 3, 3
OPTIMIZERS = {
    "apollo": apollo(0.01, RANK, update_projection_every=EVERY),
    "apollo_mini": apollo_mini(0.01, update_projection_every=EVERY),
}
each = pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)


class Paper:
    """One matrix W [m, n], m <= n, by algorithm 1 of arXiv 2412.05270 with Fira's limiter, float64."""

    def __init__(self, *, b1, b2, eps, alpha, gamma, mini):
        self.b1, self.b2, self.eps, self.alpha, self.gamma, self.mini = b1, b2, eps, alpha, gamma, mini
        self.t, self.m, self.v, self.last = 0, 0.0, 0.0, None
        self.limited = 0

    def step(self, g, p):
        """g [m, n], p [r, m] -> direction [m, n]."""
        self.t += 1
        r = p @ g
        self.m = self.b1 * self.m + (1 - self.b1) * r
        self.v = self.b2 * self.v + (1 - self.b2) * r * r
        adapted = self.m / (np.sqrt(self.v) + self.eps)
        if self.mini:
            s = np.sqrt(np.sum(adapted**2) / np.sum(r**2)) * np.ones(g.shape[1])
        else:
            s = np.array([np.linalg.norm(adapted[:, j]) / np.linalg.norm(r[:, j]) for j in range(g.shape[1])])
        scaled = g @ np.diag(s)
        if self.last is not None and np.linalg.norm(scaled) / self.last > self.gamma:
            scaled = scaled / np.linalg.norm(scaled) * self.gamma * self.last
            self.limited += 1
        self.last = np.linalg.norm(scaled)
        return self.alpha * np.sqrt(1 - self.b2**self.t) / (1 - self.b1**self.t) * scaled


SHAPES = {
    "tall": (13, 7),
    "wide": (7, 13),
    "square": (9, 9),
    "one": (1, 8, 6),
    "stack": (3, 13, 7),
    "deep": (2, 2, 5, 11),
}


@pytest.mark.parametrize("mode", ["channel", "tensor"])
def test_directions_are_the_papers(mode):
    rank = RANK if mode == "channel" else 1
    options = {"b1": 0.8, "b2": 0.98, "eps": 1e-6}
    optimizer = scale_by_apollo(rank, scale=1.7, mode=mode, update_projection_every=EVERY, seed=5, **options)
    papers = {
        name: [
            Paper(alpha=1.7, gamma=1.01, mini=mode == "tensor", **options)
            for _ in range(math.prod(shape[:-2]))
        ]
        for name, shape in SHAPES.items()
    }
    draw, state = np.random.default_rng(0), optimizer.init(contract.tree(shapes=SHAPES))
    for step in range(8):
        gradients = {
            name: draw.normal(2, 1, shape) * (5 if step == 4 else 1) for name, shape in SHAPES.items()
        }
        narrow = {name: jnp.asarray(gradient, jnp.float32) for name, gradient in gradients.items()}
        updates, state = contract.compiled(optimizer)(narrow, state)
        for name, gradient in gradients.items():
            n_out, n_in = gradient.shape[-2:]
            drawn = projections(
                leaf_key(5, step // EVERY, name), jnp.arange(len(papers[name])), rank, min(n_out, n_in)
            )
            rows = zip(
                papers[name], gradient.reshape(-1, n_out, n_in), np.asarray(drawn, np.float64), strict=True
            )
            want = [paper.step(g, p) if n_out < n_in else paper.step(g.T, p).T for paper, g, p in rows]
            got = updates[name].reshape(-1, n_out, n_in)
            np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4 * np.abs(want).max())
            np.testing.assert_allclose(state.norm[name].ravel(), [p.last for p in papers[name]], rtol=1e-4)
    limited = [paper.limited for group in papers.values() for paper in group]
    assert 0 < sum(limited) < 7 * len(limited)  # growth was bounded in some steps, and free in others


def test_growth_is_bounded_or_not():
    gradient = {"w": jnp.ones((8, 6))}
    growth = {}
    for gamma in (1.01, 1.5, None):
        optimizer = scale_by_apollo(2, norm_growth=gamma)
        _, first = optimizer.update(gradient, optimizer.init(gradient))
        _, second = optimizer.update(gradient, first)
        growth[gamma] = float(second.norm["w"] / first.norm["w"])
    # m / sqrt(v) of a constant gradient: 0.1 / sqrt(0.001), then 0.19 / sqrt(0.001999)
    free = 1.9 / math.sqrt(1.999)
    assert growth == pytest.approx({1.01: 1.01, 1.5: free, None: free}, rel=1e-4)


def test_a_first_gradient_of_zero_does_not_hold_later_ones():
    optimizer = scale_by_apollo(2)
    zero, gradient = {"w": jnp.zeros((8, 6))}, {"w": jnp.ones((8, 6))}
    _, state = optimizer.update(zero, optimizer.init(zero))
    assert float(state.norm["w"]) == 0
    updates, state = optimizer.update(gradient, state)
    assert np.linalg.norm(updates["w"]) > 0.1
    length = float(state.norm["w"])
    _, state = optimizer.update(zero, state)
    assert float(state.norm["w"]) == length


def test_channels_without_a_gradient_stay():
    gradient = np.ones((8, 6), np.float32)
    optimizer = scale_by_apollo(2)
    _, state = optimizer.update({"w": gradient}, optimizer.init({"w": gradient}))
    gradient[3] = 0
    updates, _ = optimizer.update({"w": gradient}, state)
    np.testing.assert_array_equal(updates["w"][3], np.zeros(6))
    assert np.isfinite(updates["w"]).all()


OTHERS = {
    "vector": (17,), "number": (), "row": (1, 17), "column": (17, 1), "low": (13, RANK),
    "flat": (2, RANK, 13), "norm": {"scale": (28, 64)}, "linear": {"bias": (28, 64)},
}  # fmt: skip


def test_the_others_follow_adam():
    ours, adam = scale_by_apollo(RANK, b1=0.85, b2=0.97, scale=9.0), optax.scale_by_adam(b1=0.85, b2=0.97)
    params = contract.tree(shapes=OTHERS)
    state, adam_state = ours.init(params), adam.init(params)
    assert contract.form(state.mu) == contract.form(state.nu) == contract.form(params)
    assert not jax.tree.leaves(state.norm)
    for seed in range(4):
        gradient = contract.tree(seed, shapes=OTHERS)
        updates, state = contract.compiled(ours)(gradient, state)
        want, adam_state = contract.compiled(adam)(gradient, adam_state)
        contract.assert_close(updates, want, rtol=1e-6)


def test_projections():
    def draw(seed, period, name, place):
        return np.asarray(projections(leaf_key(seed, period, name), jnp.array([place]), 8, 5000)[0])

    p = draw(0, 0, "blocks.kernel", 0)
    assert p.dtype == np.float32
    assert np.var(p) == pytest.approx(1 / 8, rel=0.05)
    assert np.mean(p) == pytest.approx(0, abs=0.01)
    for other in [
        (1, 0, "blocks.kernel", 0),
        (0, 1, "blocks.kernel", 0),
        (0, 0, "embed.table", 0),
        (0, 0, "blocks.kernel", 1),
    ]:
        assert abs(np.corrcoef(p.ravel(), draw(*other).ravel())[0, 1]) < 0.03
    with jax.default_prng_impl("rbg"):  # a setting of the process does not change them
        np.testing.assert_array_equal(draw(0, 0, "blocks.kernel", 0), p)


def test_a_projection_stays_for_its_period():
    optimizer = scale_by_apollo(2, b1=0.0, update_projection_every=3)
    gradient = {"w": jnp.ones((8, 6))}
    state, moments = optimizer.init(gradient), []
    for _ in range(7):
        _, state = contract.compiled(optimizer)(gradient, state)
        moments.append(np.asarray(state.mu["w"]))  # R itself, as b1 is 0
    for step, moment in enumerate(moments):
        p = projections(leaf_key(0, step // 3, "w"), jnp.arange(1), 2, 6)[0]
        np.testing.assert_allclose(moment, np.ones((8, 6)) @ p.T, rtol=1e-5)
    assert np.abs(moments[2] - moments[3]).max() > 0.01


def test_state_is_as_small_as_promised():
    shapes = {"wide": (40, 70), "tall": (90, 30), "stack": (5, 24, 16), "norm": {"scale": (5, 24)}}
    for rank, factory in [(4, lambda: scale_by_apollo(4)), (1, lambda: apollo_mini(0.1))]:
        state = factory().init(contract.tree(shapes=shapes))
        matrices = 2 * rank * (70 + 90 + 5 * 24) + (1 + 1 + 5)  # moments of R, and |N'| of each matrix
        floats = matrices + 2 * 5 * 24 + 1  # Adam's moments, the count
        assert tree_bytes(state) == 4 * floats


def test_slices_of_a_stack_may_be_updated_alone():
    optimizer = scale_by_apollo(2, update_projection_every=2)
    stack = jnp.asarray(np.random.default_rng(2).normal(size=(4, 3, 8, 6)), jnp.float32)
    state = optimizer.init({"w": stack[0]})
    alone = [optimizer.init({"w": stack[0, i]}) for i in range(3)]
    for gradient in stack:
        whole, state = contract.compiled(optimizer)({"w": gradient}, state)
        for i in range(3):
            part, alone[i] = contract.compiled(optimizer)({"w": gradient[i]}, alone[i], salt=jnp.int32(i))
            np.testing.assert_allclose(part["w"], whole["w"][i], rtol=1e-5)


def test_matrix_mask():
    params = contract.tree()

    def blocks(name):
        return name.startswith("blocks.") and name.endswith("kernel")

    as_tree = jax.tree_util.tree_map_with_path(
        lambda path, _: path[0].key == "blocks" and path[-1].key == "kernel", params
    )
    states = [scale_by_apollo(2, matrix_mask=mask).init(params) for mask in (blocks, as_tree)]
    assert contract.form(states[0]) == contract.form(states[1])
    assert states[0].mu["embed"]["table"].shape == (23, 6)
    assert states[0].mu["blocks"]["q_proj"]["kernel"].shape == (3, 7, 2)
    with pytest.raises(ConfigError, match=r"final_norm\.scale.*\(6,\)"):
        scale_by_apollo(2, matrix_mask=lambda name: True).init(params)
    for wrong in ({"embed": True}, jax.tree.map(lambda _: 1, params), True):
        with pytest.raises(ConfigError, match="tree of bools"):
            scale_by_apollo(2, matrix_mask=wrong).init(params)


@each
def test_contract(optimizer):
    contract.zero_gradient_gives_zero_update(optimizer)
    contract.state_is_stable_and_compiles_once(optimizer)
    contract.updates_have_the_gradients_dtype(optimizer, tolerance=0.01)
    contract.runs_within_scan(optimizer)


def test_resumes_with_the_same_bits():
    contract.resumes_with_the_same_bits(lambda: apollo(0.01, RANK, update_projection_every=EVERY))


@pytest.mark.parametrize("factory", [lambda rate: apollo(rate, RANK), apollo_mini], ids=OPTIMIZERS)
def test_goes_downhill(factory):
    contract.goes_downhill(factory, steps=400)


def test_extra_arguments_are_ignored():
    params = contract.tree()
    optimizer = OPTIMIZERS["apollo_mini"]
    state = optimizer.init(params)
    plain, _ = contract.compiled(optimizer)(params, state, params)
    extra, _ = contract.compiled(optimizer)(params, state, params, value=1.0, key=None)
    contract.assert_same_bits(plain, extra)


def test_schedule_and_weight_decay():
    params = contract.tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    mask = jax.tree.map(lambda x: x.ndim == 3, params)
    optimizer = apollo(optax.linear_schedule(1.0, 0.0, 4), 2, weight_decay=0.1, mask=mask)
    state = optimizer.init(params)
    for rate in (1.0, 0.75):
        updates, state = contract.compiled(optimizer)(zero, state, params)
        kernel = params["blocks"]["q_proj"]["kernel"]
        np.testing.assert_allclose(updates["blocks"]["q_proj"]["kernel"], -rate * 0.1 * kernel, rtol=1e-6)
        np.testing.assert_array_equal(updates["embed"]["table"], np.zeros((23, 6)))


def test_inject_hyperparams():
    params = contract.tree()
    injected = optax.inject_hyperparams(apollo, static_args="rank")(
        optax.linear_schedule(0.1, 0.0, 10), rank=RANK, update_projection_every=EVERY
    )
    contract.state_is_stable_and_compiles_once(injected)
    got, state = contract.run(injected, params, range(4))
    want, _ = contract.run(OPTIMIZERS["apollo"], params, range(4))  # of a rate of 0.01
    rates = [0.1, 0.09, 0.08, 0.07]
    scaled = [
        jax.tree.map(lambda x, rate=rate: x * rate / 0.01, w) for w, rate in zip(want, rates, strict=True)
    ]
    contract.assert_close(got, scaled, rtol=2e-4, atol=1e-6)
    assert set(state.hyperparams) >= {"learning_rate", "b1", "b2", "eps", "scale", "seed", "weight_decay"}
    jax.eval_shape(lambda p: optax.inject_hyperparams(apollo_mini)(0.1).init(p), params)  # nothing is static
    with pytest.raises(ConfigError, match="static_args"):
        optax.inject_hyperparams(apollo)(0.1).init(params)


def test_partition():
    params = contract.tree()
    labels = {name: "sgd" if name == "embed" else "apollo" for name in params}
    mixed = optax.partition({"sgd": optax.sgd(1.0), "apollo": OPTIMIZERS["apollo"]}, labels)
    contract.state_is_stable_and_compiles_once(mixed)
    got, _ = contract.run(mixed, params, range(3))
    want, _ = contract.run(OPTIMIZERS["apollo"], params, range(3))
    for g, w in zip(got, want, strict=True):
        contract.assert_close({**g, "embed": 0}, {**w, "embed": 0})


@pytest.mark.parametrize(("options", "match"), [
    ({"rank": 0}, "rank.*not 0"),
    ({"rank": 2.0}, "rank.*not 2.0"),
    ({"mode": "row"}, "channel, tensor, not 'row'"),
    ({"update_projection_every": 0}, "at least 1, not 0"),
    ({"update_projection_every": 1.5}, "whole number"),
    ({"b1": 1.0}, "b1 must be at least 0 and below 1, not 1.0"),
    ({"b2": -0.1}, "b2"),
    ({"eps": 0}, "eps must be above 0"),
    ({"scale": 0.0}, "scale must be above 0"),
    ({"scale": math.nan}, "not nan"),
    ({"norm_growth": 0.9}, "norm_growth must be at least 1"),
])  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(ConfigError, match=match):
        apollo(0.1, **options)
