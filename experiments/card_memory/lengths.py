"""The longest row whose step fits, from what the step takes at a few lengths."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

STEP = 128  # lengths are multiples of it
SPARE = 0.01  # of what a step may take, for the error of the lines: compiled for the card itself it took up to 0.5% more


class Longest(NamedTuple):
    """A length, 0 where none fits, and the bytes of its step."""

    seq: int
    n_bytes: int


def bytes_at(points: Sequence[dict[str, Any]], lengths: np.ndarray, *, parabola: bool) -> np.ndarray:
    """Bytes at other lengths.

    Args:
      points: ``{"seq": ..., "peak_bytes": ...}`` by ascending length; at least two, or three for a parabola.
      lengths: float or int ``[N]``.
      parabola: through the points, as where all scores are held; else straight from each point to the next, and beyond
        the first and the last as between the two nearest.

    >>> points = [{"seq": 10, "peak_bytes": 100}, {"seq": 20, "peak_bytes": 200}, {"seq": 30, "peak_bytes": 400}]
    >>> bytes_at(points, np.array([5, 25, 40]), parabola=False).round().tolist()
    [50.0, 300.0, 600.0]
    >>> bytes_at(points, np.array([40]), parabola=True).round().tolist()
    [700.0]
    """
    x = np.array([point["seq"] for point in points], float)
    y = np.array([point["peak_bytes"] for point in points], float)
    lengths = np.asarray(lengths, float)
    if parabola:
        return np.polyval(np.polyfit(x, y, 2), lengths)
    i = np.clip(np.searchsorted(x, lengths) - 1, 0, len(x) - 2)
    return y[i] + (lengths - x[i]) * (y[i + 1] - y[i]) / (x[i + 1] - x[i])


def longest(
    points: Sequence[dict[str, Any]], budget_bytes: float, context: int, *, parabola: bool
) -> Longest:
    """The longest row, a multiple of ``STEP`` positions up to the model's context, whose step fits.

    >>> points = [{"seq": 1024, "peak_bytes": 2000}, {"seq": 2048, "peak_bytes": 3000}]
    >>> longest(points, 4000, 8192, parabola=False)
    Longest(seq=3072, n_bytes=4000)
    >>> longest(points, 900, 8192, parabola=False).seq, longest(points, 10**6, 8192, parabola=False).seq
    (0, 8192)
    """
    lengths = np.arange(STEP, context + 1, STEP)
    sizes = bytes_at(points, lengths, parabola=parabola)
    n_fitting = int(np.argmax(sizes > budget_bytes)) if (sizes > budget_bytes).any() else len(sizes)
    at = max(0, n_fitting - 1)  # up to the first that is too long: beyond, a fit may come down again
    return Longest(int(lengths[at]) if n_fitting else 0, round(float(sizes[at])))
