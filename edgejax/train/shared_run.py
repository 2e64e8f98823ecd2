"""The folder, the log and the checkpoints of a run, for one process or for many.

With many, process 0 alone has files, and what it finds in them it tells the others, so that all take the same turns. The
whole of what trains is put together in the memory of process 0 to be saved, a leaf at a time, and sent to the others
when it is restored: the others need not see its disk, and a checkpoint does not depend on the mesh it was written from.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError, RunError
from edgejax.train.checkpoint import Checkpoints, RunIdentity
from edgejax.train.identity import check_same_run
from edgejax.train.mesh import make_mesh, parse_mesh
from edgejax.train.metrics import MetricsLog
from edgejax.train.processes import gather, on_first, share
from edgejax.train.run_folder import RunFolder


class FollowedFolder:
    """The folder of a run in a process that has none of it; a context that does nothing."""

    def __init__(self, path: str | Path, config: dict[str, Any]) -> None:
        self.path, self.config = Path(path).absolute(), config
        self.metrics_path, self.checkpoints_path = self.path / "metrics.jsonl", self.path / "checkpoints"

    def begin(self) -> None:
        pass

    def __enter__(self) -> "FollowedFolder":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class FollowedLog:
    """The log of a run in a process that writes none: knows the evaluations, and has no file. A context too."""

    def __init__(self, evaluations: dict[int, dict[str, Any]]) -> None:
        self.evaluations = evaluations

    def append(self, kind: str, *, step: int, **values: Any) -> None:
        if kind == "eval":
            self.evaluations[step] = {"kind": kind, "step": step, **values}

    def sync(self) -> None:
        pass

    def __enter__(self) -> "FollowedLog":
        return self

    def __exit__(self, *exc_info: object) -> None:
        pass


class SharedCheckpoints:
    """``Checkpoints`` of a run of many processes, in each of them; see the module's docstring.

    Args:
      folder: theirs.
      first: those of process 0; None in the others.
    """

    def __init__(self, folder: Path, first: Checkpoints | None) -> None:
        self.folder, self._first = folder, first
        self.last_saved: int | None = None

    def check_space(self, state: PyTree) -> None:
        on_first(lambda: self._files().check_space(state))

    def save(
        self, step: int, state: PyTree, *, data_position: int, extra: dict[str, Any] | None = None
    ) -> None:
        whole = gather(state)
        on_first(lambda: self._files().save(step, whole, data_position=data_position, extra=extra))
        self.last_saved = step

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        like = jax.tree.map(lambda leaf: np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape), template)
        found = on_first(lambda: self._files().restore(like))
        news = share(None if found is None else [found[0], found[2]])
        if news is None:
            return None
        self.last_saved, record = news
        state = jax.tree.map(_send, like if found is None else found[1], template)
        return self.last_saved, state, record

    def close(self) -> None:
        if self._first is not None:
            self._first.close()

    def _files(self) -> Checkpoints:
        assert self._first is not None  # only process 0 comes here
        return self._first


def open_folder(
    path: str | Path, *, config: dict[str, Any], resume: bool, overwrite: bool, mesh: str | None
) -> RunFolder:
    """The run's folder, held by process 0; a context.

    Raises:
      ConfigError: a mesh that these devices cannot make, or many processes without one.
      RunError: as ``RunFolder`` does; or the processes were given different things.
    """
    if mesh is not None:
        make_mesh(parse_mesh(mesh))  # refused before there is a folder
    if jax.process_count() > 1:
        if mesh is None:
            raise ConfigError(
                f"{jax.process_count()} processes train one model over a mesh; give one, like data={jax.device_count()}"
            )
        _check_all_same(config, {"resume": resume, "overwrite": overwrite} | config["settings"])
    folder = on_first(lambda: RunFolder(path, config=config, resume=resume, overwrite=overwrite))
    found = share(None if folder is None else folder.config)
    return folder or FollowedFolder(path, found)  # type: ignore[return-value]  # what a run asks of a folder


def open_checkpoints(
    folder: RunFolder, *, identity: RunIdentity, keep: int, note: Callable[[str], None]
) -> Checkpoints:
    """The run's checkpoints."""
    first = None
    if jax.process_index() == 0:
        first = Checkpoints(folder.checkpoints_path, identity=identity, keep=keep, note=note)
        if jax.process_count() == 1:
            return first
    return SharedCheckpoints(folder.checkpoints_path, first)  # type: ignore[return-value]  # all a run asks of them


def open_log(folder: RunFolder, *, keep_to_step: int | None) -> MetricsLog:
    """The run's log; a context."""
    log = on_first(lambda: MetricsLog(folder.metrics_path, keep_to_step=keep_to_step))
    found = share(None if log is None else [*log.evaluations.values()])
    known = {record["step"]: record for record in found}
    return log or FollowedLog(known)  # type: ignore[return-value]  # what a run asks of a log


def _send(leaf: np.ndarray, like: jax.Array) -> jax.Array:
    whole = multihost_utils.broadcast_one_to_all(leaf)
    return jax.make_array_from_callback(like.shape, like.sharding, lambda index: whole[index])


def _check_all_same(config: dict[str, Any], options: dict[str, Any]) -> None:
    first, theirs = share([config, options])
    problem = None
    try:
        check_same_run(first, config)
    except RunError as error:
        problem = str(error)
    different = [
        f"{name} {value!r}, not {theirs[name]!r}" for name, value in options.items() if value != theirs[name]
    ]
    if different:
        problem = "; ".join(different)
    others = np.flatnonzero(multihost_utils.process_allgather(np.int32(problem is not None)))
    if problem is not None:
        raise RunError(f"process {jax.process_index()} was given something else than process 0: {problem}")
    if others.size:
        raise RunError(
            f"process {', '.join(map(str, others))} was given something else than process 0; its own message says what"
        )
