"""``edgejax plan``: what fits on a device, and what it takes, before anything is loaded."""

import argparse
import json
import os
import shlex
import sys
from typing import TYPE_CHECKING

from edgejax.cli.options import BASES, DEFAULT_MODEL, whole_number

if TYPE_CHECKING:
    from edgejax.plan import Option, Plan

EPILOG = """examples:
  edgejax plan --model smollm2-135m --device 600MB
  edgejax plan --model smollm2-135m --device rtx3060
  edgejax plan --model llama-3.2-1b --device rtx4060 --seq 2048 --json
  edgejax plan --model qwen2.5-3b --device rtx3060 --full

For a card, steps are compiled without the card, and XLA's buffer assignment is read: nothing is guessed, and nothing is
measured. For this machine, what the process takes around its programs is added, as it was measured. Of a model that is not
on this machine, its published shape is enough.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax plan``."""
    parser.epilog = EPILOG
    parser.add_argument(
        "--model", default=DEFAULT_MODEL, metavar="NAME|PATH",
        help="a name that `edgejax models` lists, a shape, a file or a folder (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--device",
        default="this",
        metavar="NAME|AMOUNT",
        help="this machine (this: its GPU, if JAX computes on one), an amount of its memory (600MB, 1.2GB), a phone (pixel7, ...), or an NVIDIA card that need "
        "not be here (rtx3060, rtx4090, a100, ...; default: %(default)s)",
    )
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--lora", dest="mode", action="store_const", const="lora", help="adapters (default)")
    mode.add_argument("--full", dest="mode", action="store_const", const="full", help="all parameters")
    parser.set_defaults(mode="lora")
    parser.add_argument(
        "--base", choices=BASES,
        help="how frozen weights are held (default: int4 for a card and for a model that is not here, else auto); auto: as the file has them",
    )  # fmt: skip
    parser.add_argument("--rank", type=whole_number, help="of adapters (default: 8)")
    parser.add_argument(
        "--seq", type=whole_number, default=512, help="positions of a row (default: %(default)s)"
    )
    parser.add_argument(
        "--batch", type=whole_number, default=1, help="rows of a micro-step (default: %(default)s)"
    )
    parser.add_argument(
        "--accumulate",
        type=whole_number,
        default=1,
        help="micro-steps of an optimizer step (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument(
        "--picture", metavar="FILE.html", help="also draw it, the bytes of each setting against the memory"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the plan, progress on standard error; returns 0, or 2 where nothing fits.

    Raises:
      ConfigError, WeightsError: as ``plan.plan_for_card``, ``plan.plan_for_accelerator`` and ``host_plan.plan_for_host``; an
        unknown device.
    """
    from edgejax.cli.host_plan import HERE, find_place, plan_for_host
    from edgejax.cli.options import check_step_size
    from edgejax.core.errors import ConfigError
    from edgejax.devices import find_device, is_budget
    from edgejax.plan import find_accelerator, plan_for_accelerator, plan_for_card
    from edgejax.plan.picture import write_picture

    check_step_size(args.batch, args.seq)
    if args.mode == "full" and (args.base, args.rank) != (None, None):
        raise ConfigError(
            "--base and --rank are of LoRA; with --full the plan compares how weights can be held"
        )
    shared = {
        "mode": args.mode, "base": args.base or "int4", "rank": 8 if args.rank is None else args.rank, "seq": args.seq,
        "batch": args.batch, "accumulate": args.accumulate, "note": _note,
    }  # fmt: skip
    amount = None
    accelerator = find_accelerator() if args.device.lower() in HERE else None
    if accelerator is not None:
        plan = plan_for_accelerator(accelerator, args.model, **shared)
    elif (place := find_place(args.device)) is not None:
        plan = plan_for_host(args, place, _note)
        amount = shlex.quote(args.device) if is_budget(args.device) else f"{place.memory_bytes // 10**6}MB"
    else:
        plan = plan_for_card(find_device(args.device), args.model, **shared)
    print(json.dumps(plan.to_json()) if args.json else as_text(plan, amount))
    if args.picture is not None:
        write_picture(args.picture, plan)
    return 0 if plan.chosen is not None else 2


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def as_text(plan: "Plan", amount: str | None = None) -> str:
    """A table of the settings, the chosen one first, and what longer rows would take.

    Args:
      plan: to show.
      amount: of memory, that ``edgejax finetune --memory`` would be given.
    """
    from edgejax.core.units import format_bytes
    from edgejax.weights.presets import PRESETS

    reserve = f", {format_bytes(plan.reserve_bytes)} of them kept in reserve" if plan.reserve_bytes else ""
    lines = [
        f"{plan.model} on {plan.device}: {format_bytes(plan.memory_bytes)} of memory{reserve}. Bytes: {plan.evidence}. Speed: calculated from "
        "operations, beside the same step that keeps everything.",
        "",
    ]
    chosen = plan.chosen
    for option in [*plan.fitting(), *plan.too_large()]:
        fits = option.footprint.needed_bytes <= plan.budget_bytes
        mark = "-> " if option is chosen else "   " if fits else " x "
        lines += [mark + _line(option), "      " + _sources(option)]
    lines += [f" ! {options}: {why}" for options, why in plan.failed.items()]
    if chosen is None:
        lines.append(_nothing_fits(plan))
    else:
        size = f"--seq {chosen.candidate.seq} --batch {chosen.candidate.batch}"
        if chosen.candidate.mode == "lora":
            size += f" --rank {chosen.candidate.rank}"
        known = plan.model in PRESETS or os.path.exists(plan.model)
        name = shlex.quote(plan.model) if known else "PATH"  # of a shape, wherever its weights are
        command = f"edgejax finetune --model {name} {size} {chosen.candidate.describe()}"
        if amount is not None:
            command += f" --memory {amount}"
        lines += ["", f"Train it there with: {command}"]
    if plan.longer is not None:
        lines.append(_longer(plan.longer))
    return "\n".join(lines)


def _line(option: "Option") -> str:
    from edgejax.core.units import format_bytes

    return (
        f"{format_bytes(option.footprint.peak_bytes):>9}  speed {option.relative_speed:.2f}  "
        f"{option.candidate.describe()}"
    )


def _sources(option: "Option") -> str:
    from edgejax.core.units import format_bytes

    sources = ", ".join(f"{name} {format_bytes(size)}" for name, size in option.footprint.sources.items())
    return f"{sources} ({option.footprint.remark})" if option.footprint.remark else sources


def _nothing_fits(plan: "Plan") -> str:
    from edgejax.core.units import format_bytes

    if not plan.options:
        return "Nothing could be compiled."
    nearest = plan.too_large()[0]
    over = nearest.footprint.needed_bytes - plan.budget_bytes
    return (
        f"Nothing fits. The nearest takes {format_bytes(over)} too much: {nearest.candidate.describe()}. What no "
        f"setting goes below is {format_bytes(plan.floor_bytes())}. Use shorter rows, fewer rows at a time, or a smaller model."
    )


def _longer(plan: "Plan") -> str:
    from edgejax.core.units import format_bytes

    seq = plan.options[0].candidate.seq
    if plan.chosen is not None:
        return f"Rows of {seq}: {_line(plan.chosen).strip()}"
    nearest = plan.too_large()[0]
    over = nearest.footprint.needed_bytes - plan.budget_bytes
    return f"Rows of {seq} do not fit: {format_bytes(over)} are missing with {nearest.candidate.describe()}"
