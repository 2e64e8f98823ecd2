"""The folder of a run: never overwritten without being asked, resumed only as the run it is.

config.json     what was asked for, and the hashes of the model and the data
metrics.jsonl   one line a logged step or evaluation
checkpoints/    what trains, by step
result.json     the figures at the end
"""

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from edgejax.core.errors import ConfigError, RunError

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two processes in one run folder go unnoticed
    fcntl = None  # type: ignore[assignment]

_MARK = "edgejax_run"  # the key of config.json that makes a folder ours
_LOCK = ".lock"
_SCRATCH = (_LOCK, "config.json.tmp", ".write-probe")


class RunFolder:
    """A run's folder, held by this process until the context ends.

    Opening it looks and locks; ``begin`` writes and removes, so a run that is refused in between leaves things as they
    were.

    Args:
      path: the folder.
      config: what ``begin`` writes as ``config.json`` of a new run.
      resume: go on with the run that is there.
      overwrite: let ``begin`` remove the run that is there; only ever removes what a run's folder held when it was
        opened.

    Raises:
      ConfigError: both ``resume`` and ``overwrite``.
      RunError: the folder is not empty and neither was asked; it is no run's; another process holds it; nothing is
        there to resume; it cannot be written.

    Example:
      >>> import tempfile
      >>> with RunFolder(Path(tempfile.mkdtemp()) / "run", config={"steps": 3}) as folder:
      ...     folder.begin()
      ...     sorted(read_config(folder.path))
      ['edgejax_run', 'steps']
    """

    def __init__(
        self, path: str | Path, *, config: dict[str, Any], resume: bool = False, overwrite: bool = False
    ) -> None:
        if resume and overwrite:
            raise ConfigError("resume and overwrite exclude each other: choose to go on, or to start anew")
        self.path = Path(path).absolute()
        self.resumed, self._overwrite = resume, overwrite
        self._lock: IO[str] | None = None
        self._made = not self.path.exists()
        self._replaced: list[str] = []  # what begin() removes: of a run, and there when it was claimed
        try:
            self._claim()
            self.config = read_config(self.path) if resume else {_MARK: 1, **config}
        except OSError as error:
            self.close()
            raise RunError(_cannot_use(self.path, error)) from error
        except BaseException:
            self.close()
            raise

    def begin(self) -> None:
        """Makes a new run of it: what was there goes, ``config.json`` comes. Nothing happens where one is resumed.

        Raises:
          RunError: it cannot be written.
        """
        self._made = False
        if self.resumed:
            return
        try:
            for name in self._replaced:
                entry = self.path / name
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
            write_json(self.path / "config.json", self.config)
        except OSError as error:
            raise RunError(_cannot_use(self.path, error)) from error

    @property
    def metrics_path(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints_path(self) -> Path:
        return self.path / "checkpoints"

    def close(self) -> None:
        """Lets another process use the folder; one that was made for a run that never began is removed."""
        if self._lock is not None:
            if self._made:
                with contextlib.suppress(OSError):
                    (self.path / _LOCK).unlink()
                    self.path.rmdir()
            self._lock.close()
            self._lock = None

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _claim(self) -> None:
        path, resume, overwrite = self.path, self.resumed, self._overwrite
        try:
            str(path).encode()
        except UnicodeEncodeError:
            raise RunError(
                f"{str(path)!r} is not UTF-8, as checkpoints need it; choose another name"
            ) from None
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is a file; a run needs a folder of its own. Choose another path.")
        used = path.is_dir() and any(entry.name not in _SCRATCH for entry in path.iterdir())
        if resume and not used:
            raise RunError(f"there is no run to resume in {path}; leave out resume to start one there")
        if used and not is_run_folder(path):
            raise RunError(
                f"{path} is not empty and holds no run of edgejax, so it is left as it is. Choose another."
            )
        if used and not resume and not overwrite:
            raise RunError(
                f"{path} already holds a run. Go on with it (--resume), replace it (--overwrite), or choose another "
                "folder."
            )
        path.mkdir(parents=True, exist_ok=True)
        self._lock = _hold(path)
        if not used and (path / "config.json").exists():
            raise RunError(f"another process has just made a run in {path}; choose another folder")
        if overwrite and used:
            self._replaced = [entry.name for entry in path.iterdir() if entry.name != _LOCK]
        _probe(path)


def is_run_folder(path: Path) -> bool:
    """Whether ``path`` holds a ``config.json`` that edgejax wrote."""
    try:
        return _MARK in read_config(path)
    except (RunError, OSError):
        return False


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a run folder.

    Raises:
      RunError: it is missing or not JSON.
    """
    file = Path(path) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(f"{path} is no run folder: it has no config.json. Name the folder of a run.") from None
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}. Start the run again in another folder.") from error
    if not isinstance(config, dict):
        raise RunError(f"{file} is damaged: it holds no JSON object. Start the run again in another folder.")
    return config


def write_json(path: Path, value: Any) -> None:
    """Writes JSON so that after a crash the file is the old or the new one, whole.

    Raises:
      OSError: as the file system gives it.
    """
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1, allow_nan=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _hold(path: Path) -> IO[str]:
    lock = open(path / _LOCK, "w", encoding="utf-8")  # noqa: SIM115  # held for the run, closed by close()
    if fcntl is not None:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            lock.close()
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise RunError(
                    f"another process is training in {path}; wait for it or choose another folder"
                ) from None
            raise
    return lock


def _probe(path: Path) -> None:
    probe = path / ".write-probe"
    try:
        with open(probe, "wb") as file:
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        probe.unlink(missing_ok=True)


def _cannot_use(path: Path, error: OSError) -> str:
    return (
        f"the run folder {path} cannot be written: {error.strerror or error}. Nothing was trained; free space, make it "
        "writable, or choose another folder."
    )
