"""Only Orbax's own reports of a failure are dropped, and only around a save or a restore."""

import asyncio
import logging
import sys
import types

import pytest

from edgejax.train.orbax_quiet import _not_of_orbax, quiet_orbax

pytestmark = pytest.mark.quick


async def mine():
    """A coroutine of this program."""


@pytest.fixture
def reported(caplog, monkeypatch):
    """Makes one report of each kind and returns the texts that came through."""
    _drop_filters()  # a test before this one may have left them: a failed save in the same process
    hooked: list[str] = []
    monkeypatch.setattr(sys, "unraisablehook", lambda unraisable: hooked.append(str(unraisable.exc_value)))

    def report() -> list[str]:
        caplog.clear()
        hooked.clear()
        logger = logging.getLogger("asyncio")
        logger.error("a task of orbax failed")
        logger.error("a task of mine failed")
        logger.warning("orbax is slow")
        code = compile("raise ValueError('planted')", "/site-packages/orbax/checkpoint/x.py", "exec")
        try:
            exec(code)
        except ValueError:
            logger.error("Task exception was never retrieved", exc_info=True)
        for text, thing in (
            ("Event loop is closed", None),
            ("abandoned", asyncio.sleep(0)),
            ("mine", mine()),
        ):
            sys.unraisablehook(types.SimpleNamespace(exc_value=RuntimeError(text), object=thing))
            if thing is not None:
                thing.close()
        return [*caplog.messages, *hooked]

    yield report
    _drop_filters()


def _drop_filters() -> None:
    for name in ("absl", "asyncio"):
        logging.getLogger(name).removeFilter(_not_of_orbax)


QUIET = ["a task of mine failed", "orbax is slow", "mine"]


def test_inside_the_block_and_nowhere_else(reported):
    everything = reported()
    with quiet_orbax():
        assert reported() == QUIET
    assert reported() == everything
    assert len(everything) == 7


def test_after_a_failure_the_late_reports_are_dropped_too(reported):
    with pytest.raises(OSError, match="full"), quiet_orbax():
        raise OSError("full")
    assert reported() == QUIET
