"""Walking a head ``[V, D]`` in chunks of the vocabulary, and hidden rows in chunks of rows."""

import jax
import jax.numpy as jnp
from jax import lax

from edgejax.quant.array import Weight, dequantize

ROW_CHUNK = 512  # hidden rows at once: the head is widened anew for each, at 1% of the cost of the products
VOCAB_CHUNK = 4096  # head rows at once: logits [512, 4096] are 8 MiB, a float32 chunk of D = 576 is 9 MiB


def vocab_starts(vocab_size: int) -> tuple[int, jax.Array]:
    """Chunk length and the first row of each chunk; the last chunk may reach back over the one before."""
    chunk = min(VOCAB_CHUNK, vocab_size)
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


def valid_rows_first(hidden, targets, mask):
    """Reorder rows so that those with loss come first, and pad to whole chunks.

    Returns hidden, targets and mask in that order (``[M, ...]``, M a multiple of the row chunk), the order
    itself, the row chunk, and how many chunks hold a row with loss. Later chunks are never visited.
    """
    n_rows = hidden.shape[0]
    row_chunk = min(ROW_CHUNK, n_rows)
    order = jnp.argsort(~mask, stable=True)
    pad = -n_rows % row_chunk
    rows = jnp.pad(order, (0, pad))
    kept = jnp.pad(mask[order], (0, pad))
    n_chunks = (jnp.sum(mask, dtype=jnp.int32) + row_chunk - 1) // row_chunk
    wide = jnp.where(kept[:, None], hidden[rows].astype(jnp.float32), 0.0)  # 0 * inf would be NaN in dW
    return wide, targets[rows], kept, order, row_chunk, n_chunks


def rows_back(gradient, order, dtype):
    """Undo ``valid_rows_first`` for a gradient ``[M, D]``."""
    n_rows = order.shape[0]
    return jnp.zeros((n_rows, gradient.shape[1]), dtype).at[order].set(gradient[:n_rows].astype(dtype))
