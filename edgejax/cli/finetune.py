"""``edgejax finetune``: from a model and a text to an adapter, its figures and a page about them.

The arguments are turned into what the Python API takes and nothing else: ``load_model``, ``load_text``, ``finetune``,
``export``, ``write_report``. A run writes down its arguments, so that ``--resume --out DIR`` is enough to go on.
"""

import argparse
import contextlib
import math
import os
import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejax.cli.finetune_arguments import (
    DEFAULT_RANK,
    DEFAULT_STEPS,
    DEFAULTS,
    add_arguments,
    check_options,
)
from edgejax.cli.memory_budget import choose_within
from edgejax.core.errors import ConfigError, Interrupted, RunError

if TYPE_CHECKING:
    from edgejax.data import PackedDataset, Split, Tokenizer
    from edgejax.models import LoraConfig, ModelConfig
    from edgejax.train import TrainSettings
    from edgejax.weights import OpenedModel

__all__ = ["add_arguments", "run"]
# Of these a resumed run may have others than the run that is there; they are not written down.
_NOT_RECORDED = {
    "out", "resume", "overwrite", "json", "quiet", "dry_run", "memory", "coordinator", "processes", "process_index",
}  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Trains, writes adapter and report, prints the closing summary; returns 0."""
    given = {name: value for name, value in vars(args).items() if name in DEFAULTS}
    out = _run_folder(given)
    again = f"To go on: edgejax finetune --resume --out {shlex.quote(str(out))}"
    with _other_processes(given, again):
        return _run(given, out, again)


def _other_processes(given: dict[str, Any], again: str) -> contextlib.AbstractContextManager[None]:
    names = ("coordinator", "processes", "process_index")
    if not set(names) & set(given):
        return contextlib.nullcontext()  # JAX is not imported for nothing
    alone = [f"--{name.replace('_', '-')}" for name in ("memory", "dry_run") if given.get(name)]
    if alone:  # said before the others are waited for
        raise ConfigError(f"{alone[0]} is of a run of one process; leave out --coordinator, or {alone[0]}")
    from edgejax.train.processes import joined

    return joined(*(given.get(name) for name in names), how_to_go_on=f"{again}, in every process.")


def _run(given: dict[str, Any], out: Path, again: str) -> int:
    options = argparse.Namespace(**merge_options(given, out))
    check_options(options)  # before anything is imported, loaded or fetched
    if options.memory is not None:
        if out.is_dir() and any(out.iterdir()) and not options.overwrite:  # before minutes of compiling
            raise RunError(
                f"{out} is not empty; choose another folder, or replace the run in it (--overwrite)"
            )
        options = choose_within(options, given)
    lora = lora_config(options)
    try:
        return _finetune(options, lora, out)
    except Interrupted as stop:
        if not stop.resumable:
            raise
        raise Interrupted(f"{stop}\n{again}", stop.exit_code - 128) from stop
    except KeyboardInterrupt as stop:  # before training, or while what was trained is written
        if not os.path.exists(out / "config.json"):
            raise
        number = stop.args[0] if stop.args else signal.SIGINT
        raise Interrupted(f"interrupted; what was trained is in {out}\n{again}", number) from stop


def _finetune(options: argparse.Namespace, lora: "LoraConfig | None", out: Path) -> int:
    import jax

    from edgejax.cli.dry_run import dry_run
    from edgejax.cli.session import need_tokenizer
    from edgejax.cli.summary import finish
    from edgejax.core.allocator import return_large_blocks_at_once
    from edgejax.core.cache import enable_compile_cache
    from edgejax.measure.memory import process_memory
    from edgejax.train import SilentProgress, finetune
    from edgejax.weights import open_model

    cache = enable_compile_cache()
    return_large_blocks_at_once()
    jax.devices()  # starts the back end, so that its memory is counted as the runtime's
    runtime_bytes = process_memory().rss_bytes
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    if options.schedule == "streamed":
        options.sample_tokens = 0  # a sample would need the whole model in memory
    if options.dry_run:
        return dry_run(options, lora, keeps_programs=cache is not None)
    model = open_model(options.model, base=options.base)
    check_sample(options, need_tokenizer(model), model.config)
    rows = load_rows(options, need_tokenizer(model), model.config)
    settings = train_settings(options, rows.train)
    is_first = jax.process_index() == 0
    if not options.quiet and is_first:
        _announce(options, model, rows, settings, out)
    result = finetune(
        model,
        rows.train,
        rows.held_out,
        settings,
        lora=lora,
        out_dir=out,
        resume=options.resume,
        overwrite=options.overwrite,
        progress=SilentProgress() if options.quiet else None,
        runtime_bytes=runtime_bytes,
        record={"command": record_of(options)},
    )
    if is_first:
        finish(options, rows, settings, lora, result, started)
    return 0


def merge_options(given: dict[str, Any], out: Path) -> dict[str, Any]:
    """Every option's value: as given now, else (on resume) as the run in ``out`` was started with, else the default.

    Raises:
      ConfigError: ``--resume`` with ``--overwrite``.
      RunError: nothing to resume, or a run that another program started.
    """
    if not given.get("resume"):
        return {**DEFAULTS, **given}
    if given.get("overwrite"):
        raise ConfigError("--resume goes on with a run and --overwrite replaces it; give one of them")
    from edgejax.train.run_folder import read_config

    recorded: Any
    if "coordinator" in given:  # process 0 alone has the folder
        from edgejax.train.processes import on_first, share

        recorded = share(on_first(lambda: read_config(out).get("command")))
    else:
        recorded = read_config(out).get("command")
    if not isinstance(recorded, dict) or not set(recorded) <= set(DEFAULTS):
        raise RunError(
            f"{out} holds a run that `edgejax finetune` of this version did not start; resume it from Python with "
            "edgejax.finetune(..., resume=True)"
        )
    if {"steps", "epochs"} & set(given):  # they exclude each other
        recorded |= {"steps": None, "epochs": None}
    return {**DEFAULTS, **recorded, **given}


def record_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options as JSON values, with paths that hold from any folder."""

    def lasting(text: str) -> str:
        return str(Path(text).absolute()) if os.path.exists(text) else text

    values = {name: value for name, value in vars(options).items() if name not in _NOT_RECORDED}
    values["model"] = lasting(options.model)
    for name in ("data", "held_out"):
        values[name] = [lasting(text) for text in values[name]]
    return values


def check_sample(options: argparse.Namespace, tokenizer: "Tokenizer", config: "ModelConfig") -> None:
    """Refuses, before anything is trained, a prompt that could not be continued afterwards.

    Raises:
      ConfigError: it has no tokens, or the continuation would exceed the model's context.
    """
    n_prompt = len(tokenizer.encode(options.prompt))
    if options.sample_tokens and not n_prompt:
        raise ConfigError(f"--prompt {options.prompt!r} has no tokens; give some text, or --sample-tokens 0")
    if options.sample_tokens and n_prompt + options.sample_tokens > config.max_position:
        raise ConfigError(
            f"a --prompt of {n_prompt} tokens and {options.sample_tokens} new ones (--sample-tokens) exceed the model's "
            f"context of {config.max_position}; use fewer"
        )


def lora_config(options: argparse.Namespace) -> "LoraConfig | None":
    """The adapters, or None with ``--mode full``; alpha is twice the rank unless given."""
    if options.mode == "full":
        return None
    from edgejax.models import LINEAR_NAMES, LoraConfig

    rank = DEFAULT_RANK if options.rank is None else options.rank
    return LoraConfig(
        rank=rank,
        alpha=2.0 * rank if options.alpha is None else options.alpha,
        rslora=bool(options.rslora),
        targets=LINEAR_NAMES if options.targets is None else tuple(options.targets),
    )


def load_rows(options: argparse.Namespace, tokenizer: "Tokenizer", config: "ModelConfig") -> "Split":
    """The training and held-out rows that ``--data`` and ``--held-out`` name."""
    from edgejax.cli.session import source_of
    from edgejax.data import load_text

    share = _share(options.held_out)
    held_out = (
        {"held_out_source": source_of(options.held_out)} if share is None else {"held_out_fraction": share}
    )
    return load_text(
        source_of(options.data),
        tokenizer,
        options.seq,
        packing=not options.no_packing,
        seed=options.seed,
        max_position=config.max_position,
        allow_long_context=options.allow_long_context,
        vocab_size=config.vocab_size,
        **held_out,
    )


def train_settings(options: argparse.Namespace, train: "PackedDataset | None") -> "TrainSettings":
    """The settings of the run; epochs of the training rows become steps, the last one rounded up."""
    from edgejax.train import TrainSettings

    steps = DEFAULT_STEPS if options.steps is None else options.steps
    if options.epochs is not None and train is not None:
        steps = math.ceil(options.epochs * train.n_rows / (options.batch * options.accumulate))
    return TrainSettings(
        steps=steps,
        batch_size=options.batch,
        accumulate=options.accumulate,
        optimizer=options.optimizer,
        optimizer_options=dict(options.optimizer_option),
        learning_rate=options.learning_rate,
        lr_schedule=options.lr_schedule,
        schedule=options.schedule,
        mesh=options.mesh,
        spill_to=options.spill_to,
        warmup=options.warmup,
        weight_decay=options.weight_decay,
        clip_norm=options.clip,
        clip_by=options.clip_by,
        remat=options.remat,
        boundaries=options.boundaries,
        mlp_tile=options.mlp_tile,
        bfloat16=options.mode == "full" and options.base == "bf16",
        small_code=options.small_code,
        seed=options.seed,
        eval_every=options.eval_every,
        eval_rows=options.eval_rows,
        checkpoint_every=options.checkpoint_every,
        keep_checkpoints=options.keep,
    )


def _run_folder(given: dict[str, Any]) -> Path:
    if "out" in given:
        return given["out"]
    for name in ("resume", "overwrite"):
        if given.get(name):
            raise ConfigError(f"--{name} needs --out: name the folder of the run")
    stem = Path(given.get("model", DEFAULTS["model"])).stem
    folder = Path("runs") / f"{stem}-{time.strftime('%Y%m%d-%H%M%S')}"
    same_second = (folder.with_name(f"{folder.name}-{n}") for n in range(2, 1000))
    return next(path for path in (folder, *same_second) if not path.exists())


def _share(held_out: list[str]) -> float | None:
    """``--held-out`` as a share of the documents, or None where it names files."""
    if len(held_out) != 1 or os.path.exists(held_out[0]):
        return None
    try:
        return float(held_out[0])
    except ValueError:
        return None


def _announce(
    options: argparse.Namespace, model: "OpenedModel", rows: "Split", settings: "TrainSettings", out: Path
) -> None:
    import sys

    train, held_out = rows
    notes = model.reader.notes if settings.schedule == "streamed" else ()  # of others when they are read
    lines = [
        *notes,
        f"model   {model.source.name}: {model.config.n_params():,} parameters, {model.source.format}",
        f"data    {' '.join(options.data)}: {train.n_documents:,} documents in {train.n_rows:,} rows of "
        f"{train.seq_length} to learn from, {held_out.n_documents:,} in {held_out.n_rows:,} held out",
        f"run     {settings.steps} steps of {settings.batch_size * settings.accumulate} rows, in {out}",
    ]
    print("\n".join(lines), file=sys.stderr, flush=True)
