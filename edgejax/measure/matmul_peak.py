"""The float32 matmul rate of this process: what a training step's speed is measured against."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from edgejax.measure.timing import sample

# Squares, where a library shows its best, and the linear layers of a small decoder (512 tokens x SmolLM2-135M).
SHAPES = ((512, 576, 1536), (512, 1536, 576), (1024, 1024, 1024), (2048, 2048, 2048))


@dataclasses.dataclass(frozen=True, kw_only=True)
class MatmulPeak:
    """The best median over the shapes. Shapes are ``(M, K, N)`` of ``[M, K] @ [K, N]``: 2 M K N FLOP."""

    gflop_per_s: float
    shape: tuple[int, int, int]
    samples_s: dict[tuple[int, int, int], tuple[float, ...]]  # wall seconds of every product, by shape

    def gflop_per_s_by_shape(self) -> dict[str, float]:
        """Median rates, by shape as text: ``{"1024x1024x1024": 170.2}``."""
        return {
            "x".join(map(str, shape)): rate_gflop_per_s(shape, float(np.median(times)))
            for shape, times in self.samples_s.items()
        }


def rate_gflop_per_s(shape: tuple[int, int, int], seconds: float) -> float:
    """Rate of one product in GFLOP/s (1e9 floating-point operations a second).

    >>> rate_gflop_per_s((1000, 1000, 1000), 0.01)
    200.0
    """
    rows, inner, columns = shape
    return 2 * rows * inner * columns / seconds / 1e9


def measure_matmul_peak(shapes: tuple[tuple[int, int, int], ...] = SHAPES, *, repeats: int = 7) -> MatmulPeak:
    """Time float32 products under ``jit`` in this process; about a second and 50 MB with the default shapes.

    Args:
      shapes: ``(M, K, N)`` each.
      repeats: samples of each shape after a warm-up; the median counts.

    Example:
      >>> measure_matmul_peak(((64, 64, 64),), repeats=3).gflop_per_s > 0
      True
    """
    samples = {shape: sample(_product(shape), warmup=2, repeats=repeats).wall_s for shape in shapes}
    rates = {shape: rate_gflop_per_s(shape, float(np.median(times))) for shape, times in samples.items()}
    best = max(rates, key=rates.__getitem__)
    return MatmulPeak(gflop_per_s=rates[best], shape=best, samples_s=samples)


class SustainedPeak:
    """The rate of one product repeated for as long as a training step may take, to be set beside one.

    On a machine that is shared, or that slows down when it is warm, products of some milliseconds run at a rate that
    nothing of seconds can have. Measured in turns with the steps, for a similar time, both see the same machine.

    Example:
      >>> SustainedPeak((64, 64, 64)).gflop_per_s(seconds=0.01) > 0
      True
    """

    def __init__(self, shape: tuple[int, int, int]):
        self.shape = shape

    def gflop_per_s(self, seconds: float) -> float:
        """Mean rate over at least ``seconds``, after one product that is not counted. Leaves no array behind."""
        run = _product(self.shape)
        run().block_until_ready()
        count, started = 0, time.perf_counter()
        while (elapsed := time.perf_counter() - started) < seconds or not count:
            run().block_until_ready()
            count += 1
        return rate_gflop_per_s(self.shape, elapsed / count)


def _product(shape: tuple[int, int, int]) -> Callable[[], Any]:
    import jax
    import jax.numpy as jnp

    rows, inner, columns = shape
    rng = np.random.default_rng(0)
    left = jax.device_put(rng.standard_normal((rows, inner), dtype=np.float32))
    right = jax.device_put(rng.standard_normal((inner, columns), dtype=np.float32))
    return functools.partial(jax.jit(jnp.matmul), left, right)
