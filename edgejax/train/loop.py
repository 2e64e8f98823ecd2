"""The loop over optimizer steps: what is logged, evaluated, saved, and when it stops.

A step's figures are fetched while the next one runs, so the device never waits for the host. Before an evaluation
or a checkpoint the last figures are fetched, and a checkpoint is written only of a state without NaN or infinity.
"""

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence

import jax
import numpy as np
import optax

from edgejax.core.arrays import PyTree
from edgejax.core.errors import Interrupted, NonFiniteLossError
from edgejax.data import Batch
from edgejax.train.batches import StepBatches
from edgejax.train.checkpoint import Checkpoints, nonfinite_leaves
from edgejax.train.evaluate import EvalResult
from edgejax.train.learning_rate import rates
from edgejax.train.metrics import MetricsLog
from edgejax.train.progress import Progress, SilentProgress
from edgejax.train.settings import TrainSettings
from edgejax.train.signals import Received, SignalGuard, signal_name
from edgejax.train.state import TrainState

StepFunction = Callable[[TrainState, PyTree, Batch], tuple[TrainState, dict[str, jax.Array]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepFigures:
    """What is known of a finished step."""

    step: int  # optimizer steps taken, this one included
    loss: float  # nats per counted token, before the step's update
    grad_norm: float  # global, before clipping
    learning_rate: float
    n_tokens: int  # tokens whose loss counted
    n_positions: int  # tokens that were read, padding left out
    seconds: float  # since the step before finished


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoopResult:
    """The state after the last step, and how long the steps took in this process."""

    state: TrainState
    step: int
    figures: tuple[StepFigures, ...]  # of the steps of this process
    seconds: float

    @property
    def tokens_per_s(self) -> float | None:
        """Median over the steps of this process but its first (which compiles); None if there was but one."""
        speeds = [f.n_positions / f.seconds for f in self.figures[1:] if f.seconds > 0]
        return statistics.median(speeds) if speeds else None


def train_loop(
    step_fn: StepFunction,
    state: TrainState,
    frozen: PyTree,
    batches: StepBatches,
    settings: TrainSettings,
    *,
    schedule: optax.Schedule,
    start_step: int = 0,
    checkpoints: Checkpoints | None = None,
    metrics_log: MetricsLog | None = None,
    evaluate: Callable[[PyTree], EvalResult | None] | None = None,
    guard: Received | None = None,
    progress: Progress | None = None,
    hooks: Sequence[Callable[[StepFigures], None]] = (),
) -> LoopResult:
    """Runs the steps ``start_step`` to ``settings.steps`` and returns the last state.

    Args:
      step_fn: ``(state, frozen, batch [A, B, T]) -> (state, {"loss", "grad_norm", "n_tokens"})``; may donate the
        state, which is not to be used afterwards.
      state: the state after ``start_step`` steps.
      frozen: passed on to the step.
      batches: the batch of each step.
      settings: number of steps and intervals.
      schedule: the learning rate by step, for the log (the optimizer holds its own).
      start_step: steps taken before, 0 or the restored checkpoint's.
      checkpoints: where to save; None saves nothing.
      metrics_log: where to append figures; None logs nothing.
      evaluate: from the trained leaves to the held-out figures, None if it was stopped; called every
        ``eval_every`` steps and after the last.
      guard: notes SIGINT and SIGTERM; made here if None.
      progress: what a person sees.
      hooks: called with the figures of each step, in order.

    Raises:
      NonFiniteLossError: a loss, a gradient norm or the state became NaN or infinite; nothing of it was saved.
      Interrupted: a signal came; the state was saved.
      RunError: a checkpoint or the log could not be written; the checkpoints before stay.
    """
    if guard is None:
        with SignalGuard() as guard:
            return train_loop(
                step_fn, state, frozen, batches, settings, schedule=schedule, start_step=start_step,
                checkpoints=checkpoints, metrics_log=metrics_log, evaluate=evaluate, guard=guard, progress=progress,
                hooks=hooks,
            )  # fmt: skip
    run = _Run(
        batches=batches,
        settings=settings,
        rates=rates(schedule, settings.steps),
        checkpoints=checkpoints,
        metrics_log=metrics_log,
        evaluate=evaluate,
        guard=guard,
        progress=progress or SilentProgress(),
        hooks=tuple(hooks),
        start_step=start_step,
    )
    started = time.perf_counter()
    step = start_step
    run.evaluate_if_due(step, state)
    run.mark()
    while step < settings.steps and guard.received is None:
        batch = batches(step)
        state, metrics = step_fn(state, frozen, batch)
        run.settle()
        run.waiting = (step, metrics, int(np.count_nonzero(batch.segment_ids)))
        step += 1
        if run.is_boundary(step):
            run.settle()
            run.evaluate_if_due(step, state)
            if step % settings.checkpoint_every == 0 or step == settings.steps:
                run.save(step, state)
            run.mark()
    run.settle()
    if guard.received is not None:
        run.interrupt(step, state)
    return LoopResult(
        state=state, step=step, figures=tuple(run.figures), seconds=time.perf_counter() - started
    )


@dataclasses.dataclass(kw_only=True)
class _Run:
    """What the loop carries besides the state."""

    batches: StepBatches
    settings: TrainSettings
    rates: np.ndarray
    checkpoints: Checkpoints | None
    metrics_log: MetricsLog | None
    evaluate: Callable[[PyTree], EvalResult | None] | None
    guard: Received
    progress: Progress
    hooks: tuple[Callable[[StepFigures], None], ...]
    start_step: int
    waiting: tuple[int, dict[str, jax.Array], int] | None = (
        None  # a step whose figures are still on the device
    )
    figures: list[StepFigures] = dataclasses.field(default_factory=list)
    marked: float = 0.0  # when the step being timed began

    def mark(self) -> None:
        self.marked = time.perf_counter()

    def is_boundary(self, step: int) -> bool:
        every = self.settings.eval_every
        due = every is not None and step % every == 0
        return due or step % self.settings.checkpoint_every == 0 or step == self.settings.steps

    def settle(self) -> None:
        """Fetches, checks and logs the figures of the step before."""
        if self.waiting is None:
            return
        index, device_metrics, n_positions = self.waiting
        self.waiting = None
        metrics = jax.device_get(device_metrics)
        now = time.perf_counter()
        figures = StepFigures(
            step=index + 1,
            loss=float(metrics["loss"]),
            grad_norm=float(metrics["grad_norm"]),
            learning_rate=float(self.rates[index]),
            n_tokens=int(metrics["n_tokens"]),
            n_positions=n_positions,
            seconds=now - self.marked,
        )
        self.marked = now
        for name in ("loss", "grad_norm"):
            value = getattr(figures, name)
            if not math.isfinite(value):
                self.refuse(index + 1, f"the {'loss' if name == 'loss' else 'gradient norm'} is {value}")
        self.figures.append(figures)
        if self.metrics_log is not None and (index + 1) % self.settings.log_every == 0:
            values = dataclasses.asdict(figures)
            self.metrics_log.append("train", step=values.pop("step"), **values)
        self.show(figures)
        for hook in self.hooks:
            hook(figures)

    def show(self, figures: StepFigures) -> None:
        recent = self.figures[1:][-20:]
        seconds = sum(f.seconds for f in recent)
        self.progress.step(
            figures.step,
            loss=figures.loss,
            tokens_per_s=sum(f.n_positions for f in recent) / seconds if seconds else None,
            eta_s=(self.settings.steps - figures.step) * seconds / len(recent) if recent else None,
        )

    def evaluate_if_due(self, step: int, state: TrainState) -> None:
        """Evaluates at a multiple of ``eval_every`` and at the end, unless the log already has it."""
        every = self.settings.eval_every
        due = step == self.settings.steps or (every is not None and step > 0 and step % every == 0)
        if self.evaluate is None or not due or self.guard.received is not None:
            return
        if self.metrics_log is not None and step in self.metrics_log.evaluations:
            return
        result = self.evaluate(state.trainable)
        if result is None:
            return
        if not math.isfinite(result.loss):
            self.refuse(step, f"the held-out loss is {result.loss}")
        log_evaluation(step, result, self.metrics_log, self.progress)

    def save(self, step: int, state: TrainState) -> None:
        if self.checkpoints is None or self.checkpoints.last_saved == step:
            return
        bad = nonfinite_leaves(state)
        if bad:
            self.refuse(step, f"NaN or infinity in {', '.join(bad[:3])}{' and more' if len(bad) > 3 else ''}")
        if self.metrics_log is not None:
            self.metrics_log.sync()
        self.checkpoints.save(step, state, data_position=self.batches.position(step))

    def refuse(self, step: int, what: str) -> None:
        raise NonFiniteLossError(
            f"at step {step} {what}; its batch: {self.batches.describe(step - 1)}. Training stopped and nothing of this "
            f"step was saved; {self.kept()}. Try a lower learning rate, more warm-up, or clipping, or look at those rows."
        )

    def interrupt(self, step: int, state: TrainState) -> None:
        number = self.guard.received
        assert number is not None
        if step > self.start_step:
            self.save(step, state)
        where = self.kept()
        how = "Go on with the same command and resume." if self.checkpoints is not None else ""
        raise Interrupted(
            f"stopped by {signal_name(number)} after step {step} of {self.settings.steps}; {where}. {how}".strip(),
            number,
        )

    def kept(self) -> str:
        if self.checkpoints is None:
            return "no checkpoints were asked for"
        if self.checkpoints.last_saved is None:
            return "no checkpoint had been written yet"
        return f"the checkpoint of step {self.checkpoints.last_saved} is in {self.checkpoints.folder}"


def log_evaluation(step: int, result: EvalResult, metrics_log: MetricsLog | None, progress: Progress) -> None:
    """Writes the record of an evaluation and shows it."""
    perplexity = result.perplexity if math.isfinite(result.perplexity) else None
    if metrics_log is not None:
        metrics_log.append(
            "eval", step=step, loss=result.loss, perplexity=perplexity, n_tokens=result.n_tokens
        )
    progress.note(f"step {step}: held-out loss {result.loss:.4f}, perplexity {result.perplexity:.3f}")
