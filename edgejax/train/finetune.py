"""One fine-tuning run from a loaded model and packed text to trained leaves, in a folder that can be resumed."""

import contextlib
import dataclasses
import hashlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from edgejax.core.arrays import PyTree
from edgejax.core.errors import Interrupted, RunError
from edgejax.core.host import package_versions
from edgejax.data import PackedDataset
from edgejax.measure.memory import MemoryReport, memory_report, process_memory
from edgejax.models import Decoder, LoraConfig, ModelConfig, init_lora
from edgejax.quant import dequantize, is_quantized
from edgejax.train.batches import DatasetBatches
from edgejax.train.checkpoint import Checkpoints, RunIdentity
from edgejax.train.evaluate import EvalResult, evaluate_with
from edgejax.train.learning_rate import make_schedule, warmup_steps
from edgejax.train.loop import LoopResult, StepFigures, log_evaluation, train_loop
from edgejax.train.metrics import MetricsLog, read_metrics
from edgejax.train.optimizers import make_optimizer
from edgejax.train.progress import LiveProgress, PlainProgress, Progress
from edgejax.train.run_folder import RunFolder, write_json
from edgejax.train.settings import TrainSettings
from edgejax.train.signals import SignalGuard, signal_name
from edgejax.train.state import init_state
from edgejax.train.whole import Mode, make_eval_step, make_train_step


class SourceLike(Protocol):
    """Where a model came from."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def base(self) -> str: ...


class ModelLike(Protocol):
    """A loaded model: its configuration, its parameters, and where they came from."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> PyTree: ...
    @property
    def source(self) -> SourceLike: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run gave. ``result.json`` of its folder holds ``summary()``."""

    run_dir: Path
    mode: Mode
    trainable: PyTree  # adapters (lora) or all parameters, float32 (full)
    steps: int
    held_out_before: EvalResult
    held_out_after: EvalResult
    tokens_per_s: float | None  # median over the steps, padding not counted
    seconds: float  # of this process, compiling and evaluations included
    memory: MemoryReport
    figures: tuple[StepFigures, ...]  # of the steps of this process

    @property
    def adapters(self) -> PyTree:
        """The adapters; an empty dict after full-parameter training."""
        return self.trainable if self.mode == "lora" else {}

    def summary(self) -> dict[str, Any]:
        """All figures as JSON values, without arrays."""
        return {
            "mode": self.mode,
            "steps": self.steps,
            "held_out_before": _eval_json(self.held_out_before),
            "held_out_after": _eval_json(self.held_out_after),
            "tokens_per_s_median": self.tokens_per_s,
            "seconds": self.seconds,
            "memory": dataclasses.asdict(self.memory),
            "versions": package_versions(),
        }


def finetune(
    model: ModelLike,
    train: PackedDataset,
    held_out: PackedDataset,
    settings: TrainSettings | None = None,
    *,
    lora: LoraConfig | None,
    out_dir: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
    hooks: Sequence[Callable[[StepFigures], None]] = (),
    runtime_bytes: int | None = None,
) -> FinetuneResult:
    """Evaluates, trains, evaluates again; ``out_dir`` holds what is needed to go on after any stop.

    Args:
      model: what ``weights.load_model`` gives.
      train: rows to learn from.
      held_out: rows to judge by.
      settings: how to train; ``TrainSettings()`` if None.
      lora: which layers get adapters; None trains all parameters, as float32 copies.
      out_dir: the run's folder (``run_folder.py``).
      resume: go on with the run that is there, from its newest whole checkpoint.
      overwrite: replace the run that is there.
      progress: what a person sees; by default a live line in a terminal and plain lines elsewhere.
      hooks: called with the figures of each step.
      runtime_bytes: resident memory before the model was loaded, for the account of memory.

    Returns:
      The trained leaves and the figures.

    Raises:
      ConfigError: settings that cannot be honoured.
      DataError: held-out rows without a token that counts.
      RunError: the folder cannot be used, or belongs to another model, data set or settings.
      NonFiniteLossError: the loss became NaN or infinite.
      Interrupted: SIGINT or SIGTERM; the state was saved.

    Example::

        model = load_model("smollm2-135m")
        rows = load_text("python-reference", model.tokenizer, seq_length=512)
        result = finetune(model, rows.train, rows.held_out, TrainSettings(steps=60), lora=LoraConfig(), out_dir="run")
    """
    started = time.perf_counter()
    settings = settings or TrainSettings()
    mode: Mode = "full" if lora is None else "lora"
    config = run_config(model, train, held_out, settings, lora)
    with contextlib.ExitStack() as stack:
        guard = stack.enter_context(SignalGuard())
        folder = stack.enter_context(RunFolder(out_dir, config=config, resume=resume, overwrite=overwrite))
        if progress is None:
            progress = _choose_progress(settings, stack)
        if resume:
            check_same_run(folder.config, config, progress.note)
        checkpoints = Checkpoints(
            folder.checkpoints_path,
            identity=_identity(config),
            keep=settings.keep_checkpoints,
            note=progress.note,
        )
        stack.callback(checkpoints.close)

        decoder = Decoder(model.config, lora)
        frozen, trainable = _parameters(model, lora, settings.seed)
        schedule = make_schedule(
            settings.schedule,
            settings.learning_rate,
            steps=settings.steps,
            warmup=settings.warmup,
            final_fraction=settings.final_rate_fraction,
        )
        optimizer = make_optimizer(
            settings.optimizer,
            settings.learning_rate if _is_constant(settings) else schedule,
            weight_decay=settings.weight_decay,
            clip_norm=settings.clip_norm,
            options=settings.optimizer_options,
        )
        state = init_state(trainable, optimizer)
        eval_step = make_eval_step(decoder, mode=mode)

        def evaluate(leaves: PyTree) -> EvalResult | None:
            return evaluate_with(
                eval_step, leaves, frozen, held_out, batch_size=settings.batch_size, max_rows=settings.eval_rows,
                should_stop=lambda: guard.received is not None,
            )  # fmt: skip

        restored = checkpoints.restore(state) if resume else None
        start_step = 0 if restored is None else restored[0]
        log = stack.enter_context(
            MetricsLog(folder.metrics_path, keep_to_step=start_step if resume else None)
        )
        checkpoints.check_space(state)
        before = log.evaluations.get(0)
        if before is None:
            first = evaluate(state.trainable)
            if first is None:
                assert guard.received is not None
                raise Interrupted(
                    f"stopped by {signal_name(guard.received)} before the first step; nothing was lost. "
                    "Go on with the same command and resume.",
                    guard.received,
                )
            log_evaluation(0, first, log, progress)
            before = log.evaluations[0]
        if restored is not None:
            state = restored[1]
        elif resume:
            progress.note("no checkpoint had been written yet; starting at step 0")
        del restored, trainable  # the state is donated to the first step; nothing may hold on to its arrays

        batches = DatasetBatches(train, settings)
        step_fn = make_train_step(decoder, optimizer, mode=mode, remat=settings.remat)
        compiled = step_fn.lower(state, frozen, batches(0)).compile()  # type: ignore[attr-defined]  # it is jitted
        loop = train_loop(
            compiled, state, frozen, batches, settings, schedule=schedule, start_step=start_step,
            checkpoints=checkpoints, metrics_log=log, evaluate=evaluate, guard=guard, progress=progress, hooks=hooks,
        )  # fmt: skip
        after = log.evaluations.get(loop.step)
        if after is None:  # a signal came during the last evaluation
            assert guard.received is not None
            raise Interrupted(
                f"stopped by {signal_name(guard.received)} after the last step, which is saved in {checkpoints.folder}. "
                "Resume evaluates it.",
                guard.received,
            )
        result = FinetuneResult(
            run_dir=folder.path,
            mode=mode,
            trainable=loop.state.trainable,
            steps=loop.step,
            held_out_before=_eval_result(before),
            held_out_after=_eval_result(after),
            tokens_per_s=_tokens_per_s(loop, folder.metrics_path),
            seconds=time.perf_counter() - started,
            memory=memory_report(
                frozen=frozen,
                trainable=loop.state.trainable,
                opt_state=loop.state.opt_state,
                compiled=compiled,
                runtime_bytes=runtime_bytes,
            ),
            figures=loop.figures,
        )
        try:
            write_json(folder.path / "result.json", result.summary())
        except OSError as error:
            raise RunError(
                f"cannot write {folder.path / 'result.json'}: {error.strerror or error}. The training is saved in "
                f"{checkpoints.folder}; free space, then resume."
            ) from error
    return result


def run_config(
    model: ModelLike,
    train: PackedDataset,
    held_out: PackedDataset,
    settings: TrainSettings,
    lora: LoraConfig | None,
) -> dict[str, Any]:
    """What ``config.json`` says of a run, as JSON values."""
    source = model.source
    config = {
        "settings": settings.to_json(),
        "lora": None if lora is None else dataclasses.asdict(lora),
        "model": {
            **{name: getattr(source, name) for name in ("name", "path", "format", "sha256", "base")},
            "config": dataclasses.asdict(model.config),
        },
        "data": {
            name: {
                "fingerprint": d.fingerprint,
                "seq_length": d.seq_length,
                "rows": d.n_rows,
                "documents": d.n_documents,
            }
            for name, d in (("train", train), ("held_out", held_out))
        },
        "versions": package_versions(),
    }
    return json.loads(json.dumps(config))


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], note: Callable[[str], None] = lambda text: None
) -> None:
    """Refuses to resume what is another run.

    Args:
      old: ``config.json`` of the run that is there.
      new: ``run_config`` of what was asked for.
      note: told when versions differ, with which the bits may differ.

    Raises:
      RunError: another model, other data, or other settings that decide the result, with both values.
    """
    try:
        pairs = [
            ("model", _model_fingerprint(old), _model_fingerprint(new)),
            ("training data", old["data"]["train"]["fingerprint"], new["data"]["train"]["fingerprint"]),
            ("held-out data", old["data"]["held_out"]["fingerprint"], new["data"]["held_out"]["fingerprint"]),
        ]
        then, now = _deciding(old), _deciding(new)
        old_versions = dict(old["versions"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"config.json of the run lacks {error}; it cannot be resumed, start a new run"
        ) from error
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise RunError(
                f"the run was made with another {what}: fingerprint {theirs} then, {ours} now. Give the same {what}, or "
                "start a new run in another folder."
            )
    changed = [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in now
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise RunError(
            f"the run was made with other settings: {'; '.join(changed)}. Resume with the same ones, or start a new run "
            "in another folder."
        )
    for name, version in new["versions"].items():
        if old_versions.get(name) != version:
            note(
                f"{name} was {old_versions.get(name)} and is {version}: the bits may differ from an unbroken run's"
            )


def _parameters(model: ModelLike, lora: LoraConfig | None, seed: int) -> tuple[PyTree, PyTree]:
    """(frozen, trainable). Trained leaves are never the model's own buffers, for the step donates them."""
    if lora is not None:
        return jax.device_put(model.params), init_lora(model.config, lora, jax.random.key(seed))

    def wide(leaf: Any) -> jax.Array:
        return jnp.array(dequantize(leaf), jnp.float32, copy=True)

    return {}, jax.tree.map(wide, model.params, is_leaf=is_quantized)


def _identity(config: Mapping[str, Any]) -> RunIdentity:
    deciding = json.dumps(_deciding(config), sort_keys=True)
    return RunIdentity(
        model=_model_fingerprint(config),
        data=config["data"]["train"]["fingerprint"],
        settings=hashlib.sha256(deciding.encode()).hexdigest(),
    )


def _model_fingerprint(config: Mapping[str, Any]) -> str:
    return f"{config['model']['sha256']} held as {config['model']['base']}"


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**TrainSettings.from_json(config["settings"]).deciding(), "lora": config["lora"]}


def _is_constant(settings: TrainSettings) -> bool:
    # Some optimizers take no schedule, so none is given where there is nothing to schedule.
    return settings.schedule == "constant" and warmup_steps(settings.warmup, settings.steps) == 0


def _choose_progress(settings: TrainSettings, stack: contextlib.ExitStack) -> Progress:
    def resident() -> int | None:
        return process_memory().rss_bytes

    if sys.stderr.isatty():
        return stack.enter_context(LiveProgress(settings.steps, memory_bytes=resident))
    return PlainProgress(settings.steps, memory_bytes=resident)


def _tokens_per_s(loop: LoopResult, metrics_path: Path) -> float | None:
    if loop.tokens_per_s is not None:
        return loop.tokens_per_s
    logged = [r["n_positions"] / r["seconds"] for r in read_metrics(metrics_path) if r["kind"] == "train"]
    return statistics.median(logged) if logged else None


def _eval_json(result: EvalResult) -> dict[str, Any]:
    perplexity = result.perplexity
    return {
        "loss": result.loss,
        "perplexity": perplexity if perplexity != float("inf") else None,
        "n_tokens": result.n_tokens,
    }


def _eval_result(record: Mapping[str, Any]) -> EvalResult:
    return EvalResult(loss=record["loss"], n_tokens=record["n_tokens"])
