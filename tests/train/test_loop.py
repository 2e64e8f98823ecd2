"""The loop by itself, around a step of three lines: what is logged, saved and refused, and when it stops."""

import errno
import json
import os
import signal

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from edgejax.core.errors import Interrupted, NonFiniteLossError, RunError
from edgejax.data import Batch
from edgejax.train import (
    Checkpoints,
    EvalResult,
    MetricsLog,
    PlainProgress,
    RunIdentity,
    TrainSettings,
    TrainState,
    init_state,
    make_schedule,
    read_metrics,
    train_loop,
    tree_sha256,
)

pytestmark = pytest.mark.quick

OPTIMIZER = optax.adam(0.1)


@jax.jit
def _plain_step(state, frozen, batch):
    def loss_of(w):
        return jnp.mean((batch.tokens[0, :, 0].astype(jnp.float32) @ w.reshape(2, 2) - frozen["target"]) ** 2)

    loss, gradient = jax.value_and_grad(loss_of)(state.trainable["w"])
    updates, opt_state = OPTIMIZER.update({"w": gradient}, state.opt_state)
    trainable = optax.apply_updates(state.trainable, updates)
    metrics = {"loss": loss, "grad_norm": jnp.linalg.norm(gradient), "n_tokens": jnp.int32(3)}
    return TrainState(state.step + 1, trainable, opt_state), metrics


class Batches:
    """Two rows of three tokens by the step's number, the last one padding."""

    def __init__(self):
        self.asked: list[int] = []

    def __call__(self, step):
        self.asked.append(step)
        tokens = np.full((1, 2, 3), step % 5, np.int32) + np.arange(2, dtype=np.int32)[None, :, None]
        segments = np.broadcast_to(np.array([1, 1, 0], np.int32), tokens.shape)
        return Batch(tokens, tokens, segments > 0, segments, np.zeros_like(tokens))

    def position(self, step):
        return 2 * step

    def describe(self, step):
        return f"rows {2 * step} and {2 * step + 1}"


class Bench:
    """A run in a folder, its parts at hand."""

    def __init__(self, folder, **settings):
        values = {"steps": 10, "checkpoint_every": 4, "lr_schedule": "constant", "warmup": 0, **settings}
        self.folder = folder
        self.settings = TrainSettings(**values)
        self.batches = Batches()
        self.checkpoints = Checkpoints(
            folder / "checkpoints", identity=RunIdentity(model="m", data="d", settings="s"), keep=2
        )
        self.start = init_state({"w": jnp.arange(4.0)}, OPTIMIZER)
        self.frozen = {"target": jnp.array([1.0, -1.0])}

    def run(self, step_fn=_plain_step, *, state=None, start_step=0, keep_to_step=None, **options):
        schedule = make_schedule("constant", 0.1, steps=self.settings.steps)
        with MetricsLog(self.folder / "metrics.jsonl", keep_to_step=keep_to_step) as log:
            return train_loop(
                step_fn, self.start if state is None else state, self.frozen, self.batches, self.settings,
                schedule=schedule, start_step=start_step, checkpoints=self.checkpoints, metrics_log=log, **options,
            )  # fmt: skip

    def records(self, kind="train"):
        return [r for r in read_metrics(self.folder / "metrics.jsonl") if r["kind"] == kind]

    def resume(self, **options):
        step, state, _ = self.checkpoints.restore(self.start)
        return self.run(state=state, start_step=step, keep_to_step=step, **options)


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_every_step_is_logged_once_in_order_with_the_right_figures(bench):
    result = bench.run()
    records = bench.records()
    assert [r["step"] for r in records] == list(range(1, 11))
    assert bench.batches.asked == list(range(10))
    assert int(result.state.step) == result.step == 10
    assert [f.loss for f in result.figures] == [r["loss"] for r in records]
    assert all(r["learning_rate"] == pytest.approx(0.1) for r in records)
    assert {r["n_positions"] for r in records} == {4}  # padding is not counted
    state = bench.start
    for step, record in enumerate(records):
        state, metrics = _plain_step(state, bench.frozen, Batches()(step))
        assert record["loss"] == float(metrics["loss"])
        assert record["grad_norm"] == float(metrics["grad_norm"])
    assert tree_sha256(state) == tree_sha256(result.state)


def test_figures_are_fetched_while_the_next_step_runs(bench):
    order = []

    def step_fn(state, frozen, batch):
        order.append(f"start {len(bench.batches.asked)}")
        return _plain_step(state, frozen, batch)

    bench.run(step_fn, hooks=[lambda figures: order.append(f"figures {figures.step}")])
    assert order[:5] == ["start 1", "start 2", "figures 1", "start 3", "figures 2"]
    # Before a checkpoint (step 4) nothing is left on the device.
    assert order.index("figures 4") < order.index("start 5")


def test_log_every(tmp_path):
    bench = Bench(tmp_path, log_every=3)
    bench.run()
    assert [r["step"] for r in bench.records()] == [3, 6, 9]


@pytest.mark.parametrize("stop", [4, 8])
def test_resume_gives_the_bits_of_an_unbroken_run(tmp_path, stop):
    whole = Bench(tmp_path / "whole")
    (tmp_path / "whole").mkdir()
    (tmp_path / "broken").mkdir()
    expected = whole.run()
    broken = Bench(tmp_path / "broken")

    def hook(figures):
        if figures.step == stop + 1:
            raise KeyboardInterrupt  # not a stop the loop knows of: like a crash

    with pytest.raises(KeyboardInterrupt):
        broken.run(hooks=[hook])
    assert broken.checkpoints.steps()[-1] == stop
    result = broken.resume()
    assert broken.batches.asked[-(10 - stop) :] == list(range(stop, 10))
    assert tree_sha256(result.state) == tree_sha256(expected.state)
    keep = ("step", "loss", "grad_norm")
    assert [[r[k] for k in keep] for r in broken.records()] == [[r[k] for k in keep] for r in whole.records()]


def test_evaluations_come_at_their_steps_and_at_the_end_once(tmp_path):
    bench = Bench(tmp_path, steps=7, eval_every=3)
    seen = []

    def evaluate(trainable):
        seen.append(np.asarray(trainable["w"]).tolist())
        return EvalResult(loss=1.0 + len(seen), n_tokens=5)

    bench.run(evaluate=evaluate)
    assert [(r["step"], r["loss"]) for r in bench.records("eval")] == [(3, 2.0), (6, 3.0), (7, 4.0)]
    assert len({tuple(w) for w in seen}) == 3
    bench.resume(evaluate=evaluate)  # a finished run: nothing to do, nothing done twice
    assert len(seen) == 3
    assert len(bench.records("eval")) == 3


def poisoned(at, *, loss=None, grad_norm=None, weight=None):
    """The step, but from the call ``at`` on something in it is not finite."""
    count = 0

    def step_fn(state, frozen, batch):
        nonlocal count
        count += 1
        state, metrics = _plain_step(state, frozen, batch)
        if count >= at:
            for name, value in (("loss", loss), ("grad_norm", grad_norm)):
                if value is not None:
                    metrics = {**metrics, name: jnp.float32(value)}
            if weight is not None:
                state = state._replace(trainable={"w": state.trainable["w"].at[0].set(weight)})
        return state, metrics

    return step_fn


@pytest.mark.parametrize("what", [{"loss": np.nan}, {"loss": np.inf}, {"grad_norm": np.nan}])
@pytest.mark.parametrize("at", [1, 6, 8, 10])
def test_non_finite_figures_stop_the_run_and_keep_the_last_good_checkpoint(bench, what, at):
    with pytest.raises(
        NonFiniteLossError, match=rf"at step {at} .*rows {2 * at - 2} and {2 * at - 1}"
    ) as caught:
        bench.run(poisoned(at, **what))
    assert caught.value.exit_code == 3
    good = (at - 1) // 4 * 4
    assert bench.checkpoints.steps() == [step for step in (4, 8) if step <= good]
    assert ("no checkpoint had been" in str(caught.value)) == (good == 0)
    assert [r["step"] for r in bench.records()] == list(range(1, at))
    if good:
        assert bench.resume().step == 10


def test_state_that_is_not_finite_is_never_saved_even_if_the_loss_is(bench):
    with pytest.raises(NonFiniteLossError, match=r"at step 8 NaN or infinity in trainable\.w"):
        bench.run(poisoned(8, weight=np.inf))
    assert bench.checkpoints.steps() == [4]


def test_held_out_loss_that_is_not_finite(tmp_path):
    bench = Bench(tmp_path, eval_every=4)
    with pytest.raises(NonFiniteLossError, match="held-out loss is nan"):
        bench.run(evaluate=lambda trainable: EvalResult(loss=float("nan"), n_tokens=1))
    assert bench.checkpoints.steps() == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_finishes_the_step_saves_and_says_how_to_go_on(bench, number):
    expected = tree_sha256(bench.run().state)
    again = Bench(bench.folder / "again")
    again.folder.mkdir()

    def hook(figures):
        if figures.step == 5:
            signal.raise_signal(number)

    with pytest.raises(Interrupted, match=r"after step 6 of 10; the checkpoint of step 6 .*resume") as caught:
        again.run(hooks=[hook])
    assert caught.value.exit_code == 128 + number
    assert again.checkpoints.steps() == [4, 6]
    assert [r["step"] for r in again.records()] == list(range(1, 7))
    assert tree_sha256(again.resume().state) == expected
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signal_before_anything_was_trained(bench):
    class Received:
        received = signal.SIGTERM

    with pytest.raises(Interrupted, match="after step 0 of 10; no checkpoint had been written yet"):
        bench.run(guard=Received())
    assert bench.checkpoints.steps() == []


def test_disk_that_fills_during_the_run_keeps_the_last_good_checkpoint(bench, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if bench.checkpoints.last_saved == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(RunError, match="No space left"):
            bench.run()
    assert bench.checkpoints.steps()[0] == 4
    assert bench.resume().step == 10


def test_loop_without_folder_or_log(bench):
    schedule = make_schedule("constant", 0.1, steps=10)
    result = train_loop(_plain_step, bench.start, bench.frozen, Batches(), bench.settings, schedule=schedule)
    assert result.step == 10
    assert result.tokens_per_s > 0


def test_plain_progress_shows_first_last_and_evaluations(tmp_path, capsys):
    bench = Bench(tmp_path, eval_every=5)
    progress = PlainProgress(10, memory_bytes=lambda: 3 * 2**20, every_s=1000)
    bench.run(progress=progress, evaluate=lambda trainable: EvalResult(loss=2.0, n_tokens=1))
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert [line.split(":")[0].split("  ")[0] for line in lines] == [
        "step 1/10",
        "step 5",
        "step 10/10",
        "step 10",
    ]
    assert "3.00 MiB" in lines[0]
    assert "perplexity 7.389" in lines[1]
    assert "tokens/s" in lines[2]


def test_metrics_are_json_without_nan(bench):
    bench.run()
    lines = (bench.folder / "metrics.jsonl").read_text().splitlines()
    assert lines
    for line in lines:
        json.loads(line, parse_constant=pytest.fail)


def test_progress_that_nobody_reads_any_more_does_not_stop_a_run(bench):
    class Gone:
        def write(self, text):
            raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

        flush = None

    assert bench.run(progress=PlainProgress(10, stream=Gone(), every_s=0.0)).step == 10
