"""Giving freed memory back to the system."""

import ctypes
import functools
import sys

_MIB = 1 << 20
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # M_... of malloc.h
_SCRATCH_BYTES = 8 * _MIB
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


def return_large_blocks_at_once() -> bool:
    """From now on, give blocks of a MiB and more back to the system the moment they are freed; for whole programs.

    By default glibc raises its threshold to the largest block it has seen freed, up to 32 MiB, and each thread keeps
    a heap of its own, so the scratch of matrix products and of the compiler stays resident (measured for a
    SmolLM2-135M LoRA step from a warm compile cache: peak 503 MB instead of 607). Called before threads are started; ``keep_scratch`` ends it when training starts.

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
    """After ``return_large_blocks_at_once``, keep freed blocks of up to 8 MiB again; for the steps themselves.

    A step frees and takes the scratch of its matrix products hundreds of times. Given back each time, it is paged in
    each time (measured for a SmolLM2-135M LoRA step at T = 512: 99 thousand page faults a step with this, 120 to 240
    thousand without, and 0.3 against up to 0.9 s of system time in 6). Nothing happens where the other was not called.

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
    return _set_options({_TRIM_THRESHOLD: _SCRATCH_BYTES, _MMAP_THRESHOLD: _SCRATCH_BYTES})


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
