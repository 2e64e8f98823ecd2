"""The float32 matmul rate of this process: what a training step's speed is measured against."""

import dataclasses
import functools

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
    import jax
    import jax.numpy as jnp

    product = jax.jit(jnp.matmul)
    rng = np.random.default_rng(0)
    samples: dict[tuple[int, int, int], tuple[float, ...]] = {}
    for shape in shapes:
        rows, inner, columns = shape
        left = jax.device_put(rng.standard_normal((rows, inner), dtype=np.float32))
        right = jax.device_put(rng.standard_normal((inner, columns), dtype=np.float32))
        timing = sample(functools.partial(product, left, right), warmup=2, repeats=repeats)
        samples[shape] = timing.wall_s
    rates = {shape: rate_gflop_per_s(shape, float(np.median(times))) for shape, times in samples.items()}
    best = max(rates, key=rates.__getitem__)
    return MatmulPeak(gflop_per_s=rates[best], shape=best, samples_s=samples)
