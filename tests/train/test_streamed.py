"""The streamed schedule computes what the whole one does, from a mapped file."""

import errno
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CONFIGS, LORAS, random_adapters
from helpers.steps import after, assert_close, batch, start

from edgejax.core.errors import ConfigError, RunError, WeightsError
from edgejax.models import Decoder, LoraConfig, ModelConfig, loss
from edgejax.optim import adamw
from edgejax.train import init_state, make_optimizer, make_streamed_eval, make_streamed_step, make_train_step
from edgejax.train.flat_adapters import FlatAdapters
from edgejax.train.recipe import StepRecipe
from edgejax.train.streamed import init_streamed
from edgejax.weights import Origin, open_packed, write_packed
from edgejax.weights.random import RandomSource

SHAPE = (2, 1, 24)
RATE = {"eps": 1e-2, "weight_decay": 0.01}


def packed(config: ModelConfig, path, base="int4"):
    """Random weights in a packed file; int4 needs rows of a multiple of 32."""
    origin = Origin(name="random", format="random", sha256="", base=base)
    write_packed(path, RandomSource(config, 0), origin=origin, base=base)
    return open_packed(path)


def begin(config, lora, optimizer):
    return init_streamed(random_adapters(config, lora), config, lora, optimizer)


def on_device(source):
    return jax.tree.map(jnp.asarray, source.load())


# At 1e-2 the random gemma3 is chaotic: after five steps the schedule whole itself, with a step's rows in one micro-batch
# instead of two, is 1.3e-4 off, and the gradient's norm 0.2%.
RATES = dict.fromkeys(CONFIGS, 1e-2) | {"gemma3": 1e-3}


@pytest.mark.parametrize(
    ("family", "base"), [*((family, "int4") for family in CONFIGS), ("qwen3", "ternary")]
)
def test_adapters_are_those_of_whole_after_five_steps(family, base, tmp_path):
    config, lora = CONFIGS[family], LORAS["all"]
    source = packed(config, tmp_path / "m.ejx", base)
    adapters, optimizer = random_adapters(config, lora), adamw(RATES[family], **RATE)
    batches = [batch(config, seed, SHAPE) for seed in range(5)]
    decoder = Decoder(config, lora)
    theirs, expected = after(
        make_train_step(decoder, optimizer, mode="lora"),
        start(adapters, optimizer, init_state),
        on_device(source),
        batches,
    )
    ours, found = after(
        make_streamed_step(decoder, optimizer),
        init_streamed(adapters, config, lora, optimizer),
        source,
        batches,
    )
    assert_close(FlatAdapters(config, lora).split(ours.trainable), theirs.trainable)
    assert found[0] == pytest.approx(expected[0], rel=1e-6)
    assert found[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=1e-5)


@pytest.mark.parametrize("boundaries", ["f32", "bf16", "int8"])
def test_spilled_inputs_are_the_same_bits(boundaries, tmp_path):
    config, lora = CONFIGS["qwen3"], LORAS["all"]
    source = packed(config, tmp_path / "m.ejx")
    adapters, optimizer = random_adapters(config, lora), adamw(1e-2, **RATE)
    batches = [batch(config, seed, SHAPE) for seed in range(2)]
    kept, spilled = (
        after(
            make_streamed_step(Decoder(config, lora), optimizer, boundaries=boundaries, clip_norm=0.1, spill_to=folder),
            init_streamed(adapters, config, lora, optimizer), source, batches,
        )[0]
        for folder in (None, tmp_path)
    )  # fmt: skip
    for a, b in zip(jax.tree.leaves(kept), jax.tree.leaves(spilled), strict=True):
        assert np.array_equal(np.asarray(a), np.asarray(b))
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.ejx"]


def test_the_held_out_loss_is_that_of_the_model(tmp_path):
    config, lora = CONFIGS["gemma3"], LORAS["all"]
    source = packed(config, tmp_path / "m.ejx")
    adapters, decoder = random_adapters(config, lora), Decoder(config, lora)
    rows = jax.tree.map(lambda leaf: leaf[0], batch(config, 0, SHAPE))
    found = make_streamed_eval(decoder)(FlatAdapters(config, lora).join(adapters), source, rows)
    wanted = loss(decoder, on_device(source), adapters, rows)
    assert float(found[0]) == pytest.approx(float(wanted[0]), rel=1e-6)
    assert int(found[1]) == int(wanted[1])


def test_a_file_that_changes_under_the_run_stops_it_with_the_state_whole(tmp_path):
    config, lora = CONFIGS["llama"], LORAS["all"]
    source = packed(config, tmp_path / "m.ejx")
    optimizer = adamw(1e-2)
    step = make_streamed_step(Decoder(config, lora), optimizer)
    state = begin(config, lora, optimizer)
    state, _ = step(state, source, batch(config, 0, SHAPE))
    os.utime(tmp_path / "m.ejx", (1, 1))
    with pytest.raises(WeightsError, match="written to while in use"):
        step(state, source, batch(config, 1, SHAPE))
    assert all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state.trainable))


def test_a_full_disk_or_a_missing_folder_for_spilled_inputs_is_named(tmp_path, monkeypatch):
    config, lora = CONFIGS["llama"], LORAS["all"]
    source = packed(config, tmp_path / "m.ejx")
    optimizer = adamw(1e-2)
    state = begin(config, lora, optimizer)
    missing = make_streamed_step(Decoder(config, lora), optimizer, spill_to=tmp_path / "none")
    with pytest.raises(RunError, match=r"none.*choose another folder"):
        missing(state, source, batch(config, 0, SHAPE))

    class Full:
        def seek(self, *where):
            return 0

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

        def __enter__(self):
            return self

        def __exit__(self, *exc_info):
            pass

    monkeypatch.setattr("edgejax.train.streamed.tempfile.TemporaryFile", lambda dir: Full())
    full = make_streamed_step(Decoder(config, lora), optimizer, spill_to=tmp_path)
    with pytest.raises(RunError, match=r"No space left on device.*another folder"):
        full(state, source, batch(config, 0, SHAPE))


def test_full_parameter_training_is_refused():
    with pytest.raises(ConfigError, match="layerwise has"):
        make_streamed_step(Decoder(CONFIGS["llama"]), adamw(1e-3))


@pytest.mark.parametrize("name", ["apollo_mini", "scale_sgd", "lamb", "adafactor", "novograd"])
def test_an_optimizer_that_looks_at_matrices_is_refused_with_what_can_be_done(name):
    config, lora = CONFIGS["llama"], LORAS["all"]
    with pytest.raises(ConfigError, match=r"looks at whole matrices.*layerwise or whole.*adamw8bit"):
        make_streamed_step(Decoder(config, lora), make_optimizer(name, 1e-3, clip_norm=None))
    with pytest.raises(ConfigError, match=r"whole matri"):
        StepRecipe(schedule="streamed", optimizer=name)


@pytest.mark.parametrize("name", ["adamw", "adamw8bit", "adamw4bit", "lion8bit", "sgd8bit", "lion", "adam"])
def test_elementwise_optimizers_stream(name):
    StepRecipe(schedule="streamed", optimizer=name)


def test_one_program_serves_all_layers(tmp_path):
    config = ModelConfig(**{**vars(CONFIGS["llama"]), "n_layers": 5})
    lora = LoraConfig(rank=2)
    source = packed(config, tmp_path / "m.ejx")
    optimizer = adamw(1e-2)
    step = make_streamed_step(Decoder(config, lora), optimizer)
    state = begin(config, lora, optimizer)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, _, **rest: compiled.append(name) if "backend_compile" in name else None
    )
    after(step, state, source, [batch(config, seed, SHAPE) for seed in range(3)])
    assert (
        0 < len(compiled) < 20
    )  # embed, forward, head, backward, and small ones of JAX's own; not 5 layers of them
