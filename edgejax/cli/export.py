"""``edgejax export``: what was trained, as files that other programs read."""

import argparse
from pathlib import Path

from edgejax.cli.options import add_model_arguments

FORMATS = {
    "peft": "a folder that PEFT loads: the adapter alone",
    "lora-gguf": "a file for llama.cpp's --lora: the adapter alone",
    "merged-safetensors": "a Hugging Face folder: the whole model",
    "merged-gguf-f16": "a GGUF file with F16 weights: the whole model",
    "merged-gguf-q8_0": "a GGUF file with Q8_0 weights: the whole model",
}
EPILOG = "formats:\n" + "".join(f"  {name:<19}{text}\n" for name, text in FORMATS.items())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax export``."""
    parser.epilog = (
        EPILOG + "\nexample:\n  edgejax export --adapter runs/notes --format lora-gguf --out notes.gguf\n"
    )
    add_model_arguments(parser, adapter=True)
    group = parser.add_argument_group("output")
    group.add_argument("--format", choices=FORMATS, required=True, help="see below")
    group.add_argument("--out", type=Path, required=True, metavar="PATH", help="the file or folder to make")
    group.add_argument(
        "--dtype", choices=("f32", "bf16", "f16"), default="bf16",
        help="of the weights in merged-safetensors (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--overwrite", action="store_true", help="replace what is at --out")


def run(args: argparse.Namespace) -> int:
    """Writes the files and prints where they are; returns 0."""
    from edgejax.cli.session import open_model
    from edgejax.core.errors import ConfigError
    from edgejax.weights.export import export

    if args.dtype != "bf16" and args.format != "merged-safetensors":
        raise ConfigError(f"--dtype is for merged-safetensors; {args.format} says its type in its name")
    model, adapters, lora = open_model(args.model, args.base, args.adapter, on_host=True)
    path = export(
        model,
        args.out,
        format=args.format,
        adapters=adapters if lora is not None else None,
        lora=lora,
        dtype=args.dtype,
        overwrite=args.overwrite,
    )
    print(path)
    return 0
