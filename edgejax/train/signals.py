"""SIGINT and SIGTERM during a run: the first asks the run to finish its step and save, the second ends it at once.

Python runs its signal handlers only between bytecodes of the main thread, which may sit for seconds inside a
compiled step. So the count of signals is kept by a thread that reads ``signal.set_wakeup_fd``, which the C-level
handler writes at once.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
from types import FrameType
from typing import Protocol

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Received(Protocol):
    """What a run asks of a ``SignalGuard``."""

    @property
    def received(self) -> int | None:
        """Number of the first signal, if any."""


class SignalGuard:
    """A context in which the first SIGINT or SIGTERM is noted and the second ends the process.

    Outside the main thread (where Python allows no handlers) it notes nothing and changes nothing.

    Example:
      >>> with SignalGuard() as guard:
      ...     signal.raise_signal(signal.SIGTERM)
      ...     guard.received == signal.SIGTERM
      True
    """

    def __init__(self) -> None:
        self.received: int | None = None  # number of the first signal
        self._restore = contextlib.ExitStack()

    def __enter__(self) -> "SignalGuard":
        if threading.current_thread() is not threading.main_thread():
            return self
        reader, writer = socket.socketpair()
        writer.setblocking(False)
        for number in SIGNALS:
            self._restore.callback(signal.signal, number, signal.signal(number, self._note))
        thread = threading.Thread(target=_count, args=(reader,), name="edgejax-signals", daemon=True)
        thread.start()
        self._restore.callback(thread.join)
        self._restore.callback(writer.close)  # ends the thread's recv
        previous_fd = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self._restore.callback(signal.set_wakeup_fd, previous_fd)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._restore.close()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received = number
            name = signal_name(number)
            text = f"\n{name}: finishing this step and saving; once more ends at once."
            with contextlib.suppress(OSError):  # the terminal may have gone
                print(text, file=sys.stderr, flush=True)


def _count(reader: socket.socket) -> None:
    seen = 0
    with reader:
        while data := reader.recv(16):
            for number in data:
                seen += number in SIGNALS
                if seen >= 2:
                    os._exit(128 + number)


def signal_name(number: int) -> str:
    """``'SIGTERM'`` for 15."""
    return signal.Signals(number).name
