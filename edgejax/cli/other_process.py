"""Commands of edgejax in processes of their own, for a program that has not imported JAX and does not want to."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgejax.core.cache import cache_dir
from edgejax.core.errors import ConfigError
from edgejax.core.units import format_bytes

_SPARE = 0.98  # of a limit: a process takes some megabytes between two looks at it
_WORK = {"finetune": "compiling", "pack": "packing", "doctor": "the check"}
_NOT_OF_A_DRY_RUN = ("out", "resume", "overwrite", "json", "quiet", "dry_run", "memory")


class TooLarge(ConfigError):
    """A process was ended because it reached its limit."""


def dry_run_of(
    options: Mapping[str, Any],
    limit_bytes: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> tuple[dict[str, Any], bool]:
    """The footprint of a run (JSON), and whether its programs were kept, from ``edgejax finetune --dry-run``.

    Args:
      options: of ``edgejax finetune``; those that are missing are its defaults.
      limit_bytes, environment: see ``run_edgejax``.

    Raises:
      TooLarge: it reached the limit.
      ConfigError: it ended with an error, which this one says.
    """
    about = {name: value for name, value in options.items() if name not in _NOT_OF_A_DRY_RUN}
    said = run_edgejax(
        ["finetune", *words_of(about), "--dry-run", "--json", "--quiet"], limit_bytes, environment
    )
    answer = json.loads(said.strip().splitlines()[-1])
    return answer["footprint"], answer["keeps_programs"]


def packed_file(model: str, base: str, limit_bytes: int | None = None) -> tuple[str, bool]:
    """The packed file of a model in the cache, and whether it was made now (``edgejax pack``); a packed file is its own.

    Raises:
      TooLarge: packing it reached the limit.
      ConfigError: it cannot be packed.
    """
    if model.endswith(".ejx"):
        return model, False
    path = Path(model).expanduser()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path] * path.is_file()
    identity = [str(path.absolute()) if files else model, base]
    identity += [f"{file} {file.stat().st_size} {file.stat().st_mtime_ns}" for file in files]
    name = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:16]
    packed = cache_dir() / "packed" / f"{path.stem}-{name}.ejx"
    is_new = not packed.exists()
    if is_new:
        packed.parent.mkdir(parents=True, exist_ok=True)
        run_edgejax(["pack", *words_of({"model": model, "base": base, "out": packed})], limit_bytes)
    return str(packed), is_new


def words_of(options: Mapping[str, Any]) -> list[str]:
    """Arguments of ``edgejax finetune`` from options by their names; those that are None or False are left out.

    >>> words_of({"data": ["a.txt", "b.txt"], "prompt": "-x", "clip": None, "quiet": False, "rslora": True})
    ['--data', 'a.txt', 'b.txt', '--prompt=-x', '--clip', 'none', '--rslora']
    """
    words: list[str] = []
    for name, value in options.items():
        flag = "--" + name.replace("_", "-")
        if name == "clip" and value is None:
            words += [flag, "none"]
        elif value is None or value is False:
            continue
        elif value is True:
            words += [flag]
        elif name == "optimizer_option":
            words += [word for key, item in value for word in (flag, f"{key}={json.dumps(item)}")]
        elif name == "targets":
            words += [flag, ",".join(value)]
        elif isinstance(value, list):
            words += [flag, *(f"./{item}" if item.startswith("-") else item for item in value)]
        else:
            text = str(value)
            words += [f"{flag}={text}"] if text.startswith("-") or not text else [flag, text]
    return words


def run_edgejax(
    words: Sequence[str], limit_bytes: int | None = None, environment: Mapping[str, str] | None = None
) -> str:
    """What ``edgejax`` prints in a process of its own.

    Args:
      words: its arguments.
      limit_bytes: it is ended when it has almost as much (looked at every 5 ms; Linux).
      environment: variables that it has beside, or instead of, this process's.

    Raises:
      TooLarge: it was ended.
      ConfigError: it failed.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as complaints, tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            [sys.executable, "-m", "edgejax", *words],
            stdout=said,
            stderr=complaints,
            env=os.environ | dict(environment or {}),
        )
        try:
            while process.poll() is None:
                if limit_bytes is not None and _resident_bytes(process.pid) > _SPARE * limit_bytes:
                    raise TooLarge(f"{_WORK[words[0]]} takes more than {format_bytes(limit_bytes)}")
                time.sleep(0.005)
        finally:
            process.kill()
            process.wait()
        if process.returncode == 0:
            said.seek(0)
            return said.read()
        complaints.seek(0)
        last = [line for line in complaints.read().splitlines() if line.strip()][-1:]
    if process.returncode < 0:
        last = [f"it was ended by {signal.Signals(-process.returncode).name}", *last]
    raise ConfigError(
        " ".join(last).removeprefix(f"edgejax {words[0]}: ") or f"exit code {process.returncode}"
    )


def _resident_bytes(process_id: int) -> int:
    try:
        pages = int(Path(f"/proc/{process_id}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):  # it has ended, or this is no Linux
        return 0
