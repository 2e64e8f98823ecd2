"""Checkpoints of what trains: Orbax for the arrays, and a hash over their bytes, which Orbax does not keep.

A checkpoint holds the step, the trained leaves and the optimizer's state, never the frozen base. Beside them lies a
JSON record of what they belong to: the model's and the data's fingerprints, the settings, the position in the data,
versions, and SHA-256 sums of the arrays and of the record itself. A save is finished, and its folder entry on the
disk, before ``save`` returns; a crash at any moment leaves the checkpoints before it whole.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from edgejax.core.allocator import release_freed_memory, release_library_code
from edgejax.core.arrays import PyTree
from edgejax.core.errors import RunError
from edgejax.core.host import disk_free_bytes, package_versions
from edgejax.core.trees import tree_bytes, tree_paths
from edgejax.core.units import format_bytes
from edgejax.train.orbax_quiet import quiet_orbax

FORMAT = (
    "edgejax-checkpoint-2"  # in 1, quantised states of Adam held first moments, now their ratios to roots
)
_DELETED = "deleted"  # Orbax renames old steps into it, so that none is ever listed half deleted
# What Orbax, TensorStore and the JSON reader raise for files that are missing, cut short or altered.
_UNREADABLE = (OSError, ValueError, KeyError, TypeError, RuntimeError)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunIdentity:
    """What a checkpoint belongs to; one from another model, data set or settings is refused."""

    model: str  # SHA-256 of the weight file
    data: str  # fingerprint of the training data and its packing
    settings: str  # TrainSettings.fingerprint(), with the adapters' shape


class Checkpoints:
    """The checkpoints of one run, in ``folder``.

    Args:
      folder: made when the first checkpoint is saved.
      identity: what they must belong to.
      keep: the newest so many stay.
      note: called with a line of text when a damaged checkpoint is passed over.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> identity = RunIdentity(model="m", data="d", settings="s")
      >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), identity=identity, keep=2)
      >>> checkpoints.save(5, {"w": jnp.ones(3)}, data_position=20)
      >>> step, state, record = checkpoints.restore({"w": jnp.zeros(3)})
      >>> step, state["w"].tolist(), record["data_position"]
      (5, [1.0, 1.0, 1.0], 20)
    """

    def __init__(
        self, folder: Path, *, identity: RunIdentity, keep: int = 2, note: Callable[[str], None] | None = None
    ) -> None:
        self.folder = Path(folder).absolute()
        self.identity = identity
        self.keep = keep
        self._note = note or (lambda text: print(text, file=sys.stderr, flush=True))
        self._manager: Any = None
        self._in_flight_bytes: int | None = (
            None  # that are copied at a time while a state is written; None: all
        )
        self.last_saved: int | None = None

    def steps(self) -> list[int]:
        """Steps that have a checkpoint, ascending; does not import Orbax when there is none."""
        if not self.folder.is_dir() or not any(entry.name.isdigit() for entry in self.folder.iterdir()):
            return []
        return sorted(self._open().all_steps())

    def check_space(self, state: PyTree) -> None:
        """Raises RunError unless the disk has room for the kept checkpoints and the one being written."""
        needed = tree_bytes(state) * (self.keep + 1 - min(self.keep, len(self.steps())))
        free = disk_free_bytes(self.folder)
        if free < needed:
            raise RunError(
                f"{self.folder} has {format_bytes(free)} free, but {self.keep} kept checkpoints and the one being "
                f"written need {format_bytes(needed)}. Free space, keep fewer, or choose another folder."
            )

    def save(
        self, step: int, state: PyTree, *, data_position: int, extra: dict[str, Any] | None = None
    ) -> None:
        """Saves ``state`` as the checkpoint of ``step`` and returns when it is on the disk.

        Raises:
          RunError: it could not be written (no space, read-only); the checkpoints before it stay.
        """
        import orbax.checkpoint as ocp

        arrays = _nonempty(state)
        self._write_by_leaf(arrays)
        record = {
            "format": FORMAT,
            "step": step,
            "data_position": data_position,
            **{f"{name}_fingerprint": value for name, value in dataclasses.asdict(self.identity).items()},
            "versions": package_versions(),
            "state_sha256": tree_sha256(arrays),
            "extra": extra or {},
        }
        record["record_sha256"] = _record_sha256(record)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            manager = self._open()
            with quiet_orbax():
                manager.save(
                    step,
                    args=ocp.args.Composite(
                        state=ocp.args.StandardSave(arrays), record=ocp.args.JsonSave(record)
                    ),
                )
                manager.wait_until_finished()
            for folder in (self.folder, self.folder.parent):
                _fsync_folder(folder)
        except _UNREADABLE as error:
            self.close()
            self._remove_unfinished()
            kept = (
                "There is none before it"
                if self.last_saved is None
                else f"Of those before it, that of step {self.last_saved} stays"
            )
            raise RunError(
                f"the checkpoint of step {step} could not be written to {self.folder}: {_first_line(error)}. "
                f"{kept}. Free space or make the folder writable, then resume."
            ) from error
        self.last_saved = step
        release_freed_memory()
        release_library_code()
        shutil.rmtree(self.folder / _DELETED, ignore_errors=True)

    def restore(self, template: PyTree) -> tuple[int, PyTree, dict[str, Any]] | None:
        """The newest whole checkpoint as ``(step, state, record)``; None if there is none at all.

        Args:
          template: a tree of arrays with the structure, shapes, dtypes and placement to restore into: numpy arrays
            come back as such, JAX arrays as fresh buffers that a jitted step can take by donation.

        Raises:
          RunError: the newest readable one belongs to another model, data set or settings, or none is whole.
        """
        reasons = []
        for step in reversed(self.steps()):
            try:
                with quiet_orbax():
                    state, record = self._read(step, template)
            except _Foreign as error:
                raise RunError(str(error)) from None
            except _UNREADABLE as error:
                reasons.append(f"step {step}: {_first_line(error)}")
                continue
            for damaged in [s for s in self.steps() if s > step]:
                self._set_aside(damaged)
            for reason in reasons:
                self._note(f"checkpoint passed over as damaged ({reason}); going on from step {step}")
            self.last_saved = step
            return step, state, record
        if reasons:
            raise RunError(
                f"no checkpoint in {self.folder} can be used: {'; '.join(reasons)}. They were left as they are; "
                "start the run again in another folder, or with overwrite."
            )
        return None

    def close(self) -> None:
        """Lets go of the folder; a later call opens it again."""
        if self._manager is not None:
            self._manager.close()
            self._manager = None

    def _write_by_leaf(self, arrays: dict[str, Any]) -> None:
        """Let no more than the bytes of the largest leaf be copied and compressed at a time.

        Left to itself Orbax does so with all leaves at once (388 MB of state: 264 MB more memory, and 83 to 200 so).
        """
        largest = max((leaf.nbytes for leaf in arrays.values()), default=0) + 1  # it wants room for more
        if self._in_flight_bytes != largest:
            self.close()
            self._in_flight_bytes = largest

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            # In a run of many processes Orbax would wait for all of them, and only this one comes here.
            alone = {jax.process_index()} if jax.process_count() > 1 else None
            processes = ocp.options.MultiprocessingOptions(
                primary_host=jax.process_index() if alone else 0, active_processes=alone
            )
            handlers: Any = None
            if self._in_flight_bytes is not None:
                gigabytes: Any = (
                    self._in_flight_bytes / 1e9
                )  # a fraction is as good, whatever the annotation says
                handlers = {
                    "state": ocp.StandardCheckpointHandler(
                        save_concurrent_gb=gigabytes, multiprocessing_options=processes
                    ),
                    "record": ocp.JsonCheckpointHandler(multiprocessing_options=processes),
                }
            self._manager = ocp.CheckpointManager(
                self.folder,
                item_handlers=handlers,
                options=ocp.CheckpointManagerOptions(
                    create=alone is None,  # with ``active_processes`` Orbax wants the folder made before
                    max_to_keep=self.keep,
                    todelete_subdir=_DELETED,
                    cleanup_tmp_directories=True,
                    enable_async_checkpointing=False,
                    multiprocessing_options=processes,
                ),
            )
        return self._manager

    def _read(self, step: int, template: PyTree) -> tuple[PyTree, dict[str, Any]]:
        import orbax.checkpoint as ocp

        record = self._open().restore(step, args=ocp.args.Composite(record=ocp.args.JsonRestore()))["record"]
        if record["record_sha256"] != _record_sha256(record):
            raise ValueError("its record does not match its own SHA-256")
        if record["format"] != FORMAT:
            raise _Foreign(
                f"the checkpoint of step {step} in {self.folder} is of the format {record['format']}, and this edgejax reads "
                f"{FORMAT}: the optimizer's state means something else. Finish the run with the edgejax that began it, or "
                "start a new run in another folder."
            )
        for name, ours in dataclasses.asdict(self.identity).items():
            theirs = record[f"{name}_fingerprint"]
            if theirs != ours:
                raise _Foreign(
                    f"the checkpoint of step {step} in {self.folder} was trained with other {name} (fingerprint "
                    f"{theirs}) than now given (fingerprint {ours}). Resume with the same {name}, or start a new run "
                    "in another folder."
                )
        wanted = _nonempty(template)
        abstract = {name: _abstract(leaf) for name, leaf in wanted.items()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
        arrays = self._open().restore(step, args=args)["state"]
        if tree_sha256(arrays) != record["state_sha256"]:
            raise ValueError(
                "its arrays do not match their SHA-256: the file was altered after it was written"
            )
        if any(isinstance(leaf, jax.Array) for leaf in arrays.values()):
            arrays = _fresh_copy(arrays)
        leaves = [arrays.get(name, leaf) for name, leaf in tree_paths(template).items()]
        return jax.tree.unflatten(jax.tree.structure(template), leaves), record

    def _set_aside(self, step: int) -> None:
        self.close()
        target = self.folder.parent / f"{self.folder.name}_damaged"
        target.mkdir(exist_ok=True)
        number = len(list(target.iterdir()))
        os.replace(self.folder / str(step), target / f"{step}-{number}")

    def _remove_unfinished(self) -> None:
        for entry in self.folder.glob("*.orbax-checkpoint-tmp*"):
            shutil.rmtree(entry, ignore_errors=True)


def _abstract(leaf: Any) -> Any:
    sharding = getattr(leaf, "sharding", None)
    return leaf if sharding is None else jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


class _Foreign(Exception):
    """A whole checkpoint of another run."""


def tree_sha256(tree: PyTree) -> str:
    """SHA-256 (hex) over every leaf's path, dtype, shape and bytes, in the order of the paths."""
    digest = hashlib.sha256()
    for name, leaf in sorted(tree_paths(tree).items()):
        array = np.ascontiguousarray(np.asarray(leaf))
        digest.update(f"{name}|{array.dtype.name}|{leaf.shape}|".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def nonfinite_leaves(tree: PyTree) -> list[str]:
    """Paths of the floating-point leaves that hold a NaN or an infinity."""
    floats = {name: x for name, x in tree_paths(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    if not floats:
        return []
    finite = jax.device_get(_all_finite(list(floats.values())))
    return [name for name, good in zip(floats, finite, strict=True) if not good]


def compile_checks(tree: PyTree) -> None:
    """Compile what looks for NaN in a state before it is saved, for its shapes, to have it in the compile cache."""
    floats = [leaf for leaf in tree_paths(tree).values() if jnp.issubdtype(leaf.dtype, jnp.floating)]
    _all_finite.lower(floats).compile()


@jax.jit
def _all_finite(leaves: list[jax.Array]) -> list[jax.Array]:
    return [jnp.isfinite(leaf).all() for leaf in leaves]


@jax.jit
def _fresh_copy(arrays: PyTree) -> PyTree:
    # Restored arrays may not be donatable; the outputs of a jitted function are. jnp.copy keeps jit from
    # forwarding its inputs.
    return jax.tree.map(jnp.copy, arrays)


def _nonempty(tree: PyTree) -> dict[str, Any]:
    # A flat dictionary does not depend on how optax nests its state. Orbax refuses arrays of size zero.
    flat = tree_paths(tree)
    if len(flat) != len(jax.tree.leaves(tree)):
        raise AssertionError("two leaves of the state share a path")
    return {name: leaf for name, leaf in flat.items() if leaf.size}


def _record_sha256(record: dict[str, Any]) -> str:
    rest = {name: value for name, value in record.items() if name != "record_sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    if len(line) > 300:  # what the system said stands at the end
        line = f"{line[:100]} ... {line[-200:]}"
    return f"{type(error).__name__}: {line}"


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
