"""One fine-tuning run from a loaded model and packed text to trained leaves, in a folder that can be resumed."""

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from edgejax.core.allocator import keep_scratch, release_freed_memory, release_library_code
from edgejax.core.arrays import PyTree
from edgejax.core.cache import forget_traces
from edgejax.core.errors import ConfigError, Interrupted, RunError
from edgejax.core.host import package_versions
from edgejax.data import PackedDataset
from edgejax.measure.memory import MemoryReport, PhaseMemory, memory_report, phase_memory, process_memory
from edgejax.models import LoraConfig
from edgejax.train.batches import DatasetBatches
from edgejax.train.evaluate import EvalResult, check_counted, evaluate_with
from edgejax.train.identity import ModelLike, OpenedLike, check_same_run, run_config, run_identity
from edgejax.train.loop import LoopResult, StepFigures, log_evaluation, train_loop
from edgejax.train.metrics import read_metrics
from edgejax.train.placement import mesh_receipt
from edgejax.train.processes import on_first, with_agreed_signals
from edgejax.train.programs import Programs, compile_programs
from edgejax.train.progress import LiveProgress, PlainProgress, Progress, SilentProgress
from edgejax.train.receipt import Receipt, make_receipt
from edgejax.train.run_folder import write_json
from edgejax.train.settings import TrainSettings
from edgejax.train.shared_run import open_checkpoints, open_folder, open_log
from edgejax.train.signals import Received, SignalGuard, signal_name
from edgejax.train.streamed import LayerSource
from edgejax.train.whole import Mode


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """What a run gave. ``result.json`` of its folder holds ``summary()``."""

    run_dir: Path
    mode: Mode
    model: Any  # the base: what was given, or with its weights what its load() gave, where adapters need them
    trainable: PyTree  # adapters, float32 (lora), or all parameters, float32 or bfloat16 (full)
    steps: int
    held_out_before: EvalResult
    held_out_after: EvalResult
    tokens_per_s: float | None  # median over the steps, padding not counted
    seconds: float  # of this process, compiling and evaluations included
    receipt: Receipt
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
            "receipt": self.receipt.to_json(),
            "versions": package_versions(),
        }


def finetune(
    model: ModelLike | OpenedLike,
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
    record: Mapping[str, Any] | None = None,
) -> FinetuneResult:
    """Evaluates, trains, evaluates again; ``out_dir`` holds what is needed to go on after any stop.

    Args:
      model: what ``weights.load_model`` gives; or ``weights.open_model``, whose weights are read after the programs
        were compiled and JAX's traces were dropped, so that the peak of memory is lower.
      train: rows to learn from.
      held_out: rows to judge by.
      settings: how to train; ``TrainSettings()`` if None.
      lora: which layers get adapters; None trains all parameters: copies in float32, or
        bfloat16 where the settings say so.
      out_dir: the run's folder (``run_folder.py``).
      resume: go on with the run that is there, from its newest whole checkpoint.
      overwrite: replace the run that is there.
      progress: what a person sees; by default a live line in a terminal and plain lines elsewhere.
      hooks: called with the figures of each step.
      runtime_bytes: resident memory before the model was loaded, for the account of memory.
      record: further JSON values for ``config.json`` of a new run, like the command that started it.

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
    if lora is not None and lora.scaling == 0:
        raise ConfigError(
            "LoRA alpha 0 scales the adapters and their gradients to nothing; give a number above 0"
        )
    config = {**(record or {}), **run_config(model, train, held_out, settings, lora)}
    with contextlib.ExitStack() as stack:
        guard: Received = stack.enter_context(SignalGuard())
        folder = stack.enter_context(
            open_folder(out_dir, config=config, resume=resume, overwrite=overwrite, mesh=settings.mesh)
        )
        progress = progress or _choose_progress(settings, stack)
        if resume:
            check_same_run(folder.config, config, progress.note)
        check_counted(held_out, settings.eval_rows)
        phases = [phase_memory("opening")]
        programs, loaded = _compile(model, train, settings, lora, phases, progress.note)
        streamed = settings.schedule == "streamed"
        base: ModelLike | OpenedLike = loaded
        gives_away = lora is None and isinstance(model, OpenedLike)
        if gives_away:
            base = model  # it can be read again, and would be there beside what is trained
        frozen, state = programs.start(
            programs.params if streamed else loaded.params, give_away=gives_away and programs.mesh is None
        )
        del loaded
        jax.block_until_ready(state)
        release_freed_memory()  # of compiling its small program, and of the base
        release_library_code()
        if not streamed:  # which gives everything back after each layer
            keep_scratch()
        phases.append(phase_memory("loading"))
        if guard.received is not None and not resume and jax.process_count() == 1:
            raise Interrupted(
                f"stopped by {signal_name(guard.received)} before the run began; nothing was written or removed",
                guard.received,
                resumable=False,
            )
        step, guard = with_agreed_signals(programs.step, guard)
        on_first(folder.begin)
        checkpoints = open_checkpoints(
            folder, identity=run_identity(config), keep=settings.keep_checkpoints, note=progress.note
        )
        stack.callback(checkpoints.close)
        receipt = make_receipt(
            programs.recipe, base.config, state, {} if streamed else frozen,
            (settings.accumulate, settings.batch_size, train.seq_length),
        )  # fmt: skip
        progress.note(f"receipt\n{receipt}")
        if programs.mesh is not None:
            progress.note(f"mesh {settings.mesh}: {mesh_receipt((state, frozen), programs.mesh)}")
        evaluate = _evaluator(programs, frozen, held_out, settings, guard)

        restored = checkpoints.restore(state) if resume else None
        start_step = 0 if restored is None else restored[0]
        keep_to_step = start_step if resume else None
        log = stack.enter_context(open_log(folder, keep_to_step=keep_to_step))
        if 0 not in log.evaluations:
            log.append("receipt", step=0, **receipt.to_json())
        checkpoints.check_space(state)
        if 0 not in log.evaluations:
            first = evaluate(state.trainable)
            if first is None:
                raise _stopped(
                    guard, "before the first step; nothing was lost. Go on with the same command and resume."
                )
            log_evaluation(0, first, log, progress)
            phases.append(phase_memory("first evaluation"))
        if restored is None and resume:
            progress.note("no checkpoint had been written yet; starting at step 0")
        if restored is not None:
            state = restored[1]
        batches = DatasetBatches(train, settings)
        loop = train_loop(
            step, state, frozen, batches, settings, schedule=programs.schedule, start_step=start_step,
            checkpoints=checkpoints, metrics_log=log, evaluate=evaluate, guard=guard, progress=progress, hooks=hooks,
        )  # fmt: skip
        if loop.step not in log.evaluations:
            raise _stopped(
                guard, f"after the last step, which is saved in {checkpoints.folder}. Resume evaluates it."
            )
        phases.append(phase_memory("training"))
        result = FinetuneResult(
            run_dir=folder.path,
            mode=programs.mode,
            model=base,
            trainable=programs.trained(loop.state.trainable),
            steps=loop.step,
            held_out_before=_eval_result(log.evaluations[0]),
            held_out_after=_eval_result(log.evaluations[loop.step]),
            tokens_per_s=_tokens_per_s(loop, folder.metrics_path),
            seconds=time.perf_counter() - started,
            receipt=receipt,
            memory=memory_report(
                frozen={} if streamed else frozen,
                trainable=loop.state.trainable,
                opt_state=loop.state.opt_state,
                compiled=programs.step,
                runtime_bytes=runtime_bytes,
                phases=phases,
            ),
            figures=loop.figures,
        )
        on_first(lambda: _write_result(folder.path / "result.json", result))
    return result


def _compile(
    model: ModelLike | OpenedLike,
    train: PackedDataset,
    settings: TrainSettings,
    lora: LoraConfig | None,
    phases: list[PhaseMemory],
    note: Callable[[str], object],
) -> tuple[Programs, ModelLike]:
    """The programs, and the model with its weights: read after compiling, where they were not read before."""
    streamed = settings.schedule == "streamed"
    if streamed:
        params: Any = _layer_source(model)
    else:
        params = model.abstract_params() if isinstance(model, OpenedLike) else model.params
    programs = compile_programs(model.config, params, settings, lora, train.seq_length)
    release_library_code()  # of the compiler, before there are weights
    if streamed or not isinstance(model, OpenedLike):
        phases.append(phase_memory("compiling"))
        return programs, model  # type: ignore[return-value]
    forget_traces()
    phases.append(phase_memory("compiling"))
    takes_over = lora is None and programs.mesh is None  # leaf by leaf, from the host's memory
    loaded = model.load(on_host=True) if takes_over else model.load()
    for text in loaded.notes:
        note(text)
    release_freed_memory()
    if not programs.fit(loaded.params):  # scales that float16 cannot hold
        programs = compile_programs(loaded.config, loaded.params, settings, lora, train.seq_length)
    return programs, loaded


def _layer_source(model: Any) -> LayerSource:
    source: Any = getattr(model, "reader", None)
    if not hasattr(source, "layer"):
        raise ConfigError(
            "the streamed schedule maps frozen weights from a packed file, layer by layer, and this model is none: make one "
            "with `edgejax pack --model ... --out model.ejx`, then train --model model.ejx"
        )
    return source


def _evaluator(
    programs: Programs, frozen: PyTree, held_out: PackedDataset, settings: TrainSettings, guard: Received
) -> Callable[[PyTree], EvalResult | None]:
    return lambda trainable: evaluate_with(
        programs.evaluate,
        trainable,
        frozen,
        held_out,
        batch_size=settings.batch_size,
        max_rows=settings.eval_rows,
        should_stop=lambda: guard.received is not None,
    )


def _stopped(guard: Received, rest: str) -> Interrupted:
    assert guard.received is not None  # only a signal stops an evaluation
    return Interrupted(f"stopped by {signal_name(guard.received)} {rest}", guard.received)


def _write_result(path: Path, result: FinetuneResult) -> None:
    try:
        write_json(path, result.summary())
    except OSError as error:
        raise RunError(
            f"cannot write {path}: {error.strerror or error}. What was trained is saved in "
            f"{path.parent / 'checkpoints'}; free space, then resume."
        ) from error


def _choose_progress(settings: TrainSettings, stack: contextlib.ExitStack) -> Progress:
    def resident() -> int | None:
        return process_memory().rss_bytes

    if jax.process_index():
        return SilentProgress()
    if sys.stderr.isatty():
        return stack.enter_context(LiveProgress(settings.steps, memory_bytes=resident))
    return PlainProgress(settings.steps, memory_bytes=resident)


def _tokens_per_s(loop: LoopResult, metrics_path: Path) -> float | None:
    if loop.tokens_per_s is not None or jax.process_index():
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
