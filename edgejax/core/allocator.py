"""How the C library takes memory from the system, and gives it back."""

import ctypes
import functools
import os
import sys
from collections.abc import Mapping
from pathlib import Path

_MIB = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_... of malloc.h
_BLOCK_BYTES = 2 * _MIB  # while training, blocks from this size on go back when they are freed
_KEPT_BYTES = 8 * _MIB  # and free memory beyond this at the top of the heap
_HUGE_PAGES = "glibc.malloc.hugetlb"  # of GLIBC_TUNABLES, since glibc 2.35
_HUGE_PAGES_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_MAPS = Path("/proc/self/maps")
_DONT_NEED = 4  # MADV_DONTNEED: of a private mapping of a file, what was not written to is read from it again
_returns_at_once = False  # by a call of this process; a library must not set what a program did not ask for


def release_freed_memory() -> bool:
    """Return what was freed to the system; worth doing once after compiling, and after loading.

    XLA's compiler frees some hundred megabytes in small pieces, and glibc keeps them for later. Training never
    needs them again, so without this they stay resident beside the weights (measured for a SmolLM2-135M step:
    270 MB). Takes some milliseconds. Nothing happens where the C library is not glibc.

    Returns:
      Whether the C library could be asked.

    Example:
      >>> release_freed_memory() in (True, False)
      True
    """
    trim = _c_function("malloc_trim")
    if trim is None:
        return False
    trim(0)
    return True


def release_library_code() -> int:
    """Give the resident pages of libraries' code back to the system; worth doing once after compiling.

    XLA's compiler and LLVM are most of them, and a compiled program needs little of the rest. The pages stay in the file
    cache, and one that is run again is mapped again (measured: the peaks of the 30 runs of experiments/memory_forecast are 26 to
    78 MB lower, the median 55; a streamed one is as fast as before). Code is mapped read-only and comes back as
    the file has it; what a debugger has written over it would be lost.

    Returns:
      Bytes of address space that were given back; 0 where the system does not tell.

    Example:
      >>> release_library_code() >= 0
      True
    """
    advise = _c_function("madvise")
    if advise is None:
        return 0
    try:
        maps = _MAPS.read_text(errors="replace")
    except OSError:  # /proc is not there, or no more files can be opened
        return 0
    released = 0
    for start, stop in code_mappings(maps):
        address, length = ctypes.c_void_p(start), ctypes.c_size_t(stop - start)
        released += stop - start if advise(address, length, _DONT_NEED) == 0 else 0
    return released


def code_mappings(text: str) -> list[tuple[int, int]]:
    """Addresses of code that is mapped from files and cannot be written, from the text of ``/proc/self/maps``.

    >>> code_mappings("1000-3000 r-xp 0 8:1 7 /lib/a.so\\n3000-4000 r--p 0 8:1 7 /lib/a.so\\n5000-6000 r-xp 0 0:0 0 [vdso]\\n")
    [(4096, 12288)]
    """
    found = []
    for line in text.splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[1] == "r-xp" and fields[5].startswith("/"):
            start, stop = (int(address, 16) for address in fields[0].split("-"))
            found.append((start, stop))
    return found


def return_large_blocks_at_once() -> bool:
    """From now on, give blocks of a MiB and more back to the system the moment they are freed; for whole programs.

    By default glibc raises its threshold to the largest block it has seen freed, up to 32 MiB, and each thread keeps
    a heap of its own, so the scratch of matrix products and of the compiler stays resident (measured for a
    SmolLM2-135M LoRA step from a warm compile cache: peak 503 MB instead of 607). Called before threads are started;
    ``keep_scratch`` ends it when training starts.

    Returns:
      Whether the C library took the settings.

    Example:
      >>> return_large_blocks_at_once() in (True, False)
      True
    """
    global _returns_at_once
    _returns_at_once = _set_options({_TRIM_THRESHOLD: _MIB, _MMAP_THRESHOLD: _MIB, _ARENA_MAX: 1})
    return _returns_at_once


def keep_scratch() -> bool:
    """After ``return_large_blocks_at_once``, keep smaller blocks and some MiB of free memory; for the steps themselves.

    A step frees and takes the scratch of its matrix products hundreds of times. Given back each time, it is paged in
    each time (measured for a SmolLM2-135M LoRA step at T = 512 without remat, in pages of 4 KiB: 121 thousand page
    faults a step with this, 151 to 241 thousand without; 0.37 against 0.5 to 0.9 s of system time in 6). Nothing
    happens where the other was not called.

    Returns:
      Whether settings were changed.

    Example:
      >>> keep_scratch() in (True, False)
      True
    """
    global _returns_at_once
    if not _returns_at_once:
        return False
    _returns_at_once = False
    return _set_options({_TRIM_THRESHOLD: _KEPT_BYTES, _MMAP_THRESHOLD: _BLOCK_BYTES})


def huge_pages_environment(environment: Mapping[str, str]) -> dict[str, str] | None:
    """An environment for a new process, in which glibc asks for huge pages for large blocks.

    XLA takes the temporary memory of a step in one block and gives it back at its end. In pages of 4 KiB that is a
    page fault for each of them (measured for a SmolLM2-135M LoRA step without remat: 121 thousand a step against 11
    thousand, 0.37 against 0.21 s of system time in 6). glibc reads this setting once, when a process starts (GNU C
    library manual, "Memory Allocation Tunables").

    Returns:
      ``environment`` with the setting added; None where it would change nothing (not Linux, another or an older C
      library, huge pages always or never given by the system) and where ``GLIBC_TUNABLES`` has it already.

    Example:
      >>> huge_pages_environment({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}) is None
      True
    """
    tunables = environment.get("GLIBC_TUNABLES", "")
    if _HUGE_PAGES in tunables or _glibc_version() < (2, 35):
        return None
    try:
        if "[madvise]" not in _HUGE_PAGES_SETTING.read_text():
            return None
    except OSError:
        return None
    return {**environment, "GLIBC_TUNABLES": ":".join(filter(None, [tunables, f"{_HUGE_PAGES}=1"]))}


def _glibc_version() -> tuple[int, ...]:
    """``(2, 36)``; empty where the C library is another."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
        return tuple(int(part) for part in version.split(".")) if name == "glibc" else ()
    except (AttributeError, ValueError, OSError):
        return ()


def _set_options(values: dict[int, int]) -> bool:
    mallopt = _c_function("mallopt")
    if mallopt is None:
        return False
    return all([mallopt(option, value) for option, value in values.items()])


@functools.cache
def _c_function(name: str):
    if not sys.platform.startswith("linux"):
        return None
    try:
        return getattr(ctypes.CDLL(None), name)
    except (OSError, AttributeError):  # musl, bionic
        return None
