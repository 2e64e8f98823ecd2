"""Orbax without the tracebacks of its tasks.

When a file cannot be written or read, Orbax raises one error, which becomes ours. Dozens of its tasks, started together
with the one that failed, report the same again: through the loggers of absl and asyncio, some of them only when they
are collected, and where TensorStore calls back into an event loop that has ended.
"""

import contextlib
import logging
import sys
import traceback
import types
from collections.abc import Iterator
from pathlib import Path

_LOGGERS = ("absl", "asyncio")
_LOOP_CLOSED = "Event loop is closed"


@contextlib.contextmanager
def quiet_orbax() -> Iterator[None]:
    """Drops such reports inside the ``with`` block; after one that fails, also from then on, for they come late."""
    usual_hook = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if str(unraisable.exc_value) != _LOOP_CLOSED and not _is_abandoned(unraisable.object):
            usual_hook(unraisable)

    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_not_of_orbax)  # the same filter is never there twice
    sys.unraisablehook = hook
    yield
    sys.unraisablehook = usual_hook
    for name in _LOGGERS:
        logging.getLogger(name).removeFilter(_not_of_orbax)


def _is_abandoned(thing: object) -> bool:
    """Whether it is a coroutine of Orbax, or one of asyncio's that those wait in: after a failure nobody ends them."""
    if not isinstance(thing, types.CoroutineType):
        return False
    folders = Path(thing.cr_code.co_filename).parts[:-1]
    return "orbax" in folders or folders[-1:] == ("asyncio",)


def _not_of_orbax(record: logging.LogRecord) -> bool:
    if record.levelno < logging.ERROR:
        return True
    trace = record.exc_info[2] if record.exc_info else None
    files = (frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))
    return not any("orbax" in text for text in (record.getMessage(), *files))
