"""Whole runs of a tiny decoder: they learn, can be stopped anywhere, and refuse what is not theirs."""

import dataclasses
import importlib
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_run import LORA, make_model, make_rows, make_settings

from edgejax.core.errors import ConfigError, DataError, Interrupted, NonFiniteLossError, RunError
from edgejax.core.trees import tree_bytes
from edgejax.models import LoraConfig, init_lora
from edgejax.quant import quantize_int8
from edgejax.train import SilentProgress, TrainSettings, finetune, read_config, read_metrics, tree_sha256


class Notes(SilentProgress):
    def __init__(self):
        self.texts: list[str] = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def data():
    return make_rows(), make_rows(1, 5)


def run(model, data, folder, settings=None, *, lora=LORA, **options):
    options.setdefault("progress", SilentProgress())
    return finetune(model, *data, settings or make_settings(), lora=lora, out_dir=folder, **options)


@pytest.fixture(scope="module")
def whole(model, data, tmp_path_factory):
    """An unbroken run that all others are compared with."""
    return run(model, data, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the finished run's folder, to be changed."""
    return shutil.copytree(whole.run_dir, tmp_path / "copy")


def curve(folder):
    keep = ("kind", "step", "loss", "grad_norm", "learning_rate", "n_tokens")
    return [{k: r.get(k) for k in keep} for r in read_metrics(folder / "metrics.jsonl")]


def test_a_run_learns_and_leaves_the_base_alone(model, data, whole):
    assert whole.held_out_after.loss < whole.held_out_before.loss
    assert whole.steps == 12
    assert whole.mode == "lora"
    start = init_lora(model.config, LORA, jax.random.key(0))
    changed = jax.tree.map(lambda a, b: bool((np.asarray(a) != np.asarray(b)).any()), start, whole.adapters)
    assert all(jax.tree.leaves(changed))
    assert tree_sha256(model.params) == tree_sha256(make_model().params)


def test_what_the_folder_holds(model, data, whole):
    config = read_config(whole.run_dir)
    assert config["model"]["sha256"] == model.source.sha256
    assert config["data"]["train"]["fingerprint"] == data[0].fingerprint
    assert TrainSettings.from_json(config["settings"]) == make_settings()
    assert LoraConfig(**{**config["lora"], "targets": tuple(config["lora"]["targets"])}) == LORA
    assert {"jax", "optax", "python"} <= set(config["versions"])
    result = json.loads((whole.run_dir / "result.json").read_text())
    assert result["held_out_after"]["loss"] == whole.held_out_after.loss
    assert result["tokens_per_s_median"] > 0
    kinds = [(r["kind"], r["step"]) for r in read_metrics(whole.run_dir / "metrics.jsonl")]
    assert kinds == [("receipt", 0), ("eval", 0), *(("train", i) for i in range(1, 7)), ("eval", 6),
                     *(("train", i) for i in range(7, 13)), ("eval", 12)]  # fmt: skip
    assert sorted(p.name for p in (whole.run_dir / "checkpoints").iterdir()) == ["12", "8"]


def test_memory_is_counted_from_the_trees(model, whole):
    memory = whole.memory
    assert memory.weights_bytes == tree_bytes(model.params)
    assert memory.trainable_bytes == tree_bytes(whole.adapters)
    # Adam: two moments like the adapters, and its count and the schedule's.
    assert memory.optimizer_bytes == 2 * memory.trainable_bytes + 8
    assert memory.activations_bytes > 0
    assert memory.peak_rss_bytes > memory.weights_bytes
    phases = ["opening", "compiling", "loading", "first evaluation", "training"]
    assert [phase.name for phase in memory.phases] == phases
    peaks = [phase.peak_rss_bytes for phase in memory.phases]
    assert peaks == sorted(peaks)
    assert peaks[-1] <= memory.peak_rss_bytes


def test_frozen_base_is_never_in_a_checkpoint(whole):
    names = (whole.run_dir / "checkpoints" / "12" / "state" / "_METADATA").read_text()
    assert "lora_a" in names
    for frozen in ("embed", "kernel", "norm", "head"):
        assert frozen not in names


def test_same_run_again_gives_the_same_bits(model, data, whole, tmp_path):
    again = run(model, data, tmp_path / "run")
    assert tree_sha256(again.trainable) == tree_sha256(whole.trainable)
    assert curve(tmp_path / "run") == curve(whole.run_dir)


@pytest.mark.parametrize("stop", [1, 5, 11])
def test_stop_and_resume_give_the_same_bits(model, data, whole, tmp_path, stop):
    def hook(figures):
        if figures.step == stop:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="resume") as caught:
        run(model, data, tmp_path / "run", hooks=[hook])
    assert caught.value.exit_code == 143
    result = run(model, data, tmp_path / "run", resume=True)
    # The step that ran when the signal came was finished, and those before it are not run again.
    assert [f.step for f in result.figures] == list(range(stop + 2, 13))
    assert tree_sha256(result.trainable) == tree_sha256(whole.trainable)
    assert curve(tmp_path / "run") == curve(whole.run_dir)
    assert result.held_out_before == whole.held_out_before
    assert result.held_out_after == whole.held_out_after


def test_signal_during_the_last_evaluation(model, data, whole, tmp_path):
    class Signal(SilentProgress):
        def step(self, step, **figures):
            if step == 12:
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted, match="step 12"):
        run(model, data, tmp_path / "run", progress=Signal())
    result = run(model, data, tmp_path / "run", resume=True)
    assert tree_sha256(result.trainable) == tree_sha256(whole.trainable)
    assert curve(tmp_path / "run") == curve(whole.run_dir)


def test_finished_run_can_be_resumed_and_changes_nothing(model, data, whole, copy):
    before = curve(copy)
    again = run(model, data, copy, resume=True)
    assert again.figures == ()
    assert tree_sha256(again.trainable) == tree_sha256(whole.trainable)
    assert curve(copy) == before
    assert again.held_out_after == whole.held_out_after
    assert again.tokens_per_s > 0


def test_full_parameter_training(model, data, tmp_path):
    on_device = dataclasses.replace(model, params=jax.tree.map(jnp.asarray, model.params))
    result = run(on_device, data, tmp_path / "run", make_settings(learning_rate=3e-3), lora=None)
    assert result.held_out_after.loss < result.held_out_before.loss
    assert jax.tree.structure(result.trainable) == jax.tree.structure(model.params)
    assert result.adapters == {}
    assert result.memory.weights_bytes == 0
    assert tree_sha256(on_device.params) == tree_sha256(model.params)  # neither changed nor donated away


def test_quantised_base_stays_quantised(model, data, tmp_path):
    blocks = {
        name: {"kernel": quantize_int8(jnp.asarray(part["kernel"]), 8)} if name.endswith("_proj") else part
        for name, part in model.params["blocks"].items()
    }
    quantised = dataclasses.replace(
        model,
        params={**model.params, "blocks": blocks},
        source=dataclasses.replace(model.source, base="int8"),
    )
    result = run(quantised, data, tmp_path / "run")
    assert result.held_out_after.loss < result.held_out_before.loss
    assert result.memory.weights_bytes == tree_bytes(quantised.params) < tree_bytes(model.params)


def test_another_model_is_refused_naming_both_fingerprints(model, data, whole):
    other = dataclasses.replace(model, source=dataclasses.replace(model.source, sha256="f" * 64))
    with pytest.raises(RunError, match=f"another model: fingerprint {model.source.sha256}.*{'f' * 64}"):
        run(other, data, whole.run_dir, resume=True)
    held_otherwise = dataclasses.replace(model, source=dataclasses.replace(model.source, base="int8"))
    with pytest.raises(RunError, match=r"held as f32 then, .* held as int8 now"):
        run(held_otherwise, data, whole.run_dir, resume=True)


def test_other_data_is_refused_naming_both_fingerprints(model, data, whole):
    other = make_rows(5)
    with pytest.raises(
        RunError, match=f"another training data: fingerprint {data[0].fingerprint}.*{other.fingerprint}"
    ):
        run(model, (other, data[1]), whole.run_dir, resume=True)
    with pytest.raises(RunError, match="another held-out data"):
        run(model, (data[0], other), whole.run_dir, resume=True)


def test_other_settings_are_refused_by_name(model, data, whole):
    with pytest.raises(RunError, match=r"learning_rate was 0\.01, is 0\.02"):
        run(model, data, whole.run_dir, make_settings(learning_rate=0.02), resume=True)
    with pytest.raises(RunError, match=r"lora was \{.*'rank': 2.*'rank': 3"):
        run(model, data, whole.run_dir, lora=LoraConfig(rank=3), resume=True)
    with pytest.raises(RunError, match=r"lora was .* is None"):
        run(model, data, whole.run_dir, lora=None, resume=True)


def test_other_versions_are_only_noted(model, data, copy):
    file = copy / "config.json"
    config = json.loads(file.read_text())
    config["versions"]["jax"] = "0.0.1"
    file.write_text(json.dumps(config))
    notes = Notes()
    run(model, data, copy, resume=True, progress=notes)
    assert any("jax was 0.0.1" in text for text in notes.texts)


def test_existing_run_is_refused_or_replaced(model, data, whole, copy):
    before = curve(copy)
    with pytest.raises(RunError, match=r"resume.*overwrite"):
        run(model, data, copy)
    assert curve(copy) == before
    (copy / "metrics.jsonl").unlink()
    result = run(model, data, copy, overwrite=True)
    assert [f.step for f in result.figures] == list(range(1, 13))
    assert curve(copy) == before


def test_damaged_newest_checkpoint_costs_only_its_steps(model, data, whole, copy):
    for file in (copy / "checkpoints" / "12" / "state" / "d").iterdir():
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    notes = Notes()
    result = run(model, data, copy, resume=True, progress=notes)
    assert any("step 12" in text and "step 8" in text for text in notes.texts)
    assert result.figures[0].step == 9
    assert tree_sha256(result.trainable) == tree_sha256(whole.trainable)
    assert curve(copy) == curve(whole.run_dir)


def test_run_that_diverges_keeps_what_was_good(model, data, tmp_path):
    settings = make_settings(
        learning_rate=1e38, clip_norm=None, optimizer="sgd", warmup=0, checkpoint_every=1
    )
    with pytest.raises(NonFiniteLossError, match=r"at step \d+ .*rows \d+ to \d+ of the shuffled order"):
        run(model, data, tmp_path / "run", settings)


def test_held_out_rows_without_a_counted_token(model, data, tmp_path):
    silent = dataclasses.replace(data[1], loss=np.zeros_like(data[1].loss))
    with pytest.raises(DataError, match="no token whose loss counts"):
        run(model, (data[0], silent), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_adapters_that_are_scaled_to_nothing_are_refused(model, data, tmp_path):
    with pytest.raises(ConfigError, match="alpha 0 scales the adapters"):
        run(model, data, tmp_path / "run", lora=dataclasses.replace(LORA, alpha=0.0))
    assert not (tmp_path / "run").exists()


def test_a_signal_while_programs_are_made_costs_nothing(model, data, copy, tmp_path, monkeypatch):
    module = importlib.import_module("edgejax.train.finetune")  # the package has a function of that name
    real = module._compile

    def stopped(*args):
        signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(module, "_compile", stopped)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    for folder, how in ((tmp_path / "new", {}), (copy, {"overwrite": True})):
        with pytest.raises(Interrupted, match="nothing was written or removed") as stop:
            run(model, data, folder, **how)
        assert (stop.value.exit_code, stop.value.resumable) == (143, False)
    assert not (tmp_path / "new").exists()
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_full_disk_is_found_before_training(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr("edgejax.train.checkpoint.disk_free_bytes", lambda path: 1000)
    with pytest.raises(RunError, match="1000 B free"):
        run(model, data, tmp_path / "run")


def test_metrics_that_vanished_do_not_stop_a_resume(model, data, whole, tmp_path):
    def hook(figures):
        if figures.step == 5:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(model, data, tmp_path / "run", hooks=[hook])
    os.unlink(tmp_path / "run" / "metrics.jsonl")
    result = run(model, data, tmp_path / "run", resume=True)
    assert result.held_out_before == whole.held_out_before
    assert tree_sha256(result.trainable) == tree_sha256(whole.trainable)


def test_refused_settings_leave_no_folder(model, data, tmp_path):
    with pytest.raises(ConfigError):
        run(model, data, tmp_path / "run", resume=True, overwrite=True)
    assert not (tmp_path / "run").exists()
