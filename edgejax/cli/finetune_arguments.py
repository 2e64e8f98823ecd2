"""What ``edgejax finetune`` can be told. Only what was given is set, so that a resumed run can fill in the rest."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from edgejax.cli.options import (
    BASES,
    DEFAULT_MODEL,
    check_step_size,
    key_value,
    names,
    number_or_none,
    steps_or_share,
    whole_number,
)
from edgejax.core.errors import ConfigError

SCHEDULES = ("whole", "layerwise", "streamed")
DEFAULT_STEPS = 100
DEFAULT_RANK = 8
DEFAULTS: dict[str, Any] = {
    "model": DEFAULT_MODEL,
    "base": "auto",
    "data": ["python-reference"],
    "held_out": ["0.1"],
    "seq": 512,
    "no_packing": False,
    "allow_long_context": False,
    "mode": "lora",
    "rank": None,
    "alpha": None,
    "rslora": None,
    "targets": None,
    "steps": None,
    "epochs": None,
    "batch": 1,
    "accumulate": 1,
    "optimizer": "adamw",
    "optimizer_option": [],
    "learning_rate": 5e-4,
    "lr_schedule": "cosine",
    "warmup": 0.05,
    "weight_decay": 0.0,
    "clip": 1.0,
    "clip_by": None,
    "remat": "full",
    "boundaries": "f32",
    "mlp_tile": None,
    "schedule": "whole",
    "spill_to": None,
    "mesh": None,
    "coordinator": None,
    "processes": None,
    "process_index": None,
    "small_code": False,
    "seed": 0,
    "out": None,
    "resume": False,
    "dry_run": False,
    "memory": None,
    "overwrite": False,
    "eval_every": None,
    "eval_rows": None,
    "checkpoint_every": 50,
    "keep": 2,
    "prompt": "The with statement",
    "sample_tokens": 40,
    "json": False,
    "quiet": False,
}
EPILOG = """examples:
  edgejax finetune --data python-reference
  edgejax finetune --data notes.jsonl --held-out test.jsonl --epochs 3 --rank 16 --out runs/notes
  edgejax finetune --resume --out runs/notes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax finetune``; those not given are absent from what is parsed (see ``DEFAULTS``)."""
    parser.epilog = EPILOG
    add = _adder(parser.add_argument_group("model and data"))
    add(
        "--model",
        metavar="NAME|PATH",
        help="a name that `edgejax models` lists, a GGUF file or a Hugging Face folder",
    )
    add(
        "--base",
        choices=BASES,
        help="how the frozen weights are held; auto: as they came where that is exact; ternary: for models "
        "that were trained so; with --mode full: bf16 trains "
        "matrices in bfloat16 with stochastic rounding",
    )
    add("--data", nargs="+", metavar="PATH", help="text, JSON lines, folders of them, or python-reference")
    add(
        "--held-out",
        nargs="+",
        metavar="SHARE|PATH",
        help="share of the documents put aside, or files of their own",
    )
    add("--seq", type=whole_number, help="positions of a row")
    add("--no-packing", action="store_true", help="one document a row instead of many")
    add("--allow-long-context", action="store_true", help="let --seq exceed the model's context")

    add = _adder(parser.add_argument_group("what is trained"))
    add("--mode", choices=("lora", "full"), help="adapters, or all parameters")
    add("--rank", type=whole_number, help=f"of the adapters (default: {DEFAULT_RANK})")
    add("--alpha", type=float, help="adapters are scaled by alpha / rank (default: twice the rank)")
    add("--rslora", action="store_true", help="scale by alpha / sqrt(rank) instead")
    add("--targets", type=names, metavar="NAME,...", help="linear layers that get adapters (default: all)")

    group = parser.add_argument_group("training")
    length = _adder(group.add_mutually_exclusive_group())
    length("--steps", type=whole_number, help=f"optimizer steps (default: {DEFAULT_STEPS})")
    length("--epochs", type=float, help="times through the training rows, instead of --steps")
    add = _adder(group)
    add("--batch", type=whole_number, help="rows of a micro-step")
    add("--accumulate", type=whole_number, help="micro-steps of a step")
    add("--optimizer", metavar="NAME", help="adamw4bit, adamw8bit, apollo_mini, ... or any of optax")
    add(
        "--optimizer-option", type=key_value, action="append", metavar="NAME=VALUE",
        help="a further argument of the optimizer, like b2=0.95; may be repeated",
    )  # fmt: skip
    add("--learning-rate", type=float, help="at its peak")
    add("--lr-schedule", metavar="NAME", help="after the warm-up: cosine, linear or constant")
    add("--warmup", type=steps_or_share, metavar="STEPS|SHARE", help="steps, or a share of all steps below 1")
    add("--weight-decay", type=float, help="decoupled")
    add("--clip", type=number_or_none, metavar="NORM|none", help="largest gradient norm")
    add(
        "--clip-by", metavar="NORM",
        help="the norm that is clipped: global (whole), layer or previous (layerwise; the step before's)",
    )  # fmt: skip
    add(
        "--remat",
        metavar="POLICY",
        help="what the backward pass recomputes: none, attention, mlp, full or sqrt",
    )
    add(
        "--boundaries",
        metavar="KIND",
        help="how inputs of layers wait for it: f32, bf16 (with them what attention and mlp keep) or int8",
    )
    add(
        "--mlp-tile", type=whole_number, metavar="N", help="positions of a row whose MLP values exist at once"
    )
    add("--schedule", metavar="NAME", help=f"how a step is run: {', '.join(SCHEDULES)}")
    add("--spill-to", metavar="DIR", help="streamed: inputs of layers wait in a file there")
    add("--mesh", metavar="AXES", help="devices that share a step's rows and state, like data=4,shard=2")
    add(
        "--small-code", action="store_true",
        help="let XLA compile for a CPU with half the memory; steps take some percent longer",
    )  # fmt: skip
    add("--seed", type=int, help="of the adapters' start, the split and the order of rows")

    add = _adder(parser.add_argument_group("run"))
    add("--out", type=Path, metavar="DIR", help="the run's folder (default: runs/<model>-<time>)")
    add("--resume", action="store_true", help="go on with the run in --out, with its own arguments")
    add(
        "--dry-run", action="store_true",
        help="compile and keep all programs of the run, say what memory it will take, and stop",
    )  # fmt: skip
    add(
        "--memory", metavar="AMOUNT",
        help="choose what is not given (remat, boundaries, schedule, optimizer, small code, base with --mode full, how the rows of "
        "a step are split) so that the process stays below it, like 600MB or 1.2GB; a resumed run is not held to it",
    )  # fmt: skip
    add("--overwrite", action="store_true", help="replace the run in --out")
    add(
        "--eval-every",
        type=whole_number,
        metavar="STEPS",
        help="held-out loss in between (default: before and after only)",
    )
    add(
        "--eval-rows", type=whole_number, metavar="ROWS", help="held-out rows of an evaluation (default: all)"
    )
    add("--checkpoint-every", type=whole_number, metavar="STEPS", help="one is always written at the end")
    add("--keep", type=whole_number, metavar="N", help="newest checkpoints that stay")
    add("--prompt", help="continued before and after")
    add("--sample-tokens", type=whole_number, metavar="N", help="length of those continuations; 0: none")
    add("--json", action="store_true", help="end with the result as one line of JSON")
    add("--quiet", action="store_true", help="no progress and no summary")

    add = _adder(
        parser.add_argument_group("many processes (each is started with the same arguments but its index)")
    )
    add(
        "--coordinator", metavar="HOST:PORT|auto",
        help="where process 0 listens; auto: what Slurm, Open MPI or Kubernetes say",
    )  # fmt: skip
    add("--processes", type=whole_number, metavar="N", help="of the run")
    add("--process-index", type=whole_number, metavar="I", help="of this one; 0 writes the run's folder")


def check_options(options: argparse.Namespace) -> None:
    """Refuses what can be refused without looking at a file.

    Raises:
      ConfigError: a schedule that there is not, adapter options without adapters, a number out of range, an
        ``--overwrite`` that would remove what is to be read.
    """
    if options.schedule not in SCHEDULES:
        raise ConfigError(f"no --schedule {options.schedule}; there are: {', '.join(SCHEDULES)}")
    if options.mode == "full":
        unused = [
            name for name in ("rank", "alpha", "rslora", "targets") if getattr(options, name) is not None
        ]
        if unused:
            raise ConfigError(
                f"--mode full trains all parameters and has no adapters: leave out {', '.join('--' + n for n in unused)}"
            )
        if options.base not in ("auto", "bf16", "f32"):
            raise ConfigError(
                f"--mode full trains weights in bf16 or f32: --base {options.base} is of frozen ones"
            )
    if options.epochs is not None and not (options.epochs > 0 and math.isfinite(options.epochs)):
        raise ConfigError(f"--epochs must be above 0, not {options.epochs:g}")
    if options.batch < 1 or options.accumulate < 1:
        raise ConfigError(
            f"--batch {options.batch} and --accumulate {options.accumulate} must both be at least 1"
        )
    check_step_size(options.batch * options.accumulate, options.seq)
    if options.alpha is not None and not (options.alpha > 0 and math.isfinite(options.alpha)):
        raise ConfigError(f"--alpha must be a finite number above 0, not {options.alpha:g}")
    if options.sample_tokens < 0:
        raise ConfigError(f"--sample-tokens must be 0 (no samples) or more, not {options.sample_tokens}")
    if options.overwrite:
        _check_inputs_stay(options)


def _check_inputs_stay(options: argparse.Namespace) -> None:
    out = os.path.realpath(options.out)
    for text in (options.model, *options.data, *options.held_out):
        if os.path.exists(text) and Path(os.path.realpath(text)).is_relative_to(out):
            raise ConfigError(
                f"--overwrite would remove {text}, which lies in {options.out}; choose another --out"
            )


def _adder(group: argparse._ArgumentGroup) -> Callable[..., None]:
    """``group.add_argument`` that sets nothing by itself and says the default in the help."""

    def add(flag: str, *, help: str, **kwargs: Any) -> None:
        value = DEFAULTS[flag.removeprefix("--").replace("-", "_")]
        if value is not None and value is not False and value != []:
            help += f" (default: {' '.join(value) if isinstance(value, list) else value})"
        group.add_argument(flag, help=help.replace("%", "%%"), default=argparse.SUPPRESS, **kwargs)

    return add
