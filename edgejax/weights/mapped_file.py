"""A file that is mapped read-only, read in pieces, and watched for changes while it is in use.

Pages of a mapping are shared with the kernel's cache of the file: they are clean, cost no swap, and can be given back
at any time (``drop``), to be read from the disk again when they are next touched. Until then they count as memory of
this process, which is why everything that need not be mapped (hashing, copying) goes through plain reads.

Whoever shortens a file that is mapped makes the next touch of a lost page end the process (SIGBUS); nothing in user
space can turn that into an exception. ``check_unchanged`` is cheap: call it before each pass over the file.
"""

import contextlib
import hashlib
import math
import mmap
import os
import stat
import weakref
from pathlib import Path

import numpy as np

from edgejax.core.errors import WeightsError

_HASHED_AT_ONCE = 1 << 20  # bytes
# Touching a page also maps its neighbours that are in the kernel's cache, 64 KiB in all (Linux, fault_around_bytes).
_FAULT_AROUND = 1 << 16


class MappedFile:
    """One file, opened once: what is mapped, read and hashed is the same file, whatever its name comes to mean.

    Mapping costs address space, not memory: pages count from when they are touched.

    Raises:
      WeightsError: from the constructor: no file, an empty one, or one that cannot be opened.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise WeightsError(f"{self.path}: not a file; give the path of one")
            self._handle = os.open(path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            self._identity = _identity(os.fstat(self._handle))
            self.n_bytes = self._identity["size in bytes"]
            if not self.n_bytes:
                raise WeightsError(f"{self.path}: the file is empty (0 bytes); make it anew")
            self._map = mmap.mmap(self._handle, self.n_bytes, access=mmap.ACCESS_READ)
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot be opened ({error.strerror}); check the path") from error
        self._name = os.path.abspath(path)  # the same one after a change of folder

    def read(self, start: int, n_bytes: int) -> bytearray:
        """``n_bytes`` from ``start``, copied; nothing stays mapped.

        Raises:
          WeightsError: the file ends before, or cannot be read.
        """
        data = bytearray(n_bytes)
        self.read_into(memoryview(data), start)
        return data

    def read_into(self, out: memoryview, start: int) -> None:
        """Fill ``out`` (bytes) from ``start``; raises as ``read``."""
        done = 0
        try:
            while done < len(out) and (n := os.preadv(self._handle, [out[done:]], start + done)):
                done += n
        except OSError as error:
            raise WeightsError(f"{self.path}: cannot be read ({error.strerror})") from error
        if done < len(out):
            raise WeightsError(
                f"{self.path}: ends {len(out) - done} bytes early; it was shortened while in use: make it anew"
            )

    def view(self, start: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """A read-only array over the mapped bytes, without a copy. The caller has checked that it lies in the file."""
        return np.frombuffer(self._map, dtype, math.prod(shape), start).reshape(shape)

    def sha256(self, start: int, stop: int) -> str:
        """Of the bytes from ``start`` to ``stop``, as hexadecimal text."""
        digest = hashlib.sha256()
        buffer = memoryview(bytearray(min(_HASHED_AT_ONCE, stop - start)))
        while start < stop:
            part = buffer[: stop - start]
            self.read_into(part, start)
            digest.update(part)
            start += len(part)
        return digest.hexdigest()

    def prefetch(self, start: int, stop: int) -> None:
        """Ask the kernel to read these bytes into its cache in the background."""
        self._advise("MADV_WILLNEED", start, stop)

    def drop(self, start: int, stop: int) -> None:
        """Give the pages of these bytes, and what was mapped around them, back; arrays over them stay valid."""
        self._advise("MADV_DONTNEED", start - _FAULT_AROUND, stop + _FAULT_AROUND)

    def _advise(self, advice: str, start: int, stop: int) -> None:
        if not hasattr(mmap, advice):  # on this system
            return
        start = max(0, start) // mmap.PAGESIZE * mmap.PAGESIZE
        with contextlib.suppress(
            OSError
        ):  # a kernel may refuse advice (locked pages, for one); then nothing changes
            self._map.madvise(getattr(mmap, advice), start, min(stop, self.n_bytes) - start)

    def check_unchanged(self) -> None:
        """Raises ``WeightsError`` where the name means another file now, or the file was written to since it was opened."""
        try:
            found = _identity(os.stat(self._name))
        except OSError as error:
            raise WeightsError(
                f"{self.path}: was there when it was opened, and is not any more ({error.strerror}); put it back and "
                "start again"
            ) from error
        changed = [
            f"{what} was {was}, is {found[what]}"
            for what, was in self._identity.items()
            if found[what] != was
        ]
        if changed:
            raise WeightsError(
                f"{self.path}: was replaced or written to while in use ({'; '.join(changed)}); nothing read from it "
                "since can be trusted: leave the file alone and start again"
            )


def _identity(found: os.stat_result) -> dict[str, int]:
    return {
        "device": found.st_dev,
        "inode": found.st_ino,
        "size in bytes": found.st_size,
        "time of change in ns": found.st_mtime_ns,
    }
