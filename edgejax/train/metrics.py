"""``metrics.jsonl``: one JSON object a line, appended and flushed, cut back to the restored step on resume."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgejax.core.errors import RunError


class MetricsLog:
    """Appends records to ``path``. Every record has ``kind`` (``"train"`` or ``"eval"``) and ``step``.

    Args:
      path: the file, made if it is not there.
      keep_to_step: records of later steps are removed, and so is a last line that a crash left unfinished;
        None keeps every whole line.

    Raises:
      RunError: the file cannot be written (on opening and on every append).

    Example:
      >>> import tempfile
      >>> with MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl") as log:
      ...     log.append("train", step=1, loss=2.5)
      >>> [record["loss"] for record in read_metrics(log.path)]
      [2.5]
    """

    def __init__(self, path: Path, *, keep_to_step: int | None = None) -> None:
        self.path = path
        self.evaluations: dict[int, dict[str, Any]] = {}  # records of kind "eval" by their step
        try:
            if path.exists():
                _keep(path, keep_to_step)
                self.evaluations = {r["step"]: r for r in read_metrics(path) if r["kind"] == "eval"}
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  # closed by close() and the context
        except OSError as error:
            raise RunError(_cannot_write(path, error)) from error

    def append(self, kind: str, *, step: int, **values: Any) -> None:
        """Writes one record and flushes it to the operating system."""
        record = {"kind": kind, "step": step, **values}
        line = json.dumps(record, allow_nan=False)
        try:
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error
        if kind == "eval":
            self.evaluations[step] = record

    def sync(self) -> None:
        """Waits until the records are on the disk; called before a checkpoint that relies on them."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error

    def close(self) -> None:
        """Closes the file; a full disk has already been reported by ``append``."""
        try:
            self._file.close()
        except OSError as error:
            raise RunError(_cannot_write(self.path, error)) from error

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All whole records of a ``metrics.jsonl``; a last line without its newline (a crash) is left out."""
    return [json.loads(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> Iterator[str]:
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith("\n"):
                return
            try:
                json.loads(line)
            except ValueError as error:
                raise RunError(
                    f"{path} line {number} is not JSON: {error}. Repair or remove that line."
                ) from error
            yield line


def _keep(path: Path, keep_to_step: int | None) -> None:
    kept = [
        line
        for line in _whole_lines(path)
        if keep_to_step is None or json.loads(line)["step"] <= keep_to_step
    ]
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"cannot write {path}: {error.strerror or error}. Free space or choose another folder, then resume."
    )
