"""What a training step eats."""

from typing import NamedTuple

from jaxtyping import Bool, Int

from edgejax.core.arrays import ArrayLike


class Batch(NamedTuple):
    """Rows of packed tokens. ``targets[b, t]`` is the token that follows ``tokens[b, t]`` in its document.

    Attributes:
      tokens: int32 ``[B, T]``.
      targets: int32 ``[B, T]``; any value where ``loss_mask`` is False.
      loss_mask: bool ``[B, T]``; True where the loss counts.
      segment_ids: int32 ``[B, T]``; 1, 2, ... the documents of a row, 0 padding. Attention stays inside a segment.
      positions: int32 ``[B, T]``; the position inside its document, from 0.
    """

    tokens: Int[ArrayLike, "B T"]
    targets: Int[ArrayLike, "B T"]
    loss_mask: Bool[ArrayLike, "B T"]
    segment_ids: Int[ArrayLike, "B T"]
    positions: Int[ArrayLike, "B T"]
