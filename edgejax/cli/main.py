"""The ``edgejax`` program: finds the command, runs it, and turns errors into one message and an exit code.

A command is a module ``edgejax.cli.<name>`` with ``add_arguments(parser)`` and ``run(args) -> int``. Only the module
of the command that was asked for is imported, and it imports JAX inside ``run``, so that help is instant.

Exit codes: 0 done; 2 wrong usage, bad input, or nothing that fits (plan); 3 the loss was not finite; 130 and 143
interrupted (what was trained is saved where the message says); 1 a fault of edgejax itself, with a traceback.
"""

import argparse
import contextlib
import importlib
import io
import os
import signal
import sys
from collections.abc import Iterable, Sequence
from types import FrameType

import edgejax
from edgejax.core.allocator import huge_pages_environment
from edgejax.core.errors import ConfigError, EdgejaxError

COMMANDS = {
    "finetune": "fine-tune a model on text; ends with an adapter and a report",
    "plan": "what fits on this machine, in an amount of memory, or on a card that need not be here",
    "generate": "continue a prompt, with or without an adapter",
    "eval": "loss and perplexity of a model on text",
    "models": "the models known by name, and where each comes from",
    "doctor": "check this installation: versions, devices, numerics",
    "bench": "speed and memory of a training step on this machine",
    "pack": "write a model as one file that is mapped layer by layer",
    "export": "write an adapter or a merged model for other programs",
}

_COUNTED = ("--mem", "--dry")  # --memory and --dry-run, in which every byte is


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
        _check_text(words)
        code = args.run(args)
        sys.stdout.flush()
        return code
    except EdgejaxError as error:
        return _fail(args.command, str(error), error.exit_code)
    except KeyboardInterrupt as stop:
        number = stop.args[0] if stop.args else signal.SIGINT
        by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        return _fail(args.command, f"interrupted{by}", 128 + number)
    except BrokenPipeError:  # the reader of our output has gone (edgejax ... | head)
        _drop_output()
        return 141
    except OSError as error:  # what a command did not foresee: no permission, a name too long, a full disk
        if error.filename is None:
            _drop_output()
        place, reason = error.filename or "input or output", error.strerror or error
        advice = "check the path, its permissions and the free space"
        return _fail(args.command, f"{place}: {reason}; {advice}", 2)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or "out of memory" in str(error).lower()):  # as XLA says it
            raise
        reason = (str(error).splitlines() or ["MemoryError"])[0]
        advice = "use fewer or shorter rows, a lower rank, fewer tokens, a smaller model, or --base int4"
        return _fail(args.command, f"not enough memory: {reason}; {advice}", 2)


def _fail(command: str, message: str, code: int) -> int:
    with contextlib.suppress(OSError):  # the terminal may have gone
        print(f"edgejax {command}: {message}", file=sys.stderr)
    return code


def _check_text(words: Sequence[str]) -> None:
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"the argument {word!r} is not UTF-8: checkpoints and reports could not name it; rename the file, or "
                "choose a UTF-8 locale (LC_ALL=C.UTF-8)"
            ) from None


def _drop_output() -> None:
    """Keeps the end of the program from flushing into what cannot be written."""
    with contextlib.suppress(OSError):  # what stands in for it may have no number
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _stop(number: int, frame: FrameType | None) -> None:
    """Ends a command on SIGINT or SIGTERM, with its temporary files removed; training has handlers of its own."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            # Half-made modules swallow an exception or turn it into another; no file is being written here.
            os.write(2, b"edgejax: interrupted\n")
            os._exit(128 + number)
        frame = frame.f_back
    raise KeyboardInterrupt(number)


def _open_closed_streams() -> None:
    """Gives streams that were closed (``>&-``) somewhere to go.

    Their numbers would be those of the next files opened, and what C code prints would end up in these.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115  # open to the end


def _restart_with_huge_pages() -> None:
    """Starts this program anew, in the same process, where training would run faster so.

    What decides is read by the C library when a process starts. The new one finds it set and goes on.
    """
    if any(word.startswith(_COUNTED) for word in sys.argv):
        return  # the system fills huge pages up when it has time: 7 to 75 MB more, not the same twice
    environment = huge_pages_environment(os.environ)
    if environment is not None and sys.argv[1:2] == ["finetune"] and sys.executable:
        with contextlib.suppress(OSError):  # then slower
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], environment)


def entry_point() -> None:
    """What the installed ``edgejax`` script calls."""
    _restart_with_huge_pages()
    _open_closed_streams()
    for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGTERM, signal.SIG_DFL)):
        if signal.getsignal(number) == usual:  # not where a parent has them ignored (nohup)
            signal.signal(number, _stop)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # letters that the terminal's encoding lacks
    sys.exit(main())
