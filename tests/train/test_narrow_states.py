"""Runs with narrow moments and bfloat16 weights: what they hold, what they say of it, and what cannot be resumed."""

import jax
import jax.numpy as jnp
import pytest
from helpers.tiny_run import WIDER, make_model, make_rows, make_settings

from edgejax.core.errors import ConfigError, RunError
from edgejax.models.kept import KeptValues
from edgejax.train import TrainSettings, compile_programs, finetune, read_metrics
from edgejax.train.programs import abstract


class Notes:
    """Keeps what a person would see."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def step(self, step, **figures) -> None:
        pass

    def note(self, text: str) -> None:
        self.lines.append(text)


def run(folder, resume=False, progress=None, **changes):
    settings = make_settings(**{"remat": "full", "steps": 4, "eval_every": None, "bfloat16": True, **changes})
    return finetune(
        make_model(config=WIDER), make_rows(), make_rows(1, 5), settings, lora=None, out_dir=folder,
        progress=progress or Notes(), resume=resume,
    )  # fmt: skip


@pytest.fixture(scope="module")
def eight_bits(tmp_path_factory):
    notes = Notes()
    folder = tmp_path_factory.mktemp("eight") / "run"
    return folder, run(folder, progress=notes, optimizer="adamw8bit", schedule="layerwise"), notes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adamw4bit", "schedule": "layerwise"}, "optimizer was 'adamw8bit', is 'adamw4bit'"),
        ({"optimizer": "adamw8bit"}, "schedule was 'layerwise', is 'whole'"),
        (
            {"optimizer": "adamw8bit", "schedule": "layerwise", "bfloat16": False},
            "bfloat16 was True, is False",
        ),
    ],
)
def test_a_checkpoint_with_other_bits_is_refused(eight_bits, changes, message):
    folder, _, _ = eight_bits
    before = sorted(path.name for path in (folder / "checkpoints").iterdir())
    with pytest.raises(RunError, match=message):
        run(folder, resume=True, steps=8, **changes)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == before


def test_the_receipt_is_in_the_log_and_before_the_persons_eyes(eight_bits):
    folder, result, notes = eight_bits
    (record,) = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "receipt"]
    trees = {tree["name"]: tree for tree in record["trees"]}
    n_params = WIDER.n_params()
    assert trees["weights"]["n_elements"] == n_params
    matrices = n_params - 5 * 64  # two norms a layer and the last one
    assert trees["weights"]["n_bytes"] == 2 * matrices + 4 * 5 * 64
    assert trees["weights"]["bits_per_element"] == pytest.approx(8 * trees["weights"]["n_bytes"] / n_params)
    held = sum(tree["n_bytes"] for tree in record["trees"]) + record["gradients_bytes"]
    assert record["bytes_per_parameter"] == pytest.approx(held / n_params)
    assert record["bytes_per_parameter"] == result.receipt.bytes_per_parameter
    (shown,) = [line for line in notes.lines if line.startswith("receipt")]
    assert f"{record['bytes_per_parameter']:.2f} bytes a parameter" in shown
    assert "leaves in float32: below 4096 elements" in shown


def test_the_receipt_counts_what_is_kept_beside_the_inputs(tmp_path):
    notes = Notes()
    how = {"optimizer": "adamw8bit", "schedule": "layerwise", "remat": "mlp", "boundaries": "bf16"}
    receipt = run(tmp_path / "run", progress=notes, **how).receipt
    per_layer = KeptValues.of("mlp", "bf16").stored_bytes(
        WIDER, make_settings().batch_size, make_rows().seq_length
    )
    assert receipt.kept_bytes == make_settings().accumulate * WIDER.n_layers * per_layer > 0
    (shown,) = [line for line in notes.lines if line.startswith("receipt")]
    assert "kept beside them" in shown


def test_what_was_trained_is_bfloat16_numbers(eight_bits):
    _, result, _ = eight_bits
    dtypes = {leaf.dtype.name for leaf in jax.tree.leaves(result.trainable)}
    assert dtypes == {"bfloat16", "float32"}
    assert result.held_out_after.loss < result.held_out_before.loss


@pytest.mark.parametrize("schedule", ["whole", "layerwise"])
def test_optax_moments_of_bfloat16_weights_are_float32(schedule):
    settings = make_settings(bfloat16=True, remat="full", schedule=schedule)
    model = make_model(config=WIDER)
    programs = compile_programs(WIDER, abstract(model.params), settings, None, 16)
    state = jax.eval_shape(programs.start, abstract(model.params))[1]
    floats = [leaf for leaf in jax.tree.leaves(state.opt_state) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert {leaf.dtype.name for leaf in floats} == {"float32"}


def test_an_optimizer_that_changes_its_types_is_refused():
    with pytest.raises(ConfigError, match=r"adafactor changes the types.*--base f32"):
        TrainSettings(optimizer="adafactor", bfloat16=True)
    TrainSettings(optimizer="adafactor")
