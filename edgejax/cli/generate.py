"""``edgejax generate``: a prompt continued, shown as it is made."""

import argparse
import dataclasses
import json
import sys

from edgejax.cli.options import add_model_arguments, whole_number

EPILOG = """examples:
  edgejax generate --prompt "The with statement"
  edgejax generate --adapter runs/notes --prompt "What is a context manager?" --chat --temperature 0.7 --top-p 0.9
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax generate``."""
    parser.epilog = EPILOG
    add_model_arguments(parser, adapter=True)
    group = parser.add_argument_group("text")
    group.add_argument(
        "--prompt", required=True, metavar="TEXT", help="what to continue; - reads standard input"
    )
    group.add_argument(
        "--chat", action="store_true", help="the prompt is a message (the model's own template)"
    )
    group.add_argument("--system", metavar="TEXT", help="the system message of a chat")
    group.add_argument(
        "--max-tokens", type=whole_number, default=100, help="stop after so many (default: %(default)s)"
    )
    group.add_argument(
        "--allow-long-context", action="store_true", help="let prompt and text exceed the model's context"
    )
    group = parser.add_argument_group("choice of tokens")
    group.add_argument(
        "--temperature", type=float, default=0.0, help="0: always the likeliest (default: %(default)s)"
    )
    group.add_argument(
        "--top-p", type=float, default=1.0, help="draw from the likeliest of this mass (default: %(default)s)"
    )
    group.add_argument(
        "--top-k", type=whole_number, default=0, help="draw from so many; 0: all (default: %(default)s)"
    )
    group.add_argument("--seed", type=whole_number, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object at the end, do not stream")


def run(args: argparse.Namespace) -> int:
    """Prints the text as it comes; returns 0.

    Raises:
      ConfigError: ``--system`` without ``--chat``, and what ``models.generate`` refuses.
      DataError: standard input that is not text.
    """
    from edgejax.cli.session import need_tokenizer, open_model
    from edgejax.core.cache import enable_compile_cache
    from edgejax.core.errors import ConfigError
    from edgejax.models import generate

    if args.system is not None and not args.chat:
        raise ConfigError("--system is part of a chat; add --chat")
    enable_compile_cache()
    model, adapters, lora = open_model(args.model, args.base, args.adapter)
    need_tokenizer(model)
    text = _standard_input() if args.prompt == "-" else args.prompt
    messages = [{"role": "user", "content": text}]
    if args.system is not None:
        messages.insert(0, {"role": "system", "content": args.system})
    if not (args.chat or args.json):
        _show(text)  # what is continued stands before its continuation
    result = generate(
        model,
        messages if args.chat else text,
        adapters=adapters,
        lora=lora,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        seed=args.seed,
        on_text=None if args.json else _show,
        allow_long_context=args.allow_long_context,
    )
    print(json.dumps({"model": model.source.name, **dataclasses.asdict(result)}) if args.json else "")
    return 0


def _standard_input() -> str:
    from edgejax.core.errors import DataError

    if sys.stdin is None:
        raise DataError("standard input is closed; give the text with --prompt TEXT")
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise DataError(
            f"standard input is not UTF-8: {error}; convert it, for example with iconv"
        ) from error


def _show(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()
