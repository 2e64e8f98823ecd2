"""Connections between the processes of one run: who is there, and that another is gone, known at once.

Process 0 listens, the others connect to it, and the run starts when all are there. From then on each end says every few
seconds that it is alive. The system closes the connections of a process that dies, so the others know within
milliseconds; a machine that is cut off or stands still is silent, and counts as gone after ``SILENCE_S``. A process that
ends by itself says so first, with the reason. What one process says goes through process 0 to all.

Messages are lines of JSON: ``{"alive": true}``, ``{"end": null or why}``, ``{"gone": what happened}``.
"""

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable
from typing import IO, Any, NamedTuple

from edgejax.core.errors import RunError

BEAT_S = 3.0
SILENCE_S = 30.0
GRACE_S = 5.0  # after another's error: as a rule this process is about to meet the same one
LEAVING_S = 2 * GRACE_S  # for the others to end after process 0 has said that it does
MEETING_S = 300.0  # for all processes to come
_LINE_BYTES = 1 << 16


class Address(NamedTuple):
    """Where process 0 listens."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{self.host}:{self.port}"


class _Link(NamedTuple):
    socket: socket.socket
    lines: IO[bytes]

    def say(self, **message: Any) -> None:
        with contextlib.suppress(OSError):  # its reader finds out that the other is gone
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def hear(self) -> dict[str, Any] | None:
        """The next message; None at the end. Raises OSError (TimeoutError too), or ValueError for what is no message."""
        line = self.lines.readline(_LINE_BYTES)
        if not line:
            return None
        message = json.loads(line)
        if not isinstance(message, dict):
            raise ValueError("no message of edgejax")
        return message


class Links:
    """This process's connections: to all others in process 0, to process 0 in the others.

    Args:
      index: number of this process.
      links: by the number of the process at the other end.
    """

    def __init__(self, index: int, links: dict[int, _Link]) -> None:
        self.index = index
        self._links = links
        self._ending = threading.Event()
        self._listeners: list[threading.Thread] = []
        self._said_lost = threading.Lock()
        self._on_loss: Callable[[str], None] = lambda text: None

    def watch(self, on_loss: Callable[[str], None]) -> None:
        """From now on ``on_loss`` is called, once and from another thread, when a process is gone or has failed."""
        self._on_loss = on_loss
        threading.Thread(target=self._beat, name="edgejax-beat", daemon=True).start()
        for other in self._links:
            listener = threading.Thread(target=self._listen, args=(other,), name="edgejax-link", daemon=True)
            listener.start()
            self._listeners.append(listener)

    def close(self, why: str | None = None) -> None:
        """Says goodbye; ``why`` is the error that ends this process. Process 0 waits until the others have left."""
        if self._ending.is_set():
            return
        self._ending.set()
        for link in self._links.values():
            link.say(end=why)
        deadline = time.monotonic() + LEAVING_S
        for listener in self._listeners if self.index == 0 else ():
            listener.join(max(deadline - time.monotonic(), 0))
        for link in self._links.values():
            _close(link)

    def _beat(self) -> None:
        while not self._ending.wait(BEAT_S):
            for link in self._links.values():
                link.say(alive=True)

    def _listen(self, other: int) -> None:
        link = self._links[other]
        link.socket.settimeout(SILENCE_S)
        try:
            while (message := link.hear()) is not None:
                if "end" in message:
                    if message["end"] is not None and not self._ending.wait(GRACE_S):
                        self._lost(f"process {other} stopped: {message['end']}")
                    return
                if "gone" in message:
                    self._lost(message["gone"])
                    return
            what = "is gone: its connection was closed"
        except TimeoutError:
            what = f"is gone, or its machine: nothing was heard of it for {SILENCE_S:.0f} s"
        except (OSError, ValueError) as error:
            what = f"is gone: its connection was lost ({error})"
        self._lost(f"process {other} {what}")

    def _lost(self, text: str) -> None:
        if self._ending.is_set() or not self._said_lost.acquire(blocking=False):
            return
        if self.index == 0:
            for link in self._links.values():
                link.say(gone=text)
        self._on_loss(text)


def meet(
    address: Address,
    index: int,
    n_processes: int,
    *,
    welcome: Callable[[], dict[str, Any]] = dict,
    timeout_s: float = MEETING_S,
) -> tuple[Links, dict[str, Any]]:
    """Waits until all processes are there.

    Args:
      address: where process 0 listens and the others look for it.
      index: number of this process.
      n_processes: of the run.
      welcome: called by process 0 when all are there; what it gives is given to every process.
      timeout_s: to wait.

    Returns:
      The connections, not watched yet, and the welcome.

    Raises:
      RunError: some did not come in time, or were told something else.
    """
    deadline = time.monotonic() + timeout_s
    if index == 0:
        return _gather_processes(address, n_processes, welcome, deadline, timeout_s)
    return _go_to_first(address, index, n_processes, deadline, timeout_s)


def _gather_processes(address: Address, n_processes: int, welcome, deadline: float, timeout_s: float):
    links: dict[int, _Link] = {}
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(socket.create_server(("", address.port)))
        except OSError as error:
            raise RunError(
                f"process 0 cannot listen on port {address.port}: {error.strerror or error}; give all processes a "
                "--coordinator with another port"
            ) from error
        stack.callback(_close_all, links)
        while len(links) < n_processes - 1:
            try:
                server.settimeout(max(deadline - time.monotonic(), 0.001))
                link = _link(server.accept()[0], deadline)
                hello = link.hear()
            except TimeoutError:
                missing = [str(i) for i in range(1, n_processes) if i not in links]
                raise RunError(
                    f"process 0 waited {timeout_s:.0f} s at port {address.port} for process {', '.join(missing)} of "
                    f"{n_processes}; start every process, with the same --coordinator and --processes"
                ) from None
            except (OSError, ValueError):
                continue  # another program knocked
            if hello is None or not {"process", "processes"} <= set(hello):
                continue
            problem = _problem(hello, n_processes, links)
            if problem is not None:
                for one in (link, *links.values()):
                    one.say(refused=problem)
                raise RunError(problem)
            links[hello["process"]] = link
        news = welcome()
        for link in links.values():
            link.say(welcome=news)
        stack.pop_all()
        server.close()
    return Links(0, links), news


def _problem(hello: dict[str, Any], n_processes: int, links: dict[int, _Link]) -> str | None:
    index, count = hello["process"], hello["processes"]
    if count != n_processes:
        return f"process {index} was started with --processes {count}, process 0 with {n_processes}; give all the same"
    if index in links or not 1 <= index < n_processes:
        return f"two processes were started with --process-index {index}; give each of 0 to {n_processes - 1} once"
    return None


def _go_to_first(address: Address, index: int, n_processes: int, deadline: float, timeout_s: float):
    link = _link(_connect(address, index, deadline, timeout_s), deadline)
    link.say(process=index, processes=n_processes)
    try:
        answer = link.hear()
    except TimeoutError:
        answer = {
            "refused": f"process 0 is there, but not all of the {n_processes} came in {timeout_s:.0f} s"
        }
    except (OSError, ValueError) as error:
        answer = {"refused": f"what listens at {address} is no process 0 of a run ({error}), or it stopped"}
    if answer is None or "welcome" not in answer:
        _close(link)
        reason = (
            f"process 0 at {address} stopped before all were there" if answer is None else answer["refused"]
        )
        raise RunError(f"process {index} cannot join the run: {reason}")
    return Links(index, {0: link}), answer["welcome"]


def _connect(address: Address, index: int, deadline: float, timeout_s: float) -> socket.socket:
    while True:
        try:
            return socket.create_connection(address, timeout=max(deadline - time.monotonic(), 0.001))
        except OSError as error:  # not there yet
            if time.monotonic() + 0.2 >= deadline:
                raise RunError(
                    f"process {index} could not reach process 0 at {address} in {timeout_s:.0f} s ({error}); start it, and "
                    "check the address and that no firewall is between them"
                ) from error
            time.sleep(0.2)


def _link(connection: socket.socket, deadline: float) -> _Link:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(max(deadline - time.monotonic(), 0.001))
    return _Link(connection, connection.makefile("rb"))


def _close(link: _Link) -> None:
    with contextlib.suppress(OSError):
        link.socket.shutdown(socket.SHUT_RDWR)  # wakes up its reader
    link.socket.close()


def _close_all(links: dict[int, _Link]) -> None:
    for link in links.values():
        _close(link)


def free_port() -> int:
    """A port that nothing listens on, for a moment at least."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def parse_address(text: str) -> Address:
    """Reads ``host:port``.

    Raises:
      ValueError: it is none.

    Example:
      >>> parse_address("10.0.0.1:1234")
      Address(host='10.0.0.1', port=1234)
    """
    host, colon, port = text.rpartition(":")
    if not (colon and host.strip("[]") and port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ValueError(f"{text!r} is no address; write it as host:port, like 10.0.0.1:1234")
    return Address(host.strip("[]"), int(port))
