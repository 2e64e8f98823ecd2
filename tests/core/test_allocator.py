"""What is freed goes back to the system, or stays, as it was asked for; large blocks get huge pages."""

import os
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


CODE = """
import edgejax, jax, jax.numpy as jnp
from edgejax.core.allocator import release_library_code
from edgejax.measure.memory import process_memory
double = jax.jit(lambda x: x @ x)
first = double(jnp.ones((64, 64)))
before = process_memory().file_bytes
assert release_library_code() > 0
print(before - process_memory().file_bytes)
assert (double(jnp.ones((64, 64))) == first).all()  # what ran still runs
assert jax.jit(lambda x: x * 3)(2.0) == 6.0  # and so does the compiler
"""


def printed_by(program: str, *arguments: str, environment=None) -> int:
    """The number that a process of its own prints."""
    command = [sys.executable, "-c", program, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


@pytest.mark.quick
@pytest.mark.skipif(allocator._c_function("malloc_trim") is None, reason="needs glibc")
def test_freed_pieces_are_returned():
    assert printed_by(PROGRAM) > 80 * MIB


@pytest.mark.quick
def test_does_nothing_without_glibc(monkeypatch):
    monkeypatch.setattr(allocator, "_c_function", lambda name: None)
    assert allocator.release_freed_memory() is False
    assert allocator.return_large_blocks_at_once() is False
    assert allocator.keep_scratch() is False


BLOCK_PROGRAM = """
import ctypes, sys
from edgejax.core.allocator import return_large_blocks_at_once
from edgejax.measure.memory import process_memory
if sys.argv[1] == "set":
    assert return_large_blocks_at_once()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
libc.free(libc.malloc(30 << 20))  # by default this raises the threshold to 30 MiB
blocks = [libc.malloc(8 << 20) for _ in range(8)]
for block in blocks:
    ctypes.memset(block, 1, 8 << 20)
before = process_memory().anonymous_bytes
for block in blocks[:-1]:  # the last keeps the top of the heap in use
    libc.free(block)
print(before - process_memory().anonymous_bytes)
"""


@pytest.mark.quick
@pytest.mark.skipif(allocator._c_function("mallopt") is None, reason="needs glibc")
def test_large_blocks_are_returned_when_they_are_freed():
    assert printed_by(BLOCK_PROGRAM, "set") > 50 * MIB
    assert printed_by(BLOCK_PROGRAM, "unset") < 10 * MIB


SCRATCH_PROGRAM = """
import ctypes, resource, sys
from edgejax.core.allocator import keep_scratch, return_large_blocks_at_once
assert return_large_blocks_at_once()
if sys.argv[1] == "keep":
    assert keep_scratch()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    block = libc.malloc(3 << 19)
    ctypes.memset(block, 1, 3 << 19)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.quick
@pytest.mark.skipif(allocator._c_function("mallopt") is None, reason="needs glibc")
def test_scratch_is_paged_in_once_when_it_is_kept():
    assert printed_by(SCRATCH_PROGRAM, "keep") < 2 * 384  # 1.5 MiB are 384 pages
    assert printed_by(SCRATCH_PROGRAM, "return") > 15 * 384


@pytest.mark.quick
def test_huge_pages_are_asked_for_where_that_changes_something(monkeypatch, tmp_path):
    setting = tmp_path / "enabled"
    monkeypatch.setattr(allocator, "_HUGE_PAGES_SETTING", setting)
    monkeypatch.setattr(allocator, "_glibc_version", lambda: (2, 36))
    asked = allocator.huge_pages_environment
    assert asked({}) is None  # the system has no such setting
    setting.write_text("always [madvise] never\n")
    assert asked({"HOME": "/"}) == {"HOME": "/", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    both = asked({"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"})
    assert both == {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1"}
    assert asked(both) is None
    for value in ("[always] madvise never", "always madvise [never]"):
        setting.write_text(value)
        assert asked({}) is None
    setting.write_text("always [madvise] never")
    monkeypatch.setattr(allocator, "_glibc_version", lambda: ())
    assert asked({}) is None


HUGE_PROGRAM = """
import ctypes, resource
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
block = libc.malloc(64 << 20)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
ctypes.memset(block, 1, 64 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.quick
@pytest.mark.skipif(
    allocator.huge_pages_environment({}) is None, reason="huge pages cannot be asked for here"
)
def test_large_blocks_get_huge_pages():
    plain = dict(os.environ, GLIBC_TUNABLES="glibc.malloc.hugetlb=0")
    asked = allocator.huge_pages_environment({**plain, "GLIBC_TUNABLES": ""})
    assert printed_by(HUGE_PROGRAM, environment=plain) > 16_000  # 64 MiB in pages of 4 KiB
    assert printed_by(HUGE_PROGRAM, environment=asked) < 2_000


@pytest.mark.quick
@pytest.mark.skipif(allocator._c_function("madvise") is None, reason="needs Linux")
def test_code_of_libraries_is_given_back_and_still_runs():
    assert printed_by(CODE) > 20 * MIB


@pytest.mark.quick
def test_nothing_is_given_back_where_the_system_does_not_tell(monkeypatch, tmp_path):
    monkeypatch.setattr(allocator, "_MAPS", tmp_path / "none")
    assert allocator.release_library_code() == 0


@pytest.mark.quick
def test_only_code_that_cannot_be_written_is_given_back():
    lines = [
        "1000-2000 r-xp 00000000 08:01 7    /lib/a b.so", "2000-3000 rwxp 00000000 08:01 7    /lib/a b.so",
        "3000-4000 r--p 00000000 08:01 7    /lib/a b.so", "4000-5000 r-xp 00000000 00:00 0", "5000-6000 r-xs 0 08:01 7 /lib/c.so",
        "6000-7000 r-xp 00000000 00:00 0    [vdso]",
    ]  # fmt: skip
    assert allocator.code_mappings("\n".join(lines)) == [(0x1000, 0x2000)]  # relocated data would be lost
