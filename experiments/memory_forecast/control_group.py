"""A limit on memory that the kernel enforces: a control group of its own (Linux, version 1 or 2, where it may be made)."""

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from edgejax.core.host import parse_cgroups

BASE = Path("/sys/fs/cgroup")


@contextlib.contextmanager
def control_group(limit_bytes: int | None) -> Iterator[Callable[[], None]]:
    """Yields what a new process calls to enter a group that has so many bytes; None: no group.

    Raises:
      OSError: this system lets nobody make one here.
    """
    if limit_bytes is None:
        yield lambda: None
        return
    groups = parse_cgroups(Path("/proc/self/cgroup").read_text())
    first = "memory" in groups
    parent = BASE / "memory" / groups["memory"].lstrip("/") if first else BASE / groups[""].lstrip("/")
    folder = parent / f"edgejax-{os.getpid()}"
    folder.mkdir()
    try:
        (folder / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(limit_bytes))
        yield lambda: (folder / "cgroup.procs").write_text(str(os.getpid()))  # type: ignore[func-returns-value]
    finally:
        folder.rmdir()
