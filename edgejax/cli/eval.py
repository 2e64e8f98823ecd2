"""``edgejax eval``: loss and perplexity of a model on text, with or without an adapter."""

import argparse
import json

from edgejax.cli.options import add_model_arguments, check_step_size, whole_number

EPILOG = """examples:
  edgejax eval --data notes.txt
  edgejax eval --data python-reference --held-out 0.1 --adapter runs/first
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax eval``."""
    parser.epilog = EPILOG
    add_model_arguments(parser, adapter=True)
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        nargs="+",
        required=True,
        metavar="PATH",
        help="files or folders of text, or python-reference",
    )
    group.add_argument(
        "--held-out",
        type=float,
        metavar="SHARE",
        help="use only the documents a run with this share and seed holds out",
    )
    group.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    group.add_argument(
        "--seq", type=whole_number, default=512, help="positions of a row (default: %(default)s)"
    )
    group.add_argument("--batch", type=whole_number, default=1, help="rows of a batch (default: %(default)s)")
    group.add_argument("--max-rows", type=whole_number, help="stop after so many rows (default: all)")
    group.add_argument("--no-packing", action="store_true", help="one document a row")
    group.add_argument(
        "--allow-long-context", action="store_true", help="let --seq exceed the model's context"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Evaluates and prints; returns 0."""
    from edgejax.cli.session import need_tokenizer, open_model, source_of
    from edgejax.core.cache import enable_compile_cache
    from edgejax.data import check_seq_length, load_documents, load_text, pack_documents
    from edgejax.models import Decoder
    from edgejax.train import evaluate

    check_step_size(args.batch, args.seq)
    enable_compile_cache()
    model, adapters, lora = open_model(args.model, args.base, args.adapter)
    tokenizer, config = need_tokenizer(model), model.config
    if args.held_out is not None:
        rows = load_text(
            source_of(args.data),
            tokenizer,
            args.seq,
            held_out_fraction=args.held_out,
            packing=not args.no_packing,
            seed=args.seed,
            max_position=config.max_position,
            allow_long_context=args.allow_long_context,
            vocab_size=config.vocab_size,
        ).held_out
    else:
        check_seq_length(args.seq, config.max_position, allow_long_context=args.allow_long_context)
        documents = load_documents(source_of(args.data), tokenizer)
        rows = pack_documents(documents, args.seq, packing=not args.no_packing)
    result = evaluate(
        Decoder(config, lora), adapters, model.params, rows, batch_size=args.batch, max_rows=args.max_rows
    )
    if args.json:
        figures = {"loss": result.loss, "perplexity": result.perplexity, "n_tokens": result.n_tokens}
        print(json.dumps({"model": model.source.name, **figures}))
    else:
        print(f"loss        {result.loss:.4f} nats per token")
        print(f"perplexity  {result.perplexity:.3f}")
        print(f"tokens      {result.n_tokens:,} learned tokens of {rows.n_documents:,} documents")
    return 0
