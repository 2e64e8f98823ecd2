"""From what a person names to rows: read, tokenise, split, pack."""

import functools
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import NamedTuple

from edgejax.core.errors import ConfigError, DataError
from edgejax.data.corpora import CORPORA
from edgejax.data.dataset import PackedDataset, pack_documents
from edgejax.data.documents import Document, encode_records
from edgejax.data.sources import Paths, Record, read_records
from edgejax.data.split import check_disjoint, split_documents
from edgejax.data.tokenizer import Tokenizer

MAX_SEQ_LENGTH = 2**24  # no model reads rows of this length; rows beyond it only cost memory


class Split(NamedTuple):
    """Rows to learn from and rows to judge by; no document is on both sides."""

    train: PackedDataset
    held_out: PackedDataset


def load_documents(
    source: Paths,
    tokenizer: Tokenizer,
    *,
    vocab_size: int | None = None,
    ignore_fields: Collection[str] = (),
    parse_special: bool = True,
) -> list[Document]:
    """Documents of a built-in corpus (its name, like ``"python-reference"``), or of files and folders.

    Args:
      source: the corpus, a file, a folder, or several of them.
      tokenizer: the model's.
      vocab_size: rows of the model's embedding; None does not check.
      ignore_fields: fields of JSON lines to pass over.
      parse_special: read special tokens written in texts as such.

    Raises:
      DataError: what cannot be used, with file and line; a token the model has no embedding for.
    """
    if isinstance(source, str) and source in CORPORA:
        records: Iterable[Record] = CORPORA[source]()
    elif isinstance(source, str) and source and not os.path.exists(source):
        raise DataError(
            f"{source}: there is no such file or folder (looked from {Path.cwd()}), "
            f"and of the texts that come along ({', '.join(CORPORA)}) none has this name"
        )
    else:
        if not isinstance(source, str | Path) and (alone := [name for name in source if name in CORPORA]):
            raise DataError(
                f"{alone[0]} comes along with edgejax and is used alone; leave it or the files out"
            )
        records = read_records(source, ignore_fields=ignore_fields)
    documents = encode_records(records, tokenizer, parse_special=parse_special)
    if vocab_size is not None:
        _check_vocabulary(documents, vocab_size)
    return documents


def load_text(
    source: Paths,
    tokenizer: Tokenizer,
    seq_length: int,
    *,
    held_out_fraction: float = 0.1,
    held_out_source: Paths | None = None,
    packing: bool = True,
    seed: int = 0,
    max_position: int | None = None,
    allow_long_context: bool = False,
    vocab_size: int | None = None,
    ignore_fields: Collection[str] = (),
    parse_special: bool = True,
) -> Split:
    """Training and held-out rows of a text.

    Args:
      source: ``"python-reference"``, or a file, a folder, or several of them.
      tokenizer: the model's.
      seq_length: positions of a row, T.
      held_out_fraction: fraction of the documents put aside; unused with ``held_out_source``.
      held_out_source: held-out documents of their own, named as ``source`` is.
      packing: put several documents in a row.
      seed: decides which documents are held out (the order of rows is ``batch_at``'s).
      max_position: the longest context of the model; None does not check.
      allow_long_context: go beyond it all the same.
      vocab_size: rows of the model's embedding; None does not check.
      ignore_fields: fields of JSON lines to pass over.
      parse_special: read special tokens written in texts as such.

    Returns:
      ``(train, held_out)``.

    Raises:
      ConfigError: ``seq_length`` beyond the model's context, a fraction outside (0, 1).
      DataError: data that cannot be used, a side without documents, a document on both sides, or a token
        the model has no embedding for.
    """
    check_seq_length(seq_length, max_position, allow_long_context=allow_long_context)
    load = functools.partial(
        load_documents,
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        ignore_fields=ignore_fields,
        parse_special=parse_special,
    )
    documents = load(source)
    if held_out_source is None:
        train, held_out = split_documents(documents, held_out_fraction, seed)
    else:
        train, held_out = documents, load(held_out_source)
        check_disjoint(train, held_out)
    return Split(
        pack_documents(train, seq_length, packing=packing),
        pack_documents(held_out, seq_length, packing=packing),
    )


def check_seq_length(seq_length: int, max_position: int | None, *, allow_long_context: bool = False) -> None:
    """Refuse rows that no model can use, or this one was not made for.

    Raises:
      DataError: ``seq_length`` below 2 or above ``MAX_SEQ_LENGTH``.
      ConfigError: ``seq_length`` above ``max_position`` without ``allow_long_context``.

    Example:
      >>> check_seq_length(4096, max_position=2048)
      Traceback (most recent call last):
      ...
      edgejax.core.errors.ConfigError: sequence length 4096 is longer than the model's context of 2048 ...
    """
    if seq_length < 2:
        raise DataError(
            f"sequence length {seq_length}: a row needs at least 2 positions, 128 to 2048 are usual"
        )
    if max_position is not None and seq_length > max_position and not allow_long_context:
        raise ConfigError(
            f"sequence length {seq_length} is longer than the model's context of {max_position} positions; "
            f"use {max_position} or less, or --allow-long-context to train beyond it"
        )
    if seq_length > MAX_SEQ_LENGTH:
        raise DataError(f"sequence length {seq_length}: a row has at most {MAX_SEQ_LENGTH} positions")


def _check_vocabulary(documents: list[Document], vocab_size: int) -> None:
    for document in documents:
        largest = int(document.tokens.max())
        if largest >= vocab_size:
            raise DataError(
                f"{document.name}: token id {largest} is beyond the model's vocabulary of {vocab_size}; "
                "the tokenizer belongs to another model"
            )
