"""Rows in a fixed order, found by number: the same integer always gives the same batch.

The order of all time is one endless sequence: every row once in the order of epoch 0, then every row once in
that of epoch 1, and so on. Batch k of B rows is the sequence's [k B, (k + 1) B), so a batch may end one epoch
and begin the next, no row is ever left out, and resuming takes nothing but k.
"""

import functools
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from edgejax.core.errors import ConfigError
from edgejax.data.batch import Batch
from edgejax.data.documents import Document
from edgejax.data.pack import cut_documents, fill_rows


@dataclass(frozen=True, kw_only=True, eq=False)
class PackedDataset:
    """Documents laid end to end, and which stretches of them make up each row.

    It holds 5 bytes a token; rows are put together when they are asked for.

    Attributes:
      tokens: int32 ``[n]``; all documents.
      loss: bool ``[n]``; whether ``tokens[i]`` is learned.
      starts: int64 ``[pieces]``; where a piece begins in ``tokens``.
      lengths: int32 ``[pieces]``; the positions it takes.
      row_offsets: int64 ``[rows + 1]``; row r is made of the pieces ``row_offsets[r]`` to ``row_offsets[r + 1]``.
      seq_length: positions of a row, T.
      n_documents: documents it was made of.
      fingerprint: sha256 of all of the above; two data sets with the same one give the same batches.
    """

    tokens: Int[np.ndarray, " n"]
    loss: Bool[np.ndarray, " n"]
    starts: Int[np.ndarray, " pieces"]
    lengths: Int[np.ndarray, " pieces"]
    row_offsets: Int[np.ndarray, " rows_and_one"]
    seq_length: int
    n_documents: int
    fingerprint: str

    @property
    def n_rows(self) -> int:
        """Rows, which is also the length of an epoch."""
        return len(self.row_offsets) - 1

    @property
    def n_positions(self) -> int:
        """Positions that hold a token; the rest of ``n_rows * seq_length`` is padding."""
        return int(self.lengths.sum(dtype=np.int64))

    @property
    def n_learned(self) -> int:
        """Positions whose target is learned, over all rows."""
        return sum(
            int(np.count_nonzero(self.loss[start + 1 : start + length + 1]))
            for start, length in zip(self.starts.tolist(), self.lengths.tolist(), strict=True)
        )


def pack_documents(documents: Sequence[Document], seq_length: int, *, packing: bool = True) -> PackedDataset:
    """Make rows of documents.

    Args:
      documents: in a fixed order (the fingerprint depends on it).
      seq_length: positions of a row, T.
      packing: put several pieces in a row; False gives each piece a row of its own.

    Raises:
      DataError: ``seq_length`` below 2, no documents, or none with a token to learn.

    Example:
      >>> import numpy as np
      >>> documents = [Document(np.arange(n), np.ones(n, bool), f"{n}") for n in (5, 3, 4)]
      >>> dataset = pack_documents(documents, seq_length=6)
      >>> dataset.n_rows, dataset.n_positions
      (2, 9)
      >>> batch_at(dataset, 0, batch_size=2, seed=0).segment_ids.tolist()
      [[1, 1, 1, 1, 2, 2], [1, 1, 1, 0, 0, 0]]
    """
    pieces = cut_documents(documents, seq_length)
    rows = fill_rows([p.length for p in pieces], seq_length) if packing else [[i] for i in range(len(pieces))]
    in_rows = [pieces[index] for row in rows for index in row]
    arrays = {
        "tokens": np.concatenate([document.tokens for document in documents]).astype(np.int32),
        "loss": np.concatenate([document.loss for document in documents]).astype(bool),
        "starts": np.array([piece.start for piece in in_rows], np.int64),
        "lengths": np.array([piece.length for piece in in_rows], np.int32),
        "row_offsets": np.cumsum([0, *map(len, rows)], dtype=np.int64),
    }
    digest = hashlib.sha256(f"{seq_length} {len(documents)}".encode())
    for name, array in arrays.items():
        digest.update(f" {name} {len(array)} ".encode())
        digest.update(array.astype(array.dtype.newbyteorder("<")).tobytes())
    return PackedDataset(
        **arrays, seq_length=seq_length, n_documents=len(documents), fingerprint=digest.hexdigest()
    )


def batch_at(dataset: PackedDataset, position: int, batch_size: int, seed: int) -> Batch:
    """The batch that comes after ``position`` batches.

    Args:
      dataset: rows of T positions.
      position: batches taken before, from 0; the only state there is.
      batch_size: rows of a batch, B.
      seed: decides the order of the rows in every epoch.

    Returns:
      ``[B, T]`` numpy arrays; padding has token 0, segment 0 and no loss.

    Raises:
      ConfigError: a negative position or seed, or a batch size below 1.
    """
    if position < 0 or batch_size < 1 or seed < 0:
        raise ConfigError(
            f"position {position}, batch size {batch_size}, seed {seed}: position and seed must be 0 or more, "
            "the batch size 1 or more"
        )
    return _rows(dataset, _stream(dataset.n_rows, position * batch_size, batch_size, seed))


def micro_batches(dataset: PackedDataset, step: int, accumulate: int, batch_size: int, seed: int) -> Batch:
    """The ``accumulate`` batches of an optimizer step, stacked to ``[A, B, T]``.

    ``A`` batches of ``B`` rows hold the rows that one batch of ``A * B`` would.

    Raises:
      ConfigError: as ``batch_at``, or ``accumulate`` below 1.
    """
    if accumulate < 1:
        raise ConfigError(f"accumulate {accumulate}: a step needs 1 micro-batch or more")
    flat = batch_at(dataset, step, accumulate * batch_size, seed)
    return Batch(*(leaf.reshape(accumulate, batch_size, dataset.seq_length) for leaf in flat))


def eval_batches(dataset: PackedDataset, batch_size: int, max_rows: int | None = None) -> Iterator[Batch]:
    """Every row once, in batches of one shape; the last is filled up with rows of padding.

    Args:
      dataset: rows of T positions.
      batch_size: rows of a batch, B.
      max_rows: use only so many, always the same ones, drawn evenly from long and short documents.

    Raises:
      ConfigError: a batch size or ``max_rows`` below 1.
    """
    if batch_size < 1 or (max_rows is not None and max_rows < 1):
        raise ConfigError(f"batch size {batch_size}, max_rows {max_rows}: both must be 1 or more")
    rows = _epoch_order(dataset.n_rows, 0, 0)[:max_rows].tolist()
    for first in range(0, len(rows), batch_size):
        chunk = rows[first : first + batch_size]
        yield _rows(dataset, chunk + [None] * (batch_size - len(chunk)))


@functools.lru_cache(maxsize=4)
def _epoch_order(n_rows: int, seed: int, epoch: int) -> np.ndarray:
    # numpy keeps the raw bits of a bit generator the same for ever, but not those of Generator.permutation.
    keys = np.random.Philox(np.random.SeedSequence([seed, epoch])).random_raw(n_rows)
    return np.argsort(keys, kind="stable")


def _stream(n_rows: int, first: int, count: int, seed: int) -> list[int]:
    epochs, places = np.divmod(np.arange(first, first + count), n_rows)
    return [
        int(_epoch_order(n_rows, seed, epoch)[place])
        for epoch, place in zip(epochs.tolist(), places.tolist(), strict=True)
    ]


def _rows(dataset: PackedDataset, rows: Sequence[int | None]) -> Batch:
    shape = (len(rows), dataset.seq_length)
    tokens, targets, segment_ids, positions = (np.zeros(shape, np.int32) for _ in range(4))
    loss_mask = np.zeros(shape, bool)
    for b, row in enumerate(rows):
        if row is None:
            continue
        at = 0
        pieces = range(int(dataset.row_offsets[row]), int(dataset.row_offsets[row + 1]))
        for segment, piece in enumerate(pieces, start=1):
            start, length = int(dataset.starts[piece]), int(dataset.lengths[piece])
            here, following = slice(at, at + length), slice(start + 1, start + length + 1)
            tokens[b, here] = dataset.tokens[start : start + length]
            targets[b, here] = dataset.tokens[following]
            loss_mask[b, here] = dataset.loss[following]
            segment_ids[b, here] = segment
            positions[b, here] = np.arange(length)
            at += length
    return Batch(tokens, targets, loss_mask, segment_ids, positions)
