"""Boundaries in fewer bits: what comes back, that it is unbiased, and what it does to gradients and memory."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from export_cases import CONFIGS, LORAS, random_adapters, random_params
from helpers.layer_gradients import (
    DEEP,
    FAMILIES,
    MODES,
    assert_same,
    batch_of,
    by_layer,
    calm_params,
    cosines,
    outcome,
    value_and_gradient,
)

from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_bytes
from edgejax.measure.memory import xla_memory
from edgejax.memory import (
    BOUNDARIES,
    batch_key,
    boundary_named,
    check_kept,
    layer_key,
    run_layers,
    stored_bytes,
)
from edgejax.memory.layer_stack import Keeping
from edgejax.memory.residuals import Bf16, Exact, Int8
from edgejax.models import Decoder, hidden_states
from edgejax.models.layers import recalled
from edgejax.quant import quantize_int8
from edgejax.train.state import init_state
from edgejax.train.whole import make_train_step

SHAPES = [(1, 1, 1), (2, 3, 31), (1, 5, 32), (2, 2, 33), (3, 7, 101), (1, 4, 576)]
KINDS = {**BOUNDARIES, "bf16 stochastic": Bf16(stochastic=True), "int8 blocks of 7": Int8(block=7)}


def normal(shape, seed=0) -> jnp.ndarray:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


@partial(jax.jit, static_argnums=0)
def one(kind, h, key=0):
    """A single boundary there and back."""
    boundary = boundary_named(kind)
    stored, reference = boundary.store(h, boundary.start(h.shape), key)
    return stored, boundary.restore(stored, reference, key)[0]


@pytest.mark.quick
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_each_value_comes_back_within_a_step_and_takes_the_bytes_that_are_promised(kind, shape):
    h = normal(shape)
    stored, restored = one(kind, h)
    step = {Exact: 0.0, Bf16: 2**-7}.get(type(kind), 1 / 126)
    # of the value itself, or for int8 of the largest in its block, whose channels differ in size
    scale = jnp.abs(h) if not isinstance(kind, Int8) else jnp.abs(h).max() * 8
    assert (jnp.abs(restored - h) <= step * scale).all()
    assert restored.dtype == jnp.float32
    assert tree_bytes(stored) == stored_bytes(kind, shape)


@pytest.mark.quick
@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(kind):
    h = normal((2, 3, 96)).at[:, 1].set(0.0).at[0, 0, 28:70].set(0.0)  # whole blocks of 32 and of 7
    restored = one(kind, h, key=5)[1]
    assert (restored[:, 1] == 0).all()
    assert (restored[0, 0, 32:64] == 0).all()
    assert (one(kind, jnp.zeros((1, 2, 40)))[1] == 0).all()
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        assert not jnp.isfinite(one(kind, h.at[0, 0, 3].set(bad))[1][0, 0, 3])


@pytest.mark.quick
@pytest.mark.parametrize("kind", [Int8(), Int8(block=7), Bf16(stochastic=True)], ids=str)
def test_the_mean_over_keys_is_the_value(kind):
    h, n = normal((1, 8, 70)), 4000
    many = np.asarray(jax.vmap(lambda key: one(kind, h, key)[1])(jnp.arange(n)), np.float64)
    # five standard errors, and the float32 rounding of the mean and of the decoding
    bound = 5 * many.std(axis=0) / np.sqrt(n) + 2e-6 * np.abs(h).max()
    assert (np.abs(many.mean(axis=0) - h) <= bound).all()


@pytest.mark.quick
def test_dither_has_half_the_variance_of_stochastic_rounding_and_does_not_know_the_value():
    h = normal((4, 64, 96))
    stored, restored = one("int8", h)
    steps = (restored - h) / (jnp.repeat(stored.scale, 32, axis=-1) * stored.channel)
    assert float(steps.var()) == pytest.approx(1 / 12, rel=0.02)  # stochastic rounding: 1/6 on average
    assert abs(float(steps.mean())) < 5 * np.sqrt(1 / 12 / h.size)
    assert abs(np.corrcoef(steps.ravel(), h.ravel())[0, 1]) < 5 / np.sqrt(h.size)


@pytest.mark.quick
def test_same_key_same_bits_and_another_key_others():
    h = normal((2, 5, 64))
    a, b, c = (one("int8", h, key)[0] for key in (3, 3, 4))
    assert (a.codes == b.codes).all()
    assert (a.codes != c.codes).mean() > 0.3
    tokens = np.arange(64, dtype=np.int32).reshape(2, 32)
    keys = [int(batch_key(t)) for t in (tokens, tokens.copy(), tokens[::-1], tokens + 1, tokens[:1])]
    assert keys[0] == keys[1]
    assert len(set(keys)) == 4
    assert int(layer_key(keys[0], 2)) == (keys[0] + 2) % 2**32


JUMPS = (5, 35)  # layers before which the stream's largest value comes and goes


def stream(n_layers: int, shape=(1, 48, 96)) -> list[jnp.ndarray]:
    """A residual stream as trained models have it: each layer adds a quarter; a channel is 20 times larger, and at
    the first token 9000 is added to it for most of the way (Sun et al. 2024, arXiv 2402.17762, massive activations).
    """
    h, out = normal(shape), []
    for layer in range(n_layers):
        massive = 9000.0 if JUMPS[0] <= layer < JUMPS[1] else 0.0
        out.append(h.at[..., 17].mul(20.0).at[0, 0, 17].add(massive))
        h = h + 0.25 * normal(shape, layer + 1)
    return out


@pytest.mark.quick
def test_errors_do_not_add_up_over_layers_and_spare_the_neighbours_of_a_large_channel():
    boundary, inputs = boundary_named("int8"), stream(40)
    store, restore = jax.jit(boundary.store), jax.jit(boundary.restore)
    reference, waiting, errors = boundary.start(inputs[0].shape), [], {}
    for layer, h in enumerate(inputs):
        stored, reference = store(h, reference, layer)
        waiting.append(stored)
    for layer in reversed(range(len(inputs))):
        h, reference = restore(waiting[layer], reference, layer)
        others = np.delete(np.arange(h.shape[-1]), 17)
        difference, exact = (h - inputs[layer])[..., others], inputs[layer][..., others]
        errors[layer] = float(jnp.linalg.norm(difference) / jnp.linalg.norm(exact))
    assert errors.pop(0) < 2e-2  # coded whole
    assert max(errors.pop(layer) for layer in JUMPS) < 5e-2  # one block of one token, for one layer
    assert max(errors.values()) < 3e-3
    assert jnp.abs(reference).max() < 1e-5 * jnp.abs(inputs[20]).max()  # back where it started


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_family(family, mode):
    """Loss exact; each layer's gradient at a cosine of 0.9999 with the exact one, and of the right length."""
    expected = outcome(FAMILIES[family], 41, 2, mode, remat="full")
    exact = by_layer(expected.gradients)
    for kind, bound in (("bf16", 1 - 2e-5), ("int8", 0.9999)):
        found = outcome(FAMILIES[family], 41, 2, mode, remat="full", boundaries=kind)
        gradient = by_layer(found.gradients)
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert cosines(gradient, exact).min() >= bound, kind
        lengths = np.linalg.norm(gradient, axis=1) / np.linalg.norm(exact, axis=1)
        assert np.abs(lengths - 1).max() < 5e-3, kind
        assert not np.array_equal(gradient, exact)
        assert_same(found.gradients, expected.gradients, 0.05)  # tables and norms outside of layers too


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_policy_keeps_beside_a_narrow_input_is_narrow_too(family, mode):
    """Loss exact, the gradient of each layer at the cosine that bf16 has, whatever is not made again."""
    expected = outcome(FAMILIES[family], 41, 2, mode, remat="full")
    for remat in ("attention", "mlp"):
        found = outcome(FAMILIES[family], 41, 2, mode, remat=remat, boundaries="bf16")
        assert found.loss == pytest.approx(expected.loss, rel=1e-6)
        assert cosines(by_layer(found.gradients), by_layer(expected.gradients)).min() >= 1 - 3e-5, remat
        assert_same(found.gradients, expected.gradients, 0.05)


def test_kept_values_are_what_the_backward_pass_reads():
    """``Keeping`` that hands back twice what it was given: the derivative is then that of twice the value."""
    w = normal((3, 4, 4))

    def forward(h, w, _):
        inner = h @ w
        return h + jnp.sin(inner), inner

    def again(h, w, _, inner):
        return h + jnp.sin(recalled(h @ w, 2 * inner))

    def by_hand(w, h):
        waiting = []
        for layer in range(3):
            waiting.append(h)
            h = forward(h, w[layer], None)[0]
        dh, found = jnp.ones_like(h), []
        for layer in (2, 1, 0):
            d_inner = dh * jnp.cos(2 * (waiting[layer] @ w[layer]))
            found.insert(0, jnp.einsum("btd,bte->de", waiting[layer], d_inner))
            dh = dh + d_inner @ w[layer].T
        return jnp.stack(found), dh

    def run(w, h):
        layer = lambda h, w, shared: forward(h, w, shared)[0]  # noqa: E731
        keeping = Keeping(forward, again)
        return run_layers(layer, h, w, None, boundary=Exact(), keeping=keeping).sum()

    h = normal((1, 2, 4), 7)
    assert_same(jax.grad(run, (0, 1))(w, h), by_hand(w, h), 1e-5)


@pytest.mark.quick
def test_groups_keep_inputs_alone():
    keeping = Keeping(lambda h, w, shared: (h, ()), lambda h, w, shared, values: h)
    with pytest.raises(ConfigError, match="groups of 2 layers"):
        run_layers(
            lambda h, w, shared: h,
            normal((1, 2, 4)),
            normal((3, 4)),
            None,
            boundary=Exact(),
            group=2,
            keeping=keeping,
        )


@pytest.mark.parametrize("mode", MODES)
def test_what_is_kept_is_not_made_again(mode):
    """Exponentials of attention and products of its projection are gone from the backward pass; bytes are as counted."""
    length, width = 256, DEEP.d_model
    programs = {
        (remat, kind): value_and_gradient(DEEP, batch_of(DEEP, length), mode, remat=remat, boundaries=kind)[0]
        for remat, kind in (("full", "bf16"), ("attention", "bf16"), ("mlp", "bf16"), ("mlp", "f32"))
    }
    found = {how: program.as_text() for how, program in programs.items()}
    n_exp = {how: text.count(" exponential(") for how, text in found.items()}
    assert n_exp["mlp", "bf16"] == n_exp["attention", "bf16"] < n_exp["full", "bf16"]
    n_dot = {how: text.count(" dot(") for how, text in found.items()}
    assert n_dot["mlp", "bf16"] < n_dot["attention", "bf16"] < n_dot["full", "bf16"]
    temp = {how: xla_memory(program).temp_bytes for how, program in programs.items()}
    row = DEEP.n_layers * length * width  # elements of one value of all layers; attention's output is as wide
    narrowed = 3 * 2 * row  # the layer's input, attention's output, the MLP's input
    assert temp["mlp", "f32"] - temp["mlp", "bf16"] >= 0.9 * narrowed


def test_gradients_are_those_of_layers_at_the_restored_boundaries():
    """The oracle is a Python loop over layers. The model is rough: rounding changes its gradients by about 2e-2.

    The bound leaves room for a code or two that falls to the other side because the programs differ in an ulp.
    """
    config, kind = dataclasses.replace(CONFIGS["qwen3"], n_layers=4), "int8"
    params = jax.tree.map(jnp.asarray, random_params(config))
    decoder, batch = Decoder(config), batch_of(config, 24)
    cotangent = normal((1, 24, config.d_model), 9)

    def ours(params):
        kept = {"remat": "full", "boundaries": kind}
        rows = (batch.tokens, batch.positions, batch.segment_ids)
        return jnp.sum(hidden_states(decoder, params, {}, *rows, **kept) * cotangent)

    @jax.jit
    def oracle(params):
        boundary, key = boundary_named(kind), batch_key(batch.tokens)
        rope = decoder.rope(batch.positions)

        def block(h, layer_params):
            return decoder.block(layer_params, {}, h, rope, batch.segment_ids)

        layers = [jax.tree.map(lambda x, i=i: x[i], params["blocks"]) for i in range(config.n_layers)]
        h = decoder.embed(params, batch.tokens)
        reference, waiting, found = boundary.start(h.shape), [], []
        for number, layer in enumerate(layers):
            stored, reference = boundary.store(h, reference, layer_key(key, number))
            waiting.append(stored)
            h = block(h, layer)
        dh = cotangent
        for number in reversed(range(config.n_layers)):
            h, reference = boundary.restore(waiting[number], reference, layer_key(key, number))
            _, pull = jax.vjp(block, h, layers[number])
            dh, gradient = pull(dh)
            found.insert(0, gradient)
        return jax.tree.map(lambda *x: jnp.stack(x), *found)

    gradients = jax.jit(jax.grad(ours))(params)
    assert_same(gradients["blocks"], oracle(params), 2e-3)


def test_a_training_step_of_two_micro_batches_repeats_to_the_bit():
    lora, optimizer = LORAS["all"], optax.sgd(0.1)
    params = jax.tree.map(jnp.asarray, calm_params(DEEP))
    batch = jax.tree.map(lambda leaf: leaf.reshape(2, 1, -1), batch_of(DEEP, 64, rows=2))

    def stepped(boundaries):
        step = make_train_step(Decoder(DEEP, lora), optimizer, mode="lora", boundaries=boundaries)
        start = jax.tree.map(jnp.asarray, random_adapters(DEEP, lora))
        return jax.device_get(step(init_state(start, optimizer), params, batch))

    first, again, exact = stepped("int8"), stepped("int8"), stepped("f32")
    assert all(
        np.array_equal(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(again), strict=True)
    )
    assert float(first[1]["loss"]) == pytest.approx(float(exact[1]["loss"]), rel=1e-6)
    assert float(first[1]["grad_norm"]) == pytest.approx(float(exact[1]["grad_norm"]), rel=2e-2)


@pytest.mark.parametrize("mode", MODES)
def test_the_compiled_program_holds_the_narrow_thing(mode):
    """Temp falls by what the boundaries lose, less three arrays of int8: two references, a change being coded."""
    length = 256
    shape = (1, length, DEEP.d_model)
    temp = {
        kind: outcome(DEEP, length, 1, mode, remat="full", boundaries=kind).temp_bytes for kind in BOUNDARIES
    }
    f32 = stored_bytes("f32", shape)
    for kind, references in (("bf16", 0), ("int8", 3)):
        saved = DEEP.n_layers * (f32 - stored_bytes(kind, shape)) - references * f32
        assert temp["f32"] - temp[kind] >= 0.9 * saved, (kind, temp, saved)


@pytest.mark.parametrize("packed", [False, True], ids=["f32 base", "int8 base"])
def test_a_frozen_base_is_neither_copied_nor_given_gradients(packed):
    batch = batch_of(DEEP, 64)
    params = calm_params(DEEP)
    if packed:
        for name, leaves in params["blocks"].items():
            if "kernel" in leaves:
                params["blocks"][name] = {"kernel": quantize_int8(leaves["kernel"], 32)}
    weights = tree_bytes(params["blocks"])
    temp = {}
    for kind in ("f32", "bf16", "int8"):
        compiled, _ = value_and_gradient(
            DEEP, batch, "adapters", params=params, remat="full", boundaries=kind
        )
        temp[kind] = xla_memory(compiled).temp_bytes
    assert weights > 0.2 * temp["f32"]  # a copy would show
    assert temp["bf16"] < 1.02 * temp["f32"]
    assert temp["int8"] < 1.05 * temp["f32"]


def test_what_layers_share_has_no_gradient_and_float_leaves_that_are_not_trained_neither():
    stack = {
        "w": normal((3, 4, 4)),
        "flag": jnp.array([True, False, True]),
        "frozen": normal((3, 4)),
        "none": None,
    }

    def layer(h, weights, shared):
        update = jnp.tanh(h @ weights["w"]) * weights["frozen"] + shared
        return jnp.where(weights["flag"], h + update, h - update)

    def run(w, h):
        return run_layers(layer, h, stack | {"w": w}, jnp.float32(0.5), boundary=Exact()).sum()

    def plain(w, h):
        for i in range(3):
            h = layer(
                h, {"w": w[i], "flag": stack["flag"][i], "frozen": stack["frozen"][i]}, jnp.float32(0.5)
            )
        return h.sum()

    h = normal((1, 2, 4))
    assert_same(jax.grad(run, (0, 1))(stack["w"], h), jax.grad(plain, (0, 1))(stack["w"], h), 1e-6)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("remat", "boundaries", "said"),
    [
        ("full", "int4", r"unknown boundaries 'int4'; there are: f32, bf16, int8"),
        ("none", "int8", r"'int8' do not go with remat 'none'.*choose remat full, or boundaries f32"),
        (
            "none",
            "bf16",
            r"'bf16' do not go with remat 'none'.*choose remat full or sqrt or attention or mlp, or",
        ),
        ("mlp", "int8", r"keeps float32 values beside the input"),
        ("sqrt", "int8", r"rounds the inputs of layers twice.*choose remat full, or boundaries f32"),
        ("half", "f32", r"unknown remat policy 'half'; there are: none, attention, mlp, full, sqrt"),
    ],
)
def test_what_cannot_be_had_is_refused(remat, boundaries, said):
    with pytest.raises(ConfigError, match=said):
        check_kept(remat, boundaries)
    config = CONFIGS["llama"]
    with pytest.raises(ConfigError, match=said):
        hidden_states(
            Decoder(config), {}, {}, jnp.zeros((1, 2), jnp.int32), remat=remat, boundaries=boundaries
        )


@pytest.mark.quick
def test_what_goes_together_is_taken():
    for remat, boundaries in (
        ("none", "f32"),
        ("full", "int8"),
        ("full", "bf16"),
        ("sqrt", "bf16"),
        ("mlp", "bf16"),
    ):
        check_kept(remat, boundaries)
