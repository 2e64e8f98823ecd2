"""The text: topics of Python's language reference, split so that no sentence is on both sides, and a tokenizer.

Some topics repeat others (``compound`` holds ``if``, ``for`` and ``while``). Topics that share a line of
``SHARED_LINE`` characters belong to one group, and a group is on one side as a whole.
"""

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from edgejax.data import CORPORA, PackedDataset, TextRecord, Tokenizer, encode_records, pack_documents

SHARED_LINE = 40
END = "<|end|>"


class Corpus(NamedTuple):
    """Rows to train on and rows to judge by.

    Attributes:
      train: rows of the training topics.
      validation: rows of the others.
      hashes: SHA-256 of the texts, of the tokenizer and of the rows.
      held_out: names of the topics that are judged by.
    """

    train: PackedDataset
    validation: PackedDataset
    hashes: dict[str, str]
    held_out: list[str]


def load_corpus(data: dict[str, Any]) -> Corpus:
    """Split, tokenizer and rows by the ``data`` table of the settings."""
    records = CORPORA[data["corpus"]]()
    held_out = held_out_names(records, data["held_out_fraction"], data["split_seed"])
    learned = [record for record in records if record.name not in held_out]
    judged = [record for record in records if record.name in held_out]
    backend = train_tokenizer([record.text for record in learned], data["vocab_size"])
    tokenizer = Tokenizer(backend, eos_id=backend.token_to_id(END))
    train, validation = (
        pack_documents(encode_records(side, tokenizer, parse_special=False), data["sequence_length"])
        for side in (learned, judged)
    )
    hashes = {
        "text": _sha256("\0".join(part for record in records for part in record)),
        "tokenizer": _sha256(backend.to_str()),
        "train": train.fingerprint,
        "validation": validation.fingerprint,
    }
    return Corpus(train, validation, hashes, sorted(held_out))


def held_out_names(records: Sequence[TextRecord], fraction: float, seed: int) -> set[str]:
    """Groups in the order of a hash, each taken if the held-out text stays within ``fraction`` of all bytes.

    >>> texts = {"a": "x" * 50, "b": "x" * 50, "c": "y" * 50, "d": "z" * 50}
    >>> sorted(held_out_names([TextRecord(*item) for item in texts.items()], 0.3, 0))
    ['d']
    """
    sizes = {record.name: len(record.text.encode()) for record in records}
    room = fraction * sum(sizes.values())
    taken: set[str] = set()
    for group in sorted(groups_of_topics(records), key=lambda group: _sha256(f"{seed}:{group[0]}")):
        size = sum(sizes[name] for name in group)
        if size <= room:
            room -= size
            taken.update(group)
    return taken


def groups_of_topics(records: Sequence[TextRecord]) -> list[list[str]]:
    """Names of the topics that share a long line with one another, directly or through others."""
    group_of = {record.name: {record.name} for record in records}
    first_with: dict[str, str] = {}
    for record in records:
        for line in {line.strip() for line in record.text.splitlines()}:
            if len(line) < SHARED_LINE:
                continue
            other = first_with.setdefault(line, record.name)
            if group_of[other] is not group_of[record.name]:
                joined = group_of[other] | group_of[record.name]
                group_of |= dict.fromkeys(joined, joined)
    return sorted({id(group): sorted(group) for group in group_of.values()}.values())


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> Backend:
    """A byte-level BPE (Radford et al. 2019) whose token 0 ends a document."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return backend


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
