"""Walking a head ``[V, D]`` in chunks of the vocabulary, and hidden rows in chunks of rows."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array
from edgejax.quant.array import Weight, dequantize

ROW_CHUNK = 512  # hidden rows at once: the head is widened anew for each, at 1% of the cost of the products
VOCAB_CHUNK = 4096  # head rows at once: logits [512, 4096] are 8 MiB
CHUNK_ELEMENTS = 9 * 2**18  # and at most so many elements of the head: 9 MiB in float32, 4096 rows of D = 576
SMALLEST_VOCAB_CHUNK = 512


def vocab_starts(weight: Weight) -> tuple[int, jax.Array]:
    """Chunk length and the first row of each chunk of a head; the last chunk may reach back over the one before."""
    vocab_size, width = weight.shape
    fitting = CHUNK_ELEMENTS // width // SMALLEST_VOCAB_CHUNK * SMALLEST_VOCAB_CHUNK
    chunk = min(VOCAB_CHUNK, max(fitting, SMALLEST_VOCAB_CHUNK), vocab_size)
    count = -(-vocab_size // chunk)
    return chunk, jnp.arange(count, dtype=jnp.int32) * chunk


def head_chunk(weight: Weight, start, chunk: int):
    """Rows of the head for the chunk that begins at ``start``, in float32.

    Returns the wide rows ``[chunk, D]``, the row they begin at (moved back where the table ends) and a bool
    ``[chunk]`` that is False for rows an earlier chunk has already covered.
    """
    first = jnp.minimum(start, weight.shape[0] - chunk)
    rows = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, chunk, axis=0), weight)
    return dequantize(rows), first, first + jnp.arange(chunk, dtype=jnp.int32) >= start


class HeadRows(NamedTuple):
    """Hidden rows in the order in which the head sees them: those with loss first.

    Attributes:
      hidden: float32 ``[M, D]``, M a multiple of the row chunk; zero where there is no loss.
      targets: int32 ``[M]``.
      kept: bool ``[M]``, rows with loss.
      order: int32 ``[N]``, where each row was.
      n_chunks: int32 scalar, chunks that hold a row with loss; later ones are never visited.
    """

    hidden: Float[Array, "M D"]
    targets: Int[Array, " M"]
    kept: Bool[Array, " M"]
    order: Int[Array, " N"]
    n_chunks: Int[Array, ""]

    @property
    def chunk(self) -> int:
        """Rows of a chunk."""
        return min(ROW_CHUNK, self.order.shape[0])

    def take(self, start):
        """Hidden rows, targets and ``kept`` of the chunk that begins at row ``start``."""
        leaves = (self.hidden, self.targets, self.kept)
        return tuple(lax.dynamic_slice_in_dim(leaf, start, self.chunk) for leaf in leaves)


def valid_rows_first(hidden, targets, mask) -> HeadRows:
    """Reorder rows so that those with loss come first, and fill up to whole chunks."""
    n_rows = hidden.shape[0]
    row_chunk = min(ROW_CHUNK, n_rows)
    order = jnp.argsort(~mask, stable=True)
    pad = -n_rows % row_chunk
    rows = jnp.pad(order, (0, pad))
    kept = jnp.pad(mask[order], (0, pad))
    n_chunks = (jnp.sum(mask, dtype=jnp.int32) + row_chunk - 1) // row_chunk
    wide = jnp.where(kept[:, None], hidden[rows].astype(jnp.float32), 0.0)  # 0 * inf would be NaN in dW
    return HeadRows(wide, targets[rows], kept, order, n_chunks)


def rows_back(gradient, order, dtype):
    """Undo ``valid_rows_first`` for a gradient ``[M, D]``."""
    n_rows = order.shape[0]
    return jnp.zeros((n_rows, gradient.shape[1]), dtype).at[order].set(gradient[:n_rows].astype(dtype))


def logit_gradient(rows: HeadRows, lse_rows, start, wide, first):
    """Hidden rows ``[n, D]`` of the chunk from row ``start``, and the loss's gradient in their logits ``[n, c]``.

    Args:
      rows: all hidden rows.
      lse_rows: their log-sum-exps ``[M]``.
      start: first row of the chunk.
      wide: float32 rows ``[c, D]`` of the head, from token ``first``.
      first: int32.
    """
    h, y, keep = rows.take(start)
    lse = lax.dynamic_slice_in_dim(lse_rows, start, rows.chunk)
    own = (y - first)[:, None] == jnp.arange(wide.shape[0], dtype=y.dtype)
    g = jnp.exp(h @ wide.T - lse[:, None]) - own
    return h, jnp.where(keep[:, None], g, 0.0)
