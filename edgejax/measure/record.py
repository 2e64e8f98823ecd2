"""The result record: one JSON file a measurement, written once, never changed.

A record holds every raw sample and all that is needed to judge or repeat the number: versions, the state of the
source, the device and its limits, how busy the machine was, seeds, and the hashes of model and data. Numbers carry
their unit in their name (``_bytes``, ``_s``, ``_tokens_per_s``).
"""

import dataclasses
import datetime
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgejax.core.errors import RunError
from edgejax.core.guard import guard_status
from edgejax.core.host import cpu_name, host_limits, package_versions
from edgejax.measure.timing import load_average

FORMAT = "edgejax-result-1"


def make_record(
    kind: str,
    *,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    seeds: Mapping[str, int] | None = None,
    hashes: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """All of a record, ready to be written.

    Args:
      kind: what was measured: ``"bench"``, ``"finetune"``.
      config: every setting.
      results: the numbers, raw samples included.
      seeds: by what they seed.
      hashes: SHA-256 by what was hashed: model file, data.
    """
    return {
        "format": FORMAT,
        "kind": kind,
        "written_at": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": dict(config),
        "results": dict(results),
        "seeds": dict(seeds or {}),
        "hashes": dict(hashes or {}),
        "versions": package_versions(),
        "source": source_state(),
        "device": device_description(),
        "limits": dataclasses.asdict(host_limits()),
        "load_average": load_average(),
        "numerics_guard": dataclasses.asdict(guard_status()),
    }


def write_record(path: str | os.PathLike, record: Mapping[str, Any]) -> Path:
    """Write ``record`` to ``path``, which must not exist; no half-written file is ever seen there.

    Raises:
      RunError: the file exists, cannot be written, or the record holds a number that is not finite.

    Example:
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_record(folder + "/r.json", {"step_s": [0.5, 0.4]}).read_text()
      '{\\n "step_s": [\\n  0.5,\\n  0.4\\n ]\\n}\\n'
    """
    target = Path(path)
    try:
        text = json.dumps(record, indent=1, allow_nan=False) + "\n"
    except ValueError as error:
        raise RunError(
            f"the record for {target} holds a number that is not finite: {error}; nothing was written"
        ) from error
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=target.parent, prefix=f".{target.name}.") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
            os.chmod(handle.name, 0o644)
            os.link(handle.name, target)  # fails if the target exists, also when two processes race
    except OSError as error:
        if target.exists():
            raise RunError(
                f"{target} exists, and results are never overwritten; choose another name"
            ) from error
        raise RunError(f"the result cannot be written to {target}: {error}; choose another place") from error
    return target


def device_description() -> dict[str, Any]:
    """The device JAX computes on. Starts the JAX backend.

    >>> sorted(device_description())
    ['count', 'cpu', 'kind', 'platform']
    """
    import jax

    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "kind": first.device_kind,
        "count": jax.device_count(),
        "cpu": cpu_name(),
    }


def source_state(folder: Path | None = None) -> dict[str, Any] | None:
    """Commit of the repository that edgejax was imported from, and whether files differ from it.

    ``None`` when edgejax was installed from a package, or git is not there.
    """
    folder = Path(__file__).parents[1] if folder is None else folder
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # else the repository is someone else's
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return {"commit": commit, "dirty": bool(changed)}


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=folder, capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()
