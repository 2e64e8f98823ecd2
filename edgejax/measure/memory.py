"""Memory, counted: what the operating system gave, what XLA planned, what each tree really holds."""

import dataclasses
import re
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from edgejax.core.arrays import PyTree

_STATUS = Path("/proc/self/status")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Resident memory of this process. ``None``: this system does not tell (anything but Linux)."""

    rss_bytes: int | None  # VmRSS, now
    peak_rss_bytes: int  # VmHWM, the most there ever was
    anonymous_bytes: int | None  # RssAnon: heap, arrays, compiled code
    file_bytes: int | None  # RssFile: libraries and mapped weight files, which the system may drop


def parse_status(text: str) -> ProcessMemory:
    """Read the text of ``/proc/<pid>/status``.

    >>> parse_status("VmHWM:\\t 300 kB\\nVmRSS:\\t 200 kB\\nRssAnon:\\t 120 kB\\nRssFile:\\t 80 kB\\n").rss_bytes
    204800
    """
    fields = {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}
    return ProcessMemory(
        rss_bytes=fields.get("VmRSS"),
        peak_rss_bytes=fields["VmHWM"],
        anonymous_bytes=fields.get("RssAnon"),
        file_bytes=fields.get("RssFile"),
    )


def process_memory() -> ProcessMemory:
    """Resident memory of this process: from ``/proc`` on Linux, else only the peak, from ``getrusage``."""
    try:
        return parse_status(_STATUS.read_text())
    except (OSError, KeyError):
        return ProcessMemory(
            rss_bytes=None, peak_rss_bytes=_rusage_peak_bytes(), anonymous_bytes=None, file_bytes=None
        )


class AnonymousPeak:
    """Watches anonymous resident memory from a thread; the kernel keeps no peak of it.

    What lives shorter than ``interval_s`` can be missed. Usable as a context manager.

    Example:
      >>> with AnonymousPeak() as watch:
      ...     block = bytearray(1 << 20)
      >>> watch.peak_bytes is None or watch.peak_bytes > 0
      True
    """

    def __init__(self, interval_s: float = 0.01):
        self.interval_s = interval_s
        self.peak_bytes: int | None = None  # of the samples so far; None where the system does not tell
        self.n_samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="anonymous-peak", daemon=True)

    def __enter__(self) -> "AnonymousPeak":
        self._sample()
        self._thread.start()
        return self

    def __exit__(self, *exc_info: Any) -> None:
        self._stop.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._stop.wait(self.interval_s):
            self._sample()

    def _sample(self) -> None:
        value = process_memory().anonymous_bytes
        if value is not None:
            self.peak_bytes = max(value, self.peak_bytes or 0)
            self.n_samples += 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class XlaMemory:
    """XLA's buffer assignment of one compiled program. It does not see library scratch, the runtime or LLVM."""

    argument_bytes: int
    output_bytes: int
    alias_bytes: int  # outputs that live in donated arguments
    temp_bytes: int
    generated_code_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Arguments + outputs - alias + temp. XLA's own peak figure can miss the body of a scan."""
        return self.argument_bytes + self.output_bytes - self.alias_bytes + self.temp_bytes


def xla_memory(compiled: Any) -> XlaMemory:
    """XLA's figures of a compiled function.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> program = jax.jit(lambda x: x + 1).lower(jnp.zeros((8, 4))).compile()
      >>> xla_memory(program).argument_bytes
      128
    """
    analysis = compiled.memory_analysis()
    return XlaMemory(
        argument_bytes=int(analysis.argument_size_in_bytes),
        output_bytes=int(analysis.output_size_in_bytes),
        alias_bytes=int(analysis.alias_size_in_bytes),
        temp_bytes=int(analysis.temp_size_in_bytes),
        generated_code_bytes=int(analysis.generated_code_size_in_bytes),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceMemory:
    """Memory of an accelerator, as its allocator counts it."""

    limit_bytes: int  # that it may take
    peak_bytes: int  # the most that was in use since the process began


def device_memory(device: Any) -> DeviceMemory | None:
    """What ``memory_stats`` of a JAX device says; None where it says nothing, as of a CPU.

    >>> device_memory(jax.devices("cpu")[0]) is None
    True
    """
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats or "peak_bytes_in_use" not in stats:
        return None
    return DeviceMemory(limit_bytes=stats["bytes_limit"], peak_bytes=stats["peak_bytes_in_use"])


def device_peak_bytes() -> int | None:
    """Of this process's devices, the most that one had in use; None where they do not say."""
    found = [memory.peak_bytes for memory in map(device_memory, jax.local_devices()) if memory is not None]
    return max(found, default=None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PhaseMemory:
    """This process when a phase of a run ended."""

    name: str
    rss_bytes: int | None
    peak_rss_bytes: int  # since the process began


def phase_memory(name: str) -> PhaseMemory:
    """The phase of that name ends now."""
    now = process_memory()
    return PhaseMemory(name=name, rss_bytes=now.rss_bytes, peak_rss_bytes=now.peak_rss_bytes)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryReport:
    """Where a training process's memory went."""

    weights_bytes: int  # frozen base, or nothing when all of it trains and is counted in `trainable`
    trainable_bytes: int  # adapters, or all weights in full-parameter training
    optimizer_bytes: int
    activations_bytes: int | None  # XLA temp of the step: activations, gradients, scratch; None: not compiled
    runtime_bytes: int | None  # resident after imports, before the model: Python, JAX, libraries
    peak_rss_bytes: int
    phases: "tuple[PhaseMemory, ...]" = ()  # in their order
    step_peak_bytes: int | None = (
        None  # XLA's, of all arguments, results and temp of the step; None: not compiled
    )
    device_peak_bytes: int | None = None  # in use on an accelerator, which is to be compared with the step's

    def by_source(self) -> dict[str, int]:
        """Bytes by source, for tables and charts; sources of nothing are left out."""
        named = {
            "weights": self.weights_bytes,
            "adapters": self.trainable_bytes,
            "optimizer": self.optimizer_bytes,
            "activations": self.activations_bytes,
            "runtime": self.runtime_bytes,
        }
        return {name: size for name, size in named.items() if size}


def memory_report(
    *,
    frozen: PyTree,
    trainable: PyTree,
    opt_state: PyTree,
    compiled: Any | None = None,
    runtime_bytes: int | None = None,
    phases: Sequence[PhaseMemory] = (),
) -> MemoryReport:
    """Count the trees as they are stored, and put them beside XLA's and the system's figures.

    Args:
      frozen: weights that do not train.
      trainable: what does.
      opt_state: the optimizer's state.
      compiled: the compiled step, for its temporary memory.
      runtime_bytes: ``process_memory().rss_bytes`` as it was before the model was loaded.
      phases: of the run, in their order.
    """
    xla = None if compiled is None else xla_memory(compiled)
    return MemoryReport(
        weights_bytes=held_bytes(frozen),
        trainable_bytes=held_bytes(trainable),
        optimizer_bytes=held_bytes(opt_state),
        activations_bytes=None if xla is None else xla.temp_bytes,
        runtime_bytes=runtime_bytes,
        peak_rss_bytes=process_memory().peak_rss_bytes,
        phases=tuple(phases),
        step_peak_bytes=None if xla is None else xla.peak_bytes,
        device_peak_bytes=device_peak_bytes(),
    )


def held_bytes(tree: PyTree) -> int:
    """Bytes that this process's devices hold of a tree's arrays: a part of those that are split over a mesh.

    Example:
      >>> import jax.numpy as jnp
      >>> held_bytes({"w": jnp.zeros((2, 3))})
      24
    """
    return sum(
        sum(shard.data.nbytes for shard in leaf.addressable_shards)
        if isinstance(leaf, jax.Array)
        else leaf.nbytes
        for leaf in jax.tree.leaves(tree)
    )


def _rusage_peak_bytes() -> int:
    import resource  # not on Windows, which JAX's CPU wheels for training do not target

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
