"""The matmul peak counts operations right and takes the best median."""

import numpy as np
import pytest

from edgejax.measure import matmul_peak
from edgejax.measure.matmul_peak import MatmulPeak, SustainedPeak, measure_matmul_peak, rate_gflop_per_s
from edgejax.measure.timing import Timing

pytestmark = pytest.mark.quick


def test_operations_are_two_a_multiply_add():
    assert rate_gflop_per_s((512, 576, 1536), 1.0) == pytest.approx(2 * 512 * 576 * 1536 / 1e9)


def test_takes_the_best_median_not_the_best_sample(monkeypatch):
    # The first shape has one lucky sample, the second is better in the median.
    times = iter([(1.0, 0.01, 1.0), (0.5, 0.5, 0.9)])
    monkeypatch.setattr(
        matmul_peak,
        "sample",
        lambda fn, **_: Timing(
            wall_s=next(times), cpu_s=(1.0,) * 3, load_average_before=None, load_average_after=None
        ),
    )
    peak = measure_matmul_peak(((10, 10, 10), (10, 10, 20)))
    assert peak.shape == (10, 10, 20)
    assert peak.gflop_per_s == pytest.approx(2 * 10 * 10 * 20 / 0.5 / 1e9)
    assert set(peak.gflop_per_s_by_shape()) == {"10x10x10", "10x10x20"}


def test_is_plausible_and_keeps_its_samples():
    peak = measure_matmul_peak(((128, 256, 512), (256, 256, 256)), repeats=5)
    assert isinstance(peak, MatmulPeak)
    assert 0.01 < peak.gflop_per_s < 100_000
    assert all(len(times) == 5 for times in peak.samples_s.values())
    assert peak.gflop_per_s == pytest.approx(
        max(rate_gflop_per_s(shape, float(np.median(times))) for shape, times in peak.samples_s.items())
    )


def test_a_sustained_rate_is_the_mean_over_its_time(monkeypatch):
    class Clock:
        now = 0.0

        def perf_counter(self):
            return self.now

    clock = Clock()

    class Product:
        def block_until_ready(self):
            clock.now += 0.25

    monkeypatch.setattr(matmul_peak, "_product", lambda shape: Product)
    monkeypatch.setattr(matmul_peak, "time", clock)
    rate = SustainedPeak((10, 10, 10)).gflop_per_s(seconds=0.6)  # three products in 0.75 s
    assert rate == pytest.approx(3 * 2 * 10**3 / 0.75 / 1e9)
