"""``edgejax pack``: a model as one file that is mapped, layer by layer, instead of read."""

import argparse
import sys
from pathlib import Path

from edgejax.cli.options import add_model_arguments, whole_number

EPILOG = """examples:
  edgejax pack --model smollm2-135m --base int4 --out smollm2.ejx
  edgejax pack --random-weights --model qwen2.5-3b --base int4 --out shape.ejx

A packed file is a safetensors file in which the arrays of a layer lie together on pages of their own, with hashes. It
is named in place of a model everywhere: edgejax generate --model smollm2.ejx --prompt "The with statement"
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax pack``."""
    parser.epilog = EPILOG
    add_model_arguments(parser, adapter=False)
    group = parser.add_argument_group("random weights")
    group.add_argument(
        "--random-weights", action="store_true",
        help="--model names a shape (tiny, smollm2-135m, qwen2.5-0.5b, ...): to measure speed and memory with",
    )  # fmt: skip
    group.add_argument("--seed", type=whole_number, help="of random weights (default: 0)")
    group = parser.add_argument_group("output")
    group.add_argument("--out", type=Path, required=True, metavar="FILE", help="the file to make")
    group.add_argument("--no-tokenizer", action="store_true", help="leave the tokenizer out")
    group.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    """Writes the file, notes on standard error, and prints what was made; returns 0.

    Raises:
      ConfigError: a seed that is negative or without random weights, or a shape that is not known.
      RunError, WeightsError: as ``weights.packed_write.write_packed``.
    """
    from edgejax.core.errors import ConfigError
    from edgejax.core.units import format_bytes
    from edgejax.weights.packed_file import open_packed

    if args.seed is not None and not args.random_weights:
        raise ConfigError("--seed is of random weights; add --random-weights, or leave it out")
    if (args.seed or 0) < 0:
        raise ConfigError(f"--seed {args.seed} is negative; use 0 or more")
    notes = _pack_random(args) if args.random_weights else _pack_model(args)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    packed = open_packed(args.out)
    layer = packed.sections["layer.0"]
    print(
        f"{packed.path}: {packed.config.n_params():,} parameters in {format_bytes(packed.n_bytes)}, "
        f"{packed.config.n_layers} layers of {format_bytes(layer.stop - layer.start)}, SHA-256 {packed.sha256}"
    )
    return 0


def _pack_model(args: argparse.Namespace) -> tuple[str, ...]:
    from edgejax.weights.load import open_model
    from edgejax.weights.packed_layout import Origin
    from edgejax.weights.packed_write import write_packed

    opened = open_model(args.model, base=args.base, need_tokenizer=not args.no_tokenizer)
    source = opened.source
    name = Path(source.name).name  # a folder of this machine means nothing on another
    return write_packed(
        args.out,
        opened.reader,
        origin=Origin(name=name, format=source.format, sha256=source.sha256, base=args.base),
        base=args.base,
        tokenizer=opened.tokenizer,
        notes=opened.reader.notes,
        overwrite=args.overwrite,
        on_section=_show,
    )


def _pack_random(args: argparse.Namespace) -> tuple[str, ...]:
    from edgejax.models.shapes import find_shape
    from edgejax.weights.packed_layout import Origin
    from edgejax.weights.packed_write import write_packed
    from edgejax.weights.random import RandomSource

    config, seed = find_shape(args.model), args.seed or 0
    return write_packed(
        args.out,
        RandomSource(config, seed),
        origin=Origin(name=f"{args.model}, seed {seed}", format="random", sha256="", base=args.base),
        base=args.base,
        overwrite=args.overwrite,
        on_section=_show,
    )


def _show(done: int, of: int) -> None:
    """How far it is, where a person watches."""
    if sys.stderr.isatty():
        print(f"\r{done} of {of} sections", end="" if done < of else "\n", file=sys.stderr, flush=True)
