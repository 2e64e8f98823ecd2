"""Timing keeps all samples, and CPU time beside wall time."""

import os
import subprocess
import sys
import time

import pytest

from edgejax.measure.timing import Timing, parse_start_ticks, process_age_s, sample

pytestmark = pytest.mark.quick


def test_all_samples_are_kept_and_the_warm_up_is_not():
    calls = []

    def slow_at_first():
        calls.append(time.sleep(0.2 if len(calls) < 2 else 0.002))

    timing = sample(slow_at_first, warmup=2, repeats=5)
    assert len(calls) == 7
    assert len(timing.wall_s) == len(timing.cpu_s) == 5
    assert 0.002 <= timing.median_s < 0.1


def test_sleep_costs_no_cpu_and_work_does():
    assert sample(lambda: time.sleep(0.02), repeats=3).cpu_over_wall < 0.5
    assert sample(lambda: sum(range(300_000)), repeats=3).cpu_over_wall > 0.2


def test_waits_for_arrays():
    import jax
    import jax.numpy as jnp

    x = jnp.ones((700, 700))
    chain = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: (y @ x) / 700, x))
    timing = sample(lambda: chain(x), repeats=3)
    assert timing.median_s > 20 * 2 * 700**3 / 2e13  # no CPU does 20 TFLOP/s: it was not only dispatched


def test_median_and_load():
    timing = Timing(
        wall_s=(1.0, 9.0, 2.0), cpu_s=(2.0, 9.0, 1.0), load_average_before=None, load_average_after=None
    )
    assert timing.median_s == 2.0
    assert timing.cpu_over_wall == 1.0


def test_no_samples_is_an_error():
    with pytest.raises(ValueError, match="at least 1"):
        sample(lambda: None, repeats=0)


def test_start_of_a_process_with_an_awkward_name():
    fields = ["S", *(str(n) for n in range(4, 53))]
    assert parse_start_ticks(f"12 (x) y (z)) {' '.join(fields)}") == 22


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_process_age_counts_from_the_start_of_the_process():
    program = (
        "import time; time.sleep(0.3)\n"
        "from edgejax.measure.timing import process_age_s\n"
        "print(process_age_s())"
    )
    start = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    outside_s = time.monotonic() - start
    assert 0.29 <= float(done.stdout) <= outside_s + 0.05
    assert process_age_s() < process_age_s() + 1
