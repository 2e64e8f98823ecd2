"""New files and folders that are there whole or not at all.

What is written goes to a hidden neighbour of the wanted path, is flushed to the disk, and takes the wanted name by
a rename, which POSIX makes atomic inside one file system. When anything fails on the way (no space left, Ctrl-C, a
bug) the neighbour is removed and what was there before stays.
"""

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgejax.core.errors import RunError


@contextlib.contextmanager
def new_file(out: str | os.PathLike, *, overwrite: bool = False) -> Iterator[Path]:
    """A path to write to; it becomes ``out`` when the ``with`` block ends without an exception.

    Args:
      out: the file wanted; missing parent folders are made.
      overwrite: replace a file that is there.

    Raises:
      RunError: ``out`` exists and ``overwrite`` is False, ``out`` is a folder, the folder cannot be written, or the
        disk is full. Nothing is left of the attempt.

    Example:
      >>> import tempfile
      >>> folder = tempfile.mkdtemp()
      >>> with new_file(f"{folder}/a.txt") as path:
      ...     _ = path.write_text("whole")
      >>> os.listdir(folder)
      ['a.txt']
    """
    target = Path(out)
    if target.is_dir():
        raise RunError(f"{target} is a folder; give the name of a file to write")
    if target.exists() and not overwrite:
        raise RunError(
            f"{target} exists and is not overwritten without being asked; choose another name or overwrite it (--overwrite)"
        )
    with _as_run_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent)
        os.close(handle)
        part = Path(name)
        try:
            yield part
            _flush(part)
            part.chmod(0o666 & ~_umask())  # mkstemp makes it private
            os.replace(part, target)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        _flush(target.parent)


@contextlib.contextmanager
def new_folder(out: str | os.PathLike, *, marker: str, overwrite: bool = False) -> Iterator[Path]:
    """A folder to fill; it becomes ``out`` when the ``with`` block ends without an exception.

    Args:
      out: the folder wanted. One that is there and empty is used.
      marker: a file that every folder of this kind has. A folder without it is never replaced, whatever ``overwrite``
        says, so that a mistyped path costs nobody their files.
      overwrite: replace a folder of the same kind.

    Raises:
      RunError: as ``new_file``; also when ``out`` holds files and no ``marker``.
    """
    target = Path(out).resolve()
    if target.exists() and not target.is_dir():
        raise RunError(f"{target} is a file; give the name of a folder to write")
    if target.is_dir() and any(target.iterdir()):
        if not overwrite:
            raise RunError(
                f"{target} exists and is not overwritten without being asked; choose another name or overwrite it (--overwrite)"
            )
        if not (target / marker).is_file():
            raise RunError(
                f"{target} holds files and no {marker}: it is not a folder of this kind, so it is not replaced; "
                "choose another name"
            )
    with _as_run_error(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".part", dir=target.parent))
        try:
            yield part
            for path in part.rglob("*"):
                _flush(path)
            part.chmod(0o777 & ~_umask())
            _swap(part, target)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
        _flush(target.parent)


def _swap(part: Path, target: Path) -> None:
    """Give ``part`` the name ``target``; what had it goes away only afterwards."""
    if not target.exists():
        part.rename(target)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".old", dir=target.parent))
    target.rename(old / "replaced")
    try:
        part.rename(target)
    except BaseException:
        (old / "replaced").rename(target)
        old.rmdir()
        raise
    shutil.rmtree(old)


@contextlib.contextmanager
def _as_run_error(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunError(
                f"no space left while writing {target}; nothing was kept of it. Free some space or write elsewhere"
            ) from error
        where = f" ({error.filename})" if error.filename else ""
        raise RunError(
            f"cannot write {target}: {error.strerror or error}{where}; nothing was kept of it. Choose a place that can "
            "be written"
        ) from error


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
