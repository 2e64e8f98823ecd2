"""Many processes that train one model together: how they meet, agree, and stop when one of them is gone.

A step over a mesh needs every process, and those that are left when one dies would wait for it, in the best case until
JAX ends them with a C++ stack trace. ``joined`` therefore keeps connections of its own (``links``): when a process dies,
the others end within a second, with a message that says which and how to go on. Nothing can be saved then, for parts of
the state died with the process; the checkpoints before stay whole.
"""

import contextlib
import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError, EdgejaxError, RunError
from edgejax.train.links import Address, Links, free_port, meet, parse_address
from edgejax.train.signals import Received

AUTO = "auto"
HEARTBEAT_S = 40  # JAX's own, behind that of the links
_PIECE_BYTES = 4096  # texts are shared in multiples of it, so that few programs are compiled for it

T = TypeVar("T")


@contextlib.contextmanager
def joined(
    coordinator: str | None,
    n_processes: int | None = None,
    process_index: int | None = None,
    *,
    how_to_go_on: str = "Start all processes again with resume.",
) -> Iterator[None]:
    """A context in which JAX sees the devices of all processes; before the back end starts.

    Args:
      coordinator: ``host:port`` where process 0 listens and the others find it; ``auto``: what JAX reads from the
        environment by itself (Slurm, Open MPI, Kubernetes, ``JAX_COORDINATOR_ADDRESS``); None: this process is alone,
        and nothing is done.
      n_processes: of the run; not with ``auto``.
      process_index: of this one, from 0; not with ``auto``.
      how_to_go_on: ends the message when another process is gone.

    Raises:
      ConfigError: arguments that do not go together.
      RunError: the processes did not find each other.
    """
    check_processes(coordinator, n_processes, process_index)
    if coordinator is None:
        yield
        return
    # A process that is gone ends collectives with an error, and not at once the others; at the end none waits for
    # the others. (docs.jax.dev, "Fault Tolerant Distributed JAX")
    jax.config.update("jax_enable_recoverability", True)
    links = (
        _start_by_environment() if coordinator == AUTO else _start(coordinator, n_processes, process_index)
    )
    _pause_before_abort()
    links.watch(lambda text: _end(text, how_to_go_on))
    why = None
    try:
        yield
    except BaseException as error:
        why = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if isinstance(error, Exception) and not isinstance(error, EdgejaxError):
            time.sleep(
                2
            )  # if a collective failed because a process is gone, the watch says so and ends this one
        raise
    finally:
        _leave(links, why)


def check_processes(coordinator: str | None, n_processes: int | None, process_index: int | None) -> None:
    """Refuses arguments of ``joined`` that do not go together.

    Raises:
      ConfigError: with the reason and what to give.
    """
    given = {"--processes": n_processes, "--process-index": process_index}
    if coordinator is None or coordinator == AUTO:
        extra = [name for name, value in given.items() if value is not None]
        if extra:
            needs = "a --coordinator host:port" if coordinator is None else "another --coordinator than auto"
            raise ConfigError(f"{' and '.join(extra)} need{'s' * (len(extra) == 1)} {needs}")
        return
    try:
        parse_address(coordinator)
    except ValueError as error:
        raise ConfigError(f"--coordinator: {error}, or {AUTO}") from None
    missing = [name for name, value in given.items() if value is None]
    if n_processes is None or process_index is None:
        raise ConfigError(f"--coordinator {coordinator} needs {' and '.join(missing)} too")
    if n_processes < 2 or not 0 <= process_index < n_processes:
        raise ConfigError(
            f"--processes {n_processes} and --process-index {process_index}: there must be 2 processes or more, and their "
            "indices count from 0"
        )


def share(value: Any) -> Any:
    """Process 0's ``value`` (JSON) in every process; each must call it."""
    if jax.process_count() == 1:
        return value
    data = json.dumps(value).encode() if jax.process_index() == 0 else b""
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(data))))
    buffer = np.zeros(-(-size // _PIECE_BYTES) * _PIECE_BYTES, np.uint8)
    buffer[: len(data)] = np.frombuffer(data, np.uint8)
    return json.loads(bytes(multihost_utils.broadcast_one_to_all(buffer))[:size])


def on_first(action: Callable[[], T]) -> T | None:
    """``action`` in process 0, and its result there, None elsewhere; each process must call it.

    Raises:
      EdgejaxError: in process 0 what the action raised, in the others a RunError that says so.
    """
    if jax.process_count() == 1:
        return action()
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = action()
        except EdgejaxError as error:
            failure = error
    text = share(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    if text is not None:
        raise RunError(f"process 0 stopped: {text}")
    return result


def gather(tree: PyTree) -> PyTree:
    """The whole arrays of a split tree in the memory of process 0, as numpy; each process must call it.

    A leaf at a time is put together on every device. The other processes get None in the place of arrays.
    """

    def whole(leaf: jax.Array) -> np.ndarray | None:
        if leaf.is_fully_addressable:
            return np.asarray(leaf)
        if leaf.is_fully_replicated:
            host = leaf.addressable_data(0)
            return np.asarray(host) if jax.process_index() == 0 else None
        host = multihost_utils.process_allgather(leaf, tiled=True)
        return host if jax.process_index() == 0 else None

    return jax.tree.map(whole, tree)


def with_agreed_signals(step: Callable[..., T], guard: Received) -> tuple[Callable[..., T], Received]:
    """``(step, guard)``, so that all processes of a run stop at the same step; what was given where there is one."""
    if jax.process_count() == 1:
        return step, guard
    agreed = AgreedSignals(guard)
    return agreed.with_each(step), agreed


class AgreedSignals:
    """The first signal that any process has received, the same in all of them at the same step.

    In each step every process tells the others of its signal by a tiny program, and reads what all told in the step
    before, which has long been finished. A lone process would stop and leave the others waiting.

    Args:
      guard: of this process.
    """

    def __init__(self, guard: Received) -> None:
        self._guard = guard
        self._mesh = jax.sharding.Mesh(np.array(jax.devices()), ("all",))
        self._largest = jax.jit(lambda told: told.max(), out_shardings=self._sharding())
        self._told: list[jax.Array] = []
        self._agreed: int | None = None

    @property
    def received(self) -> int | None:
        """The signal's number, if any, as of the step before the last one that was begun."""
        if self._agreed is None and len(self._told) > 1:
            self._agreed = int(self._told.pop(0)) or None
        return self._agreed

    def with_each(self, step: Callable[..., T]) -> Callable[..., T]:
        """``step``, with which this process tells of its signal."""

        def telling(*args: Any) -> T:
            mine = np.full(jax.device_count(), self._guard.received or 0, np.int32)
            rows = self._sharding("all")
            told = jax.make_array_from_callback(mine.shape, rows, lambda index: mine[index])
            self._told = [*self._told[-1:], self._largest(told)]
            return step(*args)

        return telling

    def _sharding(self, *axes: str) -> jax.sharding.NamedSharding:
        return jax.sharding.NamedSharding(self._mesh, jax.sharding.PartitionSpec(*axes))


def _start(coordinator: str, n_processes: int | None, process_index: int | None) -> Links:
    assert n_processes is not None  # by check_processes
    assert process_index is not None
    address = parse_address(coordinator)
    # JAX's own coordinator ends the process if one does not come, so it starts when all are there.
    news: dict[str, Any]
    links, news = meet(address, process_index, n_processes, welcome=lambda: {"port": free_port()})
    _initialize(
        coordinator_address=f"{coordinator.rpartition(':')[0]}:{news['port']}",
        num_processes=n_processes,
        process_id=process_index,
        cluster_detection_method="deactivate",
    )
    return links


def _start_by_environment() -> Links:
    _initialize()
    from jax._src import distributed  # where JAX found process 0; there is no public name for it

    host = str(distributed.global_state.coordinator_address).rpartition(":")[0]
    port = share(free_port())
    return meet(Address(host, port), jax.process_index(), jax.process_count())[0]


def _initialize(**arguments: Any) -> None:
    try:
        jax.distributed.initialize(heartbeat_timeout_seconds=HEARTBEAT_S, **arguments)
    except (RuntimeError, ValueError) as error:
        raise RunError(
            f"JAX could not start many processes: {str(error).splitlines()[0]} Give --coordinator host:port, --processes "
            "and --process-index where the environment does not tell JAX of them."
        ) from error


def _leave(links: Links, why: str | None) -> None:
    """Ends what was started. JAX's coordinator is in process 0, and who leaves after it is aborted: it leaves last."""
    if jax.process_index() == 0:
        links.close(why)
        jax.distributed.shutdown()
    else:
        jax.distributed.shutdown()
        links.close(why)


def _end(text: str, how_to_go_on: str) -> None:
    """Ends this process from any thread: the main one may wait for the process that is gone, and never wake up."""
    show_cursor = "\x1b[?25h\n" if sys.stderr.isatty() else ""
    message = (
        f"{show_cursor}edgejax: {text}. A step needs every process, so process {jax.process_index()} of "
        f"{jax.process_count()} stops too. The checkpoints that were written stay. {how_to_go_on}\n"
    )
    with contextlib.suppress(OSError):
        sys.stdout.flush()
        os.write(2, message.encode())
    os._exit(RunError.exit_code)


def _pause_before_abort() -> None:
    """When JAX aborts this process because process 0 is gone, let the watch say so first.

    The C function ``sleep`` becomes the handler of SIGABRT: called with the signal's number, it pauses the aborting
    thread for 6 seconds and returns, after which ``abort`` goes on. Meanwhile the watch ends the process with its message.
    """
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
        library.signal(signal.SIGABRT, ctypes.cast(library.sleep, ctypes.c_void_p))
