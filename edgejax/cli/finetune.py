"""``edgejax finetune``: from a model and a text to an adapter, its figures and a page about them.

The arguments are turned into what the Python API takes and nothing else: ``load_model``, ``load_text``, ``finetune``,
``export_peft``, ``write_report``. A run writes down its arguments, so that ``--resume --out DIR`` is enough to go on.
"""

import argparse
from pathlib import Path

from edgejax.cli.options import add_model_arguments, key_value, names, number_or_none, steps_or_share

SCHEDULES = ("whole",)
DEFAULT_STEPS = 100
EPILOG = """examples:
  edgejax finetune --data python-reference
  edgejax finetune --data notes.jsonl --held-out test.jsonl --epochs 3 --rank 16 --out runs/notes
  edgejax finetune --resume --out runs/notes
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax finetune``."""
    parser.epilog = EPILOG
    add_model_arguments(parser, adapter=False)
    _add_data(parser)
    _add_adapter(parser)
    _add_training(parser)
    _add_run(parser)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+",
        metavar="PATH",
        help="text, JSON lines or folders of them, or python-reference (default: python-reference)",
    )
    group.add_argument(
        "--held-out",
        nargs="+",
        default=["0.1"],
        metavar="SHARE|PATH",
        help="share of the documents put aside, or files of their own (default: 0.1)",
    )
    group.add_argument("--seq", type=int, default=512, help="positions of a row (default: %(default)s)")
    group.add_argument("--no-packing", action="store_true", help="one document a row instead of many")
    group.add_argument(
        "--allow-long-context", action="store_true", help="let --seq exceed the model's context"
    )


def _add_adapter(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is trained")
    group.add_argument(
        "--mode",
        choices=("lora", "full"),
        default="lora",
        help="adapters, or all parameters (default: %(default)s)",
    )
    group.add_argument("--rank", type=int, help="of the adapters (default: 8)")
    group.add_argument("--alpha", type=float, help="adapters are scaled by alpha / rank (default: 2 * rank)")
    group.add_argument(
        "--rslora", action="store_true", default=None, help="scale by alpha / sqrt(rank) instead"
    )
    group.add_argument(
        "--targets", type=names, metavar="NAME,...", help="linear layers with adapters (default: all)"
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    length = group.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"optimizer steps (default: {DEFAULT_STEPS})")
    length.add_argument("--epochs", type=float, help="times through the training rows, instead of --steps")
    group.add_argument("--batch", type=int, default=1, help="rows of a micro-step (default: %(default)s)")
    group.add_argument(
        "--accumulate", type=int, default=1, help="micro-steps of a step (default: %(default)s)"
    )
    group.add_argument(
        "--optimizer", default="adamw", help="the name of an optax optimizer (default: %(default)s)"
    )
    group.add_argument(
        "--optimizer-option", type=key_value, action="append", default=[], metavar="NAME=VALUE",
        help="a further argument of the optimizer, like b2=0.95; may be repeated",
    )  # fmt: skip
    group.add_argument("--learning-rate", type=float, default=5e-4, help="at its peak (default: %(default)s)")
    group.add_argument(
        "--lr-schedule",
        default="cosine",
        help="after the warm-up: cosine, linear or constant (default: %(default)s)",
    )
    group.add_argument(
        "--warmup", type=steps_or_share, default=0.05, metavar="STEPS|SHARE",
        help="steps, or a share of all steps below 1 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--weight-decay", type=float, default=0.0, help="decoupled (default: %(default)s)")
    group.add_argument(
        "--clip", type=number_or_none, default=1.0, metavar="NORM|none",
        help="largest gradient norm (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--remat",
        default="full",
        help="what is recomputed: none, attention, mlp or full (default: %(default)s)",
    )
    group.add_argument(
        "--schedule",
        default="whole",
        help=f"how a step is run; there is: {', '.join(SCHEDULES)} (default: %(default)s)",
    )
    group.add_argument(
        "--seed", type=int, default=0, help="of adapters, split and order (default: %(default)s)"
    )


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--out", type=Path, metavar="DIR", help="the run folder (default: runs/<model>-<time>)"
    )
    group.add_argument(
        "--resume", action="store_true", help="go on with the run in --out, with its own arguments"
    )
    group.add_argument("--overwrite", action="store_true", help="replace the run in --out")
    group.add_argument(
        "--eval-every", type=int, metavar="STEPS", help="held-out loss between (default: ends only)"
    )
    group.add_argument(
        "--eval-rows", type=int, metavar="ROWS", help="held-out rows of an evaluation (default: all)"
    )
    group.add_argument(
        "--checkpoint-every", type=int, default=50, metavar="STEPS", help="(default: %(default)s)"
    )
    group.add_argument(
        "--keep", type=int, default=2, help="newest checkpoints that stay (default: %(default)s)"
    )
    group.add_argument(
        "--prompt", default="The with statement", help="continued before and after (default: %(default)r)"
    )
    group.add_argument("--json", action="store_true", help="end with the result as one line of JSON")
    group.add_argument("--quiet", action="store_true", help="no progress and no summary")
