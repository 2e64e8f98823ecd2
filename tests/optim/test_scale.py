"""SCALE: against float64 arithmetic in the paper's orientation, and what every optimizer must keep to."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import optimizer_contract as contract

from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_bytes
from edgejax.optim.scale import leaf_kinds, scale_by_column_norm, scale_sgd

pytestmark = pytest.mark.quick

SHAPES = {
    "embed": {"table": (23, 6)},
    "blocks": {
        "tall": {"kernel": (3, 7, 5), "bias": (3, 7)},
        "wide": {"kernel": (2, 2, 5, 11)},
        "row": {"kernel": (1, 13)},
        "column": {"kernel": (13, 1)},
        "attn_norm": {"scale": (3, 6)},
    },
    "final_norm": {"scale": (6,)},
    "head": {"kernel": (23, 6), "bias": (23,)},
}


def normalised_columns(w, norm):
    """C of arXiv 2506.16659 for W [inputs, outputs]: each column by its length or (authors' code) rms."""
    columns = [w[:, j] / np.sqrt(np.sum(w[:, j] ** 2)) for j in range(w.shape[1])]
    return np.stack(columns, axis=1) * (np.sqrt(w.shape[0]) if norm == "rms" else 1)


class Paper:
    """All leaves by algorithm 1, float64; vectors by Adam (arXiv 1412.6980) with its defaults."""

    def __init__(self, *, beta, norm):
        self.beta, self.norm, self.t, self.m, self.v = beta, norm, 0, {}, {}

    def step(self, gradients):
        self.t += 1
        return {name: self.direction(name, g) for name, g in gradients.items()}

    def direction(self, name, g):
        last = name.rpartition(".")[2]
        if last in ("scale", "bias"):
            self.m[name] = 0.9 * self.m.get(name, 0) + 0.1 * g
            self.v[name] = 0.999 * self.v.get(name, 0) + 0.001 * g * g
            m, v = self.m[name] / (1 - 0.9**self.t), self.v[name] / (1 - 0.999**self.t)
            return m / (np.sqrt(v) + 1e-8)
        if name == "head.kernel":
            g = self.m[name] = self.beta * self.m.get(name, 0) + (1 - self.beta) * g
        if name == "embed.table":  # [V, D], which is [inputs, outputs]
            return normalised_columns(g, self.norm)
        matrices = g.reshape(-1, *g.shape[-2:])  # [O, I] each
        return np.stack([normalised_columns(w.T, self.norm).T for w in matrices]).reshape(g.shape)


def by_name(tree):
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(key.key for key in path): np.asarray(leaf, np.float64) for path, leaf in flat}


@pytest.mark.parametrize("norm", ["rms", "l2"])
def test_directions_are_the_papers(norm):
    optimizer, paper = scale_by_column_norm(0.8, norm=norm), Paper(beta=0.8, norm=norm)
    state = optimizer.init(contract.tree(shapes=SHAPES))
    for seed in range(5):
        gradient = contract.tree(seed, shapes=SHAPES)
        updates, state = contract.compiled(optimizer)(gradient, state)
        got, want = by_name(updates), paper.step(by_name(gradient))
        for name in want:
            np.testing.assert_allclose(got[name], want[name], rtol=1e-4, err_msg=name)


def test_a_tied_table_is_the_head():
    """Its update is what an untied head's would be: rows normalised, momentum kept."""
    tied, untied = {"embed": {"table": (23, 6)}}, {"embed": {"table": (5, 6)}, "head": {"kernel": (23, 6)}}
    optimizer = scale_by_column_norm()
    state, other = (optimizer.init(contract.tree(shapes=shapes)) for shapes in (tied, untied))
    for seed in range(3):
        gradient = contract.tree(seed, shapes=tied)
        both = contract.tree(seed, shapes=untied) | {"head": {"kernel": gradient["embed"]["table"]}}
        updates, state = optimizer.update(gradient, state)
        of_head, other = optimizer.update(both, other)
        np.testing.assert_array_equal(updates["embed"]["table"], of_head["head"]["kernel"])
    assert not isinstance(state.mu["embed"]["table"], optax.MaskedNode)
    assert isinstance(other.mu["embed"]["table"], optax.MaskedNode)


def test_choices_of_leaves():
    params = contract.tree(shapes=SHAPES)
    names = list(by_name(params))

    def chosen(field, **masks):
        kinds = leaf_kinds(params, **masks)
        return {name for name, kind in zip(names, kinds, strict=True) if getattr(kind, field)}

    kernels = {name for name in names if name.endswith(("kernel", "table"))}
    assert chosen("matrix") == kernels
    assert chosen("momentum") == {"head.kernel"}
    assert chosen("inputs_first") == {"embed.table"}
    wide = "blocks.wide.kernel"
    as_tree = jax.tree_util.tree_map_with_path(lambda path, _: path[1].key == "wide", params)
    assert chosen("momentum", momentum_mask=lambda name: name == wide) == {wide}
    assert chosen("momentum", momentum_mask=as_tree) == {wide}
    assert chosen("inputs_first", inputs_first_mask=as_tree) == {wide}
    assert chosen("matrix", matrix_mask=as_tree) == {wide}
    assert chosen("momentum", matrix_mask=as_tree) == set()  # the head follows Adam then
    with pytest.raises(ConfigError, match="tree of bools"):
        chosen("momentum", momentum_mask={"head": True})
    with pytest.raises(ConfigError, match=r"final_norm\.scale"):
        chosen("matrix", matrix_mask=lambda name: True)


def test_the_state_is_the_heads_and_the_vectors():
    state = scale_sgd(1e-3).init(contract.tree(shapes=SHAPES))
    vectors = 3 * 7 + 3 * 6 + 6 + 23
    assert tree_bytes(state) == 4 * (23 * 6 + 2 * vectors + 1)


def test_rows_without_a_gradient_stay():
    gradient = np.ones((8, 6), np.float32)
    gradient[3] = 0
    optimizer = scale_by_column_norm()
    updates, _ = optimizer.update({"w": gradient}, optimizer.init({"w": gradient}))
    np.testing.assert_array_equal(updates["w"], gradient)


def test_vector_scale():
    params = contract.tree()
    (one,), _ = contract.run(scale_by_column_norm(), params, [1])
    (five,), _ = contract.run(scale_by_column_norm(vector_scale=5.0), params, [1])
    np.testing.assert_allclose(five["final_norm"]["scale"], 5 * one["final_norm"]["scale"], rtol=1e-6)
    np.testing.assert_array_equal(five["head"]["kernel"], one["head"]["kernel"])


def test_contract():
    optimizer = scale_sgd(0.01)
    contract.zero_gradient_gives_zero_update(optimizer)
    contract.state_is_stable_and_compiles_once(optimizer)
    contract.updates_have_the_gradients_dtype(optimizer, tolerance=0.01)
    contract.runs_within_scan(optimizer)
    contract.resumes_with_the_same_bits(lambda: scale_sgd(0.01))
    contract.goes_downhill(scale_sgd, steps=400)


def test_extra_arguments_are_ignored():
    params, optimizer = contract.tree(), scale_sgd(0.1)
    state = optimizer.init(params)
    plain, _ = contract.compiled(optimizer)(params, state, params)
    extra, _ = contract.compiled(optimizer)(params, state, params, value=1.0, salt=3)
    contract.assert_same_bits(plain, extra)


def test_schedule_and_weight_decay():
    params = contract.tree()
    zero = jax.tree.map(jnp.zeros_like, params)
    mask = jax.tree.map(lambda x: x.ndim == 3, params)
    optimizer = scale_sgd(optax.linear_schedule(1.0, 0.0, 4), weight_decay=0.1, mask=mask)
    state = optimizer.init(params)
    for rate in (1.0, 0.75):
        updates, state = contract.compiled(optimizer)(zero, state, params)
        kernel = params["blocks"]["q_proj"]["kernel"]
        np.testing.assert_allclose(updates["blocks"]["q_proj"]["kernel"], -rate * 0.1 * kernel, rtol=1e-6)
        np.testing.assert_array_equal(updates["embed"]["table"], np.zeros((23, 6)))


def test_inject_hyperparams():
    params = contract.tree()
    injected = optax.inject_hyperparams(scale_sgd)(optax.linear_schedule(0.1, 0.0, 10))
    contract.state_is_stable_and_compiles_once(injected)
    got, state = contract.run(injected, params, range(4))
    want, _ = contract.run(scale_sgd(optax.linear_schedule(0.1, 0.0, 10)), params, range(4))
    contract.assert_close(got, want, rtol=2e-4, atol=1e-6)
    assert set(state.hyperparams) >= {"learning_rate", "momentum", "eps", "b1", "b2", "vector_scale"}
    masked = optax.inject_hyperparams(scale_sgd, static_args="momentum_mask")
    state = masked(0.1, momentum_mask=lambda name: name == "embed.table").init(params)
    assert state.inner_state[0].mu["embed"]["table"].shape == (23, 6)


def test_partition():
    """A head that another optimizer has is a head still: the table is no tied one."""
    params = contract.tree()
    labels = {name: "adam" if name == "head" else "scale" for name in params}
    mixed = optax.partition({"adam": optax.adam(1.0), "scale": scale_sgd(0.01)}, labels)
    contract.state_is_stable_and_compiles_once(mixed)
    got, _ = contract.run(mixed, params, range(3))
    want, _ = contract.run(scale_sgd(0.01), params, range(3))
    for g, w in zip(got, want, strict=True):
        contract.assert_close({**g, "head": 0}, {**w, "head": 0})


@pytest.mark.parametrize(("options", "match"), [
    ({"norm": "max"}, "rms, l2, not 'max'"),
    ({"momentum": 1.0}, "momentum must be at least 0 and below 1, not 1.0"),
    ({"b1": -0.1}, "b1"),
    ({"b2": 1}, "b2"),
    ({"eps": 0.0}, "eps must be above 0"),
    ({"vector_scale": math.inf}, "vector_scale must be at least 0 and finite, not inf"),
])  # fmt: skip
def test_bad_options(options, match):
    with pytest.raises(ConfigError, match=match):
        scale_sgd(0.1, **options)
