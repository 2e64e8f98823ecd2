"""Programs compiled from shapes: the same bits as from a loaded model, and the memory they promise."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.tiny_run import LORA, make_model, make_rows, make_settings

from edgejax.cli.bench_inputs import open_inputs
from edgejax.cli.bench_settings import BenchSettings
from edgejax.core.trees import tree_bytes
from edgejax.measure.memory import xla_memory
from edgejax.models import LoraConfig
from edgejax.quant import quantize_int8
from edgejax.train import SilentProgress, TrainSettings, compile_programs, finetune, tree_sha256
from edgejax.train.programs import abstract


class Opened:
    """A model that counts how often its weights are read, and may promise other shapes than it gives."""

    def __init__(self, model, promised=None):
        self.model, self.config, self.source = model, model.config, model.source
        self.promised = abstract(model.params if promised is None else promised)
        self.n_loads = 0

    def abstract_params(self):
        return self.promised

    def load(self):
        self.n_loads += 1
        return self.model


def run(model, folder):
    settings = make_settings(steps=4, checkpoint_every=4, eval_every=None)
    return finetune(
        model, make_rows(), make_rows(1, 5), settings, lora=LORA, out_dir=folder, progress=SilentProgress()
    )


def test_an_opened_model_trains_to_the_same_bits_and_is_read_once(tmp_path):
    model = make_model()
    opened = Opened(model)
    ours, theirs = run(opened, tmp_path / "opened"), run(model, tmp_path / "loaded")
    assert opened.n_loads == 1
    assert tree_sha256(ours.trainable) == tree_sha256(theirs.trainable)
    assert ours.held_out_after == theirs.held_out_after
    assert ours.model is theirs.model is model


def test_weights_held_otherwise_than_promised_are_compiled_for_again(tmp_path):
    model = make_model()
    kernel = model.params["blocks"]["q_proj"]["kernel"]
    narrow = quantize_int8(np.asarray(kernel), 8)
    wide = dataclasses.replace(narrow, scale=narrow.scale.astype(np.float32))

    def with_kernel(leaf):
        blocks = {**model.params["blocks"], "q_proj": {"kernel": leaf}}
        return {**model.params, "blocks": blocks}

    actual = dataclasses.replace(model, params=with_kernel(wide))
    result = run(Opened(actual, promised=with_kernel(narrow)), tmp_path / "run")
    assert tree_sha256(result.trainable) == tree_sha256(run(actual, tmp_path / "loaded").trainable)


@pytest.mark.quick
def test_fit_compares_shapes_and_dtypes():
    model = make_model()
    programs = compile_programs(model.config, abstract(model.params), make_settings(), LORA, 16)
    assert programs.fit(model.params)
    assert not programs.fit(jax.tree.map(lambda x: np.asarray(x, np.float16), model.params))


def test_a_smollm2_step_fits_its_temporary_memory():
    """LoRA rank 8 on all linear layers, 1 x 512 tokens, 4-bit base, full remat: at most 110 MB."""
    inputs = open_inputs(BenchSettings(model="smollm2-135m", random_weights=True, base="int4"))
    settings = TrainSettings(remat="full", clip_norm=None)
    programs = compile_programs(inputs.config, inputs.abstract_params, settings, LoraConfig(rank=8), 512)
    memory = xla_memory(programs.step)
    assert memory.temp_bytes <= 110e6
    _, state = jax.eval_shape(programs.start, programs.params)
    adapters = tree_bytes(state.trainable)
    assert memory.alias_bytes >= 3 * adapters  # adapters and both moments are updated in place
