"""The ``edgejax`` program: finds the command, runs it, and turns errors into one message and an exit code.

A command is a module ``edgejax.cli.<name>`` with ``add_arguments(parser)`` and ``run(args) -> int``. Only the module
of the command that was asked for is imported, and it imports JAX inside ``run``, so that help is instant.

Exit codes: 0 done; 2 wrong usage or bad input; 3 the loss was not finite; 130 and 143 interrupted (what was trained
is saved where the message says); 1 a fault of edgejax itself, with a traceback.
"""

import argparse
import importlib
import os
import sys
from collections.abc import Iterable, Sequence

import edgejax
from edgejax.core.errors import EdgejaxError

COMMANDS = {
    "finetune": "fine-tune a model on text; ends with an adapter and a report",
    "generate": "continue a prompt, with or without an adapter",
    "eval": "loss and perplexity of a model on text",
    "models": "the models known by name, and where each comes from",
    "doctor": "check this installation: versions, devices, numerics",
    "bench": "speed and memory of a training step on this machine",
    "export": "write an adapter or a merged model for other programs",
}


def build_parser(load: Iterable[str] = COMMANDS) -> argparse.ArgumentParser:
    """The whole command line. Arguments are added for the commands in ``load``; the others have only their help."""
    parser = argparse.ArgumentParser(
        prog="edgejax",
        description="Train and fine-tune language models inside the memory and time of a phone or a consumer GPU.",
        epilog="edgejax COMMAND --help explains a command.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"edgejax {edgejax.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    wanted = set(load)
    for name, summary in COMMANDS.items():
        subparser = commands.add_parser(
            name,
            help=summary,
            description=summary[0].upper() + summary[1:] + ".",
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if name in wanted:
            module = importlib.import_module(f"edgejax.cli.{name}")
            module.add_arguments(subparser)
            subparser.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the program with ``argv`` (without its name) and returns its exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    asked = next((word for word in words if not word.startswith("-")), None)
    parser = build_parser([asked] if asked in COMMANDS else [])
    try:
        args = parser.parse_args(words)
    except SystemExit as stop:  # argparse has printed its message
        return stop.code if isinstance(stop.code, int) else 2
    try:
        code = args.run(args)
        sys.stdout.flush()
        return code
    except EdgejaxError as error:
        print(f"edgejax {args.command}: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(f"edgejax {args.command}: interrupted", file=sys.stderr)
        return 130
    except (
        BrokenPipeError
    ):  # the reader of our output has gone (edgejax ... | head); nothing more to say to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def entry_point() -> None:
    """What the installed ``edgejax`` script calls."""
    sys.exit(main())
