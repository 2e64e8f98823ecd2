"""How the query rows of a causal attention are cut, and which keys each cut reads.

Rows are cut into blocks; blocks are bundled into at most ``MAX_BUNDLES`` bundles that share one static key
range. A bundle of one block is straight-line code; a longer one is a loop. Program size is therefore bounded
for any T, and the keys read beyond what the mask leaves are at most one bundle's width.
"""

from typing import NamedTuple

QUERY_BLOCK = 128  # rows: large enough for full matmul speed, small enough that 4 blocks skip 37% at T = 512
MAX_BUNDLES = (
    4  # XLA:CPU keeps the scores of all one-block bundles at once: 8 took 70 MB at T = 1024, 4 take 24
)


class Bundle(NamedTuple):
    """``n_blocks`` query blocks from row ``query_start`` on, all reading keys ``[key_start, key_stop)``."""

    query_start: int
    n_blocks: int
    key_start: int
    key_stop: int


def query_block(length: int) -> int:
    """Rows of a query block for T = ``length``."""
    return min(QUERY_BLOCK, -(-length // 8) * 8)


def padded_length(length: int) -> tuple[int, int]:
    """(rows of a query block, T filled up to whole blocks).

    >>> padded_length(300), padded_length(17)
    ((128, 384), (24, 24))
    """
    block = query_block(length)
    return block, -(-length // block) * block


def plan_bundles(length: int, block: int, window: int | None) -> list[Bundle]:
    """Cut ``length`` rows (a multiple of ``block``).

    >>> plan_bundles(512, 128, None)[1]
    Bundle(query_start=128, n_blocks=1, key_start=0, key_stop=256)
    """
    n_blocks = length // block
    per_bundle = -(-n_blocks // MAX_BUNDLES)
    bundles = []
    for first in range(0, n_blocks, per_bundle):
        count = min(per_bundle, n_blocks - first)
        start, stop = first * block, (first + count) * block
        key_start = 0 if window is None else max(0, (start - window + 1) // block * block)
        bundles.append(Bundle(start, count, key_start, stop))
    return bundles
