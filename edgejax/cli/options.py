"""Arguments that several commands share, and how their text is read."""

import argparse
from pathlib import Path

from edgejax.core.errors import ConfigError

INT32_MAX = 2**31 - 1  # what arrays count with
BASES = ("auto", "int8", "int4", "ternary", "bf16", "f32")
DEFAULT_MODEL = "smollm2-135m"


def add_model_arguments(parser: argparse.ArgumentParser, *, adapter: bool) -> None:
    """``--model``, ``--base`` and, where a command can use one, ``--adapter``."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME|PATH",
        help="a name that `edgejax models` lists, a GGUF or packed file, or a Hugging Face folder (default: %(default)s)",
    )
    group.add_argument(
        "--base",
        choices=BASES,
        default="auto",
        help="how the frozen weights are held; auto: as they came where that is exact; ternary: for models that "
        "were trained so (default: %(default)s)",
    )
    if adapter:
        group.add_argument(
            "--adapter",
            type=Path,
            metavar="DIR",
            help="an adapter in PEFT's format, or a run folder that has one",
        )


def adapter_folder(path: Path) -> Path:
    """The adapter a person means: a run folder stands for the ``adapter`` in it."""
    inside = path / "adapter"
    return inside if not (path / "adapter_config.json").exists() and inside.is_dir() else path


def names(text: str) -> tuple[str, ...]:
    """``"q_proj, v_proj"`` as ``("q_proj", "v_proj")``, each once."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


def whole_number(text: str) -> int:
    """A whole number that fits 32 bits."""
    value = int(text)
    if abs(value) > INT32_MAX:
        raise argparse.ArgumentTypeError(f"{text} is out of range; at most {INT32_MAX} can be counted")
    return value


def number_or_none(text: str) -> float | None:
    """A number, or None for ``none``."""
    return None if text.lower() == "none" else float(text)


def check_step_size(n_rows: int, seq_length: int) -> None:
    """Refuses steps of more positions than can be counted."""
    if n_rows * seq_length > INT32_MAX:
        raise ConfigError(
            f"{n_rows} rows of {seq_length} positions are {n_rows * seq_length} positions at a time, more than "
            f"{INT32_MAX}; use a smaller --batch or --seq"
        )


def steps_or_share(text: str) -> int | float:
    """Whole numbers as int (steps), others as float (a share of the steps)."""
    try:
        return whole_number(text)
    except ValueError:
        return float(text)


def key_value(text: str) -> tuple[str, object]:
    """``"b2=0.95"`` as ``("b2", 0.95)``; a value that is no JSON is text."""
    import json

    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r}: write it as name=value, like b2=0.95")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


whole_number.__name__ = "whole number"
number_or_none.__name__ = "number"  # argparse names the type in "invalid ... value"
steps_or_share.__name__ = "number of steps, or share of them"
