"""The layerwise schedule computes what the whole one does, and holds neither a gradient tree nor a second stack."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from export_cases import CONFIGS, LORAS, random_adapters, random_params
from helpers.steps import LENGTH, after, assert_close, batch, start

from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_bytes, tree_paths
from edgejax.measure.memory import xla_memory
from edgejax.models import Decoder, ModelConfig
from edgejax.optim import adamw
from edgejax.quant import dequantize, is_quantized
from edgejax.train import TrainState, init_layerwise, init_state, make_layerwise_step, make_train_step
from edgejax.train.held import hold_weights
from edgejax.train.layerwise_state import TABLE_ROWS, table_parts


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("accumulate", [1, 3])
def test_all_parameters_are_those_of_whole_after_five_steps(family, accumulate):
    config = CONFIGS[family]
    params = random_params(config)
    # A large epsilon: where a gradient is rounding noise, Adam's quotient of two noises would tell nothing.
    optimizer = adamw(1e-2, eps=1e-3, weight_decay=0.01)
    batches = [batch(config, seed, (accumulate, 2, LENGTH)) for seed in range(5)]
    whole = make_train_step(Decoder(config), optimizer, mode="full")
    layerwise = make_layerwise_step(Decoder(config), optimizer, mode="full")
    theirs, expected = after(whole, start(params, optimizer, init_state), {}, batches)
    ours, found = after(layerwise, start(params, optimizer, init_layerwise), {}, batches)
    assert_close(ours.trainable, theirs.trainable)
    for step, reference in zip(found, expected, strict=True):
        assert step == pytest.approx(reference, rel=1e-5)


@pytest.mark.parametrize("name", LORAS)
def test_adapters_are_those_of_whole_after_five_steps(name):
    config, lora = CONFIGS["llama"], LORAS[name]
    params, adapters = random_params(config), random_adapters(config, lora)
    optimizer = adamw(1e-2, eps=1e-3)
    batches = [batch(config, seed) for seed in range(5)]
    decoder = Decoder(config, lora)
    whole = make_train_step(decoder, optimizer, mode="lora")
    layerwise = make_layerwise_step(decoder, optimizer, mode="lora")
    theirs, expected = after(whole, start(adapters, optimizer, init_state), params, batches)
    ours, found = after(layerwise, start(adapters, optimizer, init_layerwise), params, batches)
    assert_close(ours.trainable, theirs.trainable)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-5)


def test_a_table_that_does_not_divide_is_updated_to_its_last_row(monkeypatch):
    monkeypatch.setattr("edgejax.train.layerwise_state.TABLE_ROWS", 100)
    config = CONFIGS["llama"]
    assert table_parts(config.vocab_size) == (4, 96, 0)
    assert table_parts(387) == (4, 96, 3)
    config = ModelConfig(**{**vars(config), "vocab_size": 387, "tie_embeddings": False})
    params, optimizer = random_params(config), adamw(1e-2, eps=1e-3)
    batches = [batch(config, seed) for seed in range(3)]
    theirs, _ = after(
        make_train_step(Decoder(config), optimizer, mode="full"),
        start(params, optimizer, init_state),
        {},
        batches,
    )
    ours, _ = after(
        make_layerwise_step(Decoder(config), optimizer, mode="full"),
        start(params, optimizer, init_layerwise),
        {},
        batches,
    )
    assert_close(ours.trainable, theirs.trainable)


def test_clipping_by_the_norm_of_the_step_before():
    config, rate, clip = CONFIGS["llama"], 0.1, 0.5
    params, optimizer = random_params(config), optax.sgd(rate)
    batches = [batch(config, seed) for seed in range(2)]
    step = make_layerwise_step(Decoder(config), optimizer, mode="full", clip_norm=clip, clip_by="previous")
    free = make_layerwise_step(Decoder(config), optimizer, mode="full")
    first, figures = after(step, start(params, optimizer, init_layerwise), {}, batches[:1])
    unclipped, _ = after(free, start(params, optimizer, init_layerwise), {}, batches[:1])
    assert_close(first.trainable, unclipped.trainable, 1e-7)  # nothing came before
    assert figures[0]["grad_norm"] > clip
    before = jax.device_get(first.trainable)
    clipped, _ = after(step, jax.tree.map(jnp.array, first), {}, batches[1:])
    moved, _ = after(free, jax.tree.map(jnp.array, first), {}, batches[1:])
    change = lambda state: jax.tree.map(lambda a, b: a - b, jax.device_get(state.trainable), before)  # noqa: E731
    factor = clip / figures[0]["grad_norm"]
    assert_close(change(clipped), jax.tree.map(lambda x: x * factor, change(moved)), 1e-3)


def test_clipping_by_layer_bounds_each_layer():
    config, rate, clip = CONFIGS["llama"], 1.0, 1e-3
    params, optimizer = random_params(config), optax.sgd(rate)
    step = make_layerwise_step(Decoder(config), optimizer, mode="full", clip_norm=clip, clip_by="layer")
    state, _ = after(step, start(params, optimizer, init_layerwise), {}, [batch(config, 0)])
    moved = jax.tree.map(
        lambda a, b: np.asarray(a, np.float64) - b, state.trainable["blocks"], params["blocks"]
    )
    for layer in range(config.n_layers):
        norm = np.sqrt(sum((leaf[layer] ** 2).sum() for leaf in jax.tree.leaves(moved)))
        assert norm == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("boundaries", ["bf16", "int8"])
def test_narrow_boundaries_change_the_gradient_a_little(boundaries):
    config = CONFIGS["qwen3"]
    params, optimizer = random_params(config), optax.sgd(1.0)
    exact, narrow = (
        after(
            make_layerwise_step(Decoder(config), optimizer, mode="full", boundaries=kind),
            start(params, optimizer, init_layerwise), {}, [batch(config, 0, (2, 1, LENGTH))],
        )
        for kind in ("f32", boundaries)
    )  # fmt: skip
    assert narrow[1][0]["loss"] == exact[1][0]["loss"]
    for name, leaf in tree_paths(exact[0].trainable).items():
        ours, theirs = (
            np.asarray(x, np.float64).ravel() for x in (tree_paths(narrow[0].trainable)[name], leaf)
        )
        old = np.asarray(tree_paths(params)[name], np.float64).ravel()
        a, b = ours - old, theirs - old
        assert a @ b / np.linalg.norm(a) / np.linalg.norm(b) > 0.999, name
        assert not np.array_equal(a, b) or not name.startswith("blocks"), name


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("kept", [("attention", "f32"), ("mlp", "f32"), ("mlp", "bf16")], ids="-".join)
def test_what_is_kept_beside_the_inputs_is_what_whole_keeps(family, kept):
    """Same policy, same boundaries, same parameters; and in float32 those of recomputing everything."""
    config, (remat, boundaries) = CONFIGS[family], kept
    params, optimizer = random_params(config), adamw(1e-3, eps=1e-3)
    batches = [batch(config, seed, (2, 1, LENGTH)) for seed in range(3)]
    how = {"mode": "full", "remat": remat, "boundaries": boundaries}
    ours, found = after(
        make_layerwise_step(Decoder(config), optimizer, **how),
        start(params, optimizer, init_layerwise),
        {},
        batches,
    )
    theirs, expected = after(
        make_train_step(Decoder(config), optimizer, **how), start(params, optimizer, init_state), {}, batches
    )
    # An ulp between the two programs can be a step of bf16 in a value that waits.
    assert_close(ours.trainable, theirs.trainable, 1e-5 if boundaries == "f32" else 3e-4)
    assert found[-1] == pytest.approx(expected[-1], rel=1e-5 if boundaries == "f32" else 1e-4)
    if boundaries == "f32":
        plain = make_train_step(Decoder(config), optimizer, mode="full")
        assert_close(
            ours.trainable, after(plain, start(params, optimizer, init_state), {}, batches)[0].trainable
        )


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ({"remat": "none"}, "recomputes each layer .remat full or attention or mlp., not 'none'"),
        ({"remat": "sqrt"}, "not 'sqrt'"),
        ({"remat": "mpl"}, "unknown remat policy 'mpl'"),
        ({"remat": "mlp", "boundaries": "int8"}, "'int8' do not go with remat 'mlp'"),
    ],
)
def test_what_cannot_be_kept_is_refused(how, said):
    with pytest.raises(ConfigError, match=said):
        make_layerwise_step(Decoder(CONFIGS["llama"]), adamw(1e-3), mode="full", **how)


def test_attention_runs_once_where_its_output_is_kept():
    optimizer = adamw(1e-3)
    exponentials = {}
    for remat in ("full", "attention"):
        step = make_layerwise_step(Decoder(DEEP), optimizer, mode="full", remat=remat, boundaries="bf16")
        shapes = jax.eval_shape(
            lambda key: start_state(Decoder(DEEP).init(key), optimizer), jax.random.key(0)
        )
        rows = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch(DEEP, 0, (1, 1, 64))))
        exponentials[remat] = step.lower(shapes, {}, rows).compile().as_text().count(" exponential(")
    assert exponentials["attention"] < exponentials["full"]


def start_state(params, optimizer):
    return TrainState(jnp.zeros((), jnp.int32), params, init_layerwise(params, optimizer))


DEEP = ModelConfig(
    family="llama", vocab_size=8192, d_model=128, n_layers=32, n_heads=4, n_kv_heads=2, head_dim=32, d_ff=384,
    max_position=256, tie_embeddings=True,
)  # fmt: skip


def held(config: ModelConfig):
    """From a key to parameters whose matrices are bit patterns of bfloat16."""
    return lambda key: hold_weights(Decoder(config).init(key), bfloat16=True)


@pytest.mark.parametrize("bits", [32, 4])
def test_the_compiled_program_updates_in_place(bits):
    optimizer = adamw(1e-3, bits=bits)
    step = make_layerwise_step(Decoder(DEEP), optimizer, mode="full")

    def state(key):
        params = held(DEEP)(key)
        return TrainState(jnp.zeros((), jnp.int32), params, init_layerwise(params, optimizer))

    shapes = jax.eval_shape(state, jax.random.key(0))
    rows = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch(DEEP, 0, (1, 1, 64))))
    compiled = step.lower(shapes, {}, rows).compile()
    memory, size = xla_memory(compiled), tree_bytes(shapes)
    assert memory.alias_bytes >= size - 4  # the norm of the step before, which nothing reads
    gradients = 4 * DEEP.n_params()
    assert memory.temp_bytes < 0.6 * gradients  # neither a gradient tree nor a wide copy of the table
    text = compiled.as_text()
    stack = {leaf.shape for leaf in jax.tree.leaves(shapes.trainable["blocks"]) if leaf.ndim == 3}
    for shape in stack:
        dims = ",".join(map(str, shape))
        for kind in ("u16", "f32"):
            assert not re.search(rf"= {kind}\[{dims}\]\S* (copy|broadcast|convert)\(", text)
        assert bits == 32 or f"= f32[{dims}]" not in text  # at 32 bits, moments have that shape
    assert f"= f32[{DEEP.vocab_size},{DEEP.d_model}]" not in text


def test_bfloat16_weights_learn(monkeypatch):
    config = CONFIGS["llama"]
    optimizer = optax.chain(adamw(1e-2, bits=8))
    params = jax.jit(held(config))(jax.random.key(0))
    state = TrainState(jnp.zeros((), jnp.int32), params, init_layerwise(params, optimizer))
    step = make_layerwise_step(Decoder(config), optimizer, mode="full", clip_norm=1.0)
    _, figures = after(step, state, {}, [batch(config, 0)] * 12)
    assert figures[-1]["loss"] < 0.8 * figures[0]["loss"]


def test_an_optimizer_that_needs_the_whole_gradient_is_refused_with_what_can_be_done():
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    with pytest.raises(ConfigError, match=r"whole gradient.*schedule whole.*clip_by"):
        make_layerwise_step(Decoder(CONFIGS["llama"]), optimizer, mode="full")
    with pytest.raises(ConfigError, match="layer, previous"):
        make_layerwise_step(
            Decoder(CONFIGS["llama"]), optax.sgd(0.1), mode="full", clip_norm=1.0, clip_by="global"
        )


def test_every_part_of_a_real_vocabulary_is_near_the_wanted_size():
    for vocab in (49152, 50257, 128256, 151936, 262144, 32003):
        count, rows, rest = table_parts(vocab)
        assert count * rows + rest == vocab
        assert TABLE_ROWS // 2 < rows <= TABLE_ROWS
        assert rest < count


def test_leaves_keep_their_form():
    config = CONFIGS["llama"]
    params = held(config)(jax.random.key(0))
    optimizer = adamw(1e-3, bits=4)
    state = TrainState(jnp.zeros((), jnp.int32), params, init_layerwise(params, optimizer))
    shapes = jax.tree.map(lambda x: (x.shape, x.dtype), state)
    state, _ = after(
        make_layerwise_step(Decoder(config), optimizer, mode="full"), state, {}, [batch(config, 0)] * 2
    )
    assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == shapes
    packed = [leaf for leaf in jax.tree.leaves(state.trainable, is_leaf=is_quantized) if is_quantized(leaf)]
    assert all(np.isfinite(np.asarray(dequantize(leaf))).all() for leaf in packed)
