"""Freed small pieces go back to the system."""

import subprocess
import sys

import pytest

from edgejax.core import allocator

MIB = 1 << 20
PROGRAM = """
import ctypes
from edgejax.core.allocator import release_freed_memory
from edgejax.measure.memory import process_memory
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
pieces = [libc.malloc(4096) for _ in range(25_000)]
for piece in pieces:
    ctypes.memset(piece, 1, 4096)
guard = libc.malloc(64)  # keeps the top of the heap in use, so that free() cannot shrink it
for piece in pieces:
    libc.free(piece)
before = process_memory().anonymous_bytes
assert release_freed_memory()
print(before - process_memory().anonymous_bytes)
"""


@pytest.mark.quick
@pytest.mark.skipif(allocator._malloc_trim() is None, reason="needs glibc")
def test_freed_pieces_are_returned():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 80 * MIB


@pytest.mark.quick
def test_does_nothing_without_glibc(monkeypatch):
    monkeypatch.setattr(allocator, "_malloc_trim", lambda: None)
    assert allocator.release_freed_memory() is False
