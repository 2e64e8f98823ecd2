"""Packing documents into rows of T positions.

A document of n tokens is n - 1 pairs (token, the token after it), one a position. Only the last token has no
position: it is a target. A document of more than T pairs is cut into consecutive pieces; the target at a
piece's last position is the token the next piece begins with, so every pair is there exactly once. Each
piece is a segment of its own, its positions start from 0, and it sees nothing of the piece before. Pieces
without a token to learn are left out: they would cost time and change no gradient.

Rows are filled best-fit decreasing: longest piece first, into the fullest row that still has room. It is
deterministic and, like first-fit decreasing, within 11/9 of the fewest rows possible (D. S. Johnson et al.,
"Worst-case performance bounds for simple one-dimensional packing algorithms", SIAM J. Comput. 3, 1974).
"""

from collections.abc import Sequence
from typing import NamedTuple

from edgejax.core.errors import DataError
from edgejax.data.documents import Document


class Piece(NamedTuple):
    """``length`` pairs, the first of which is ``(tokens[start], tokens[start + 1])``."""

    start: int
    length: int


def cut_documents(documents: Sequence[Document], seq_length: int) -> list[Piece]:
    """Pieces of at most ``seq_length`` pairs, by their place in the documents laid end to end.

    Raises:
      DataError: ``seq_length`` below 2, no documents, or none with a token to learn.

    Example:
      >>> import numpy as np
      >>> document = Document(np.arange(8), np.ones(8, bool), "seven pairs")
      >>> cut_documents([document, document], 4)
      [Piece(start=0, length=4), Piece(start=4, length=3), Piece(start=8, length=4), Piece(start=12, length=3)]
    """
    if seq_length < 2:
        raise DataError(
            f"sequence length {seq_length}: a row needs at least 2 positions, 128 to 2048 are usual"
        )
    if not documents:
        raise DataError("no documents: there is nothing to make rows of")
    pieces, offset = [], 0
    for document in documents:
        n_pairs = len(document.tokens) - 1
        for start in range(0, n_pairs, seq_length):
            length = min(seq_length, n_pairs - start)
            if document.loss[start + 1 : start + length + 1].any():
                pieces.append(Piece(offset + start, length))
        offset += len(document.tokens)
    if not pieces:
        raise DataError(
            f"no token of the {len(documents)} documents is learned (the first is {documents[0].name}): "
            "every row would be masked out; check the loss flags, or that the texts hold two tokens at least"
        )
    return pieces


def fill_rows(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of pieces, row by row; no row's lengths sum to more than ``capacity``.

    Args:
      lengths: each from 1 to ``capacity``.
      capacity: positions of a row.

    Example:
      >>> fill_rows([3, 8, 5, 2], capacity=8)
      [[1], [2, 0], [3]]
    """
    rows: list[list[int]] = []
    rows_with_room: list[list[int]] = [[] for _ in range(capacity + 1)]
    rooms = 0  # bit r is set when a row with r free positions is there
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = rows_with_room[room].pop()
            if not rows_with_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        if room > length:
            rows_with_room[room - length].append(row)
            rooms |= 1 << (room - length)
    return rows
