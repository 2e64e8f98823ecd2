"""Time, with every sample kept, and CPU time beside wall time so that a busy machine is seen."""

import dataclasses
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_IMPORTED_S = time.monotonic()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Timing:
    """Samples of one function, warm-up left out."""

    wall_s: tuple[float, ...]
    cpu_s: tuple[float, ...]  # of all threads of this process
    load_average_before: tuple[float, float, float] | None  # of the last 1, 5, 15 minutes
    load_average_after: tuple[float, float, float] | None

    @property
    def median_s(self) -> float:
        """Median wall time."""
        return statistics.median(self.wall_s)

    @property
    def cpu_over_wall(self) -> float:
        """Cores kept busy. Far below the threads in use: something else ran, distrust the wall time."""
        return sum(self.cpu_s) / sum(self.wall_s)


def sample(fn: Callable[[], Any], *, warmup: int = 1, repeats: int = 7) -> Timing:
    """Time ``fn``, waiting each time until the arrays it returns are computed.

    Args:
      fn: a function of nothing; returns arrays, a tree of them, or nothing.
      warmup: calls before the first sample, for compiling and for caches.
      repeats: samples, at least 1.

    Example:
      >>> len(sample(lambda: sum(range(1000)), repeats=3).wall_s)
      3
    """
    import jax

    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {repeats}")
    for _ in range(warmup):
        jax.block_until_ready(fn())
    before = load_average()
    wall_s, cpu_s = [], []
    for _ in range(repeats):
        wall_start, cpu_start = time.perf_counter(), time.process_time()
        jax.block_until_ready(fn())
        wall_s.append(time.perf_counter() - wall_start)
        cpu_s.append(time.process_time() - cpu_start)
    return Timing(
        wall_s=tuple(wall_s),
        cpu_s=tuple(cpu_s),
        load_average_before=before,
        load_average_after=load_average(),
    )


def joined(timings: Sequence[Timing]) -> Timing:
    """The samples of several timings in a row as one."""
    return Timing(
        wall_s=tuple(s for timing in timings for s in timing.wall_s),
        cpu_s=tuple(s for timing in timings for s in timing.cpu_s),
        load_average_before=timings[0].load_average_before,
        load_average_after=timings[-1].load_average_after,
    )


def load_average() -> tuple[float, float, float] | None:
    """Runnable processes of the machine, averaged over 1, 5 and 15 minutes; ``None`` where there is no such thing."""
    return os.getloadavg() if hasattr(os, "getloadavg") else None


def parse_start_ticks(stat: str) -> int:
    """Start of a process after boot, clock ticks: field 22 of ``/proc/<pid>/stat``.

    The name in field 2 may hold spaces and parentheses, so fields are counted after its last one.

    >>> parse_start_ticks("7 (a) b)) S " + " ".join(str(n) for n in range(4, 30)))
    22
    """
    return int(stat.rpartition(")")[2].split()[19])


def process_age_s() -> float:
    """Seconds since this process was started by the system, to 0.01 s.

    Where the system does not tell (anything but Linux), since this module was imported.
    """
    try:
        start_s = parse_start_ticks(Path("/proc/self/stat").read_text()) / os.sysconf("SC_CLK_TCK")
        return time.clock_gettime(time.CLOCK_BOOTTIME) - start_s
    except (OSError, AttributeError):
        return time.monotonic() - _IMPORTED_S
