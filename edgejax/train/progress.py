"""What a person sees of a run: one live line in a terminal, plain lines anywhere else."""

import contextlib
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol, TextIO

from edgejax.core.units import format_bytes, format_seconds


class Progress(Protocol):
    """What the loop tells."""

    def step(self, step: int, *, loss: float, tokens_per_s: float | None, eta_s: float | None) -> None:
        """A step has finished."""
        ...

    def note(self, text: str) -> None:
        """Something a person should see stay: an evaluation, a checkpoint."""
        ...


class SilentProgress:
    """Shows nothing."""

    def step(self, step: int, *, loss: float, tokens_per_s: float | None, eta_s: float | None) -> None:
        pass

    def note(self, text: str) -> None:
        pass


class PlainProgress:
    """A line for the first and the last step, and one every ``every_s`` seconds between.

    Args:
      steps: steps of the whole run.
      stream: where to write; standard error by default.
      memory_bytes: the process's memory now.
    """

    def __init__(
        self,
        steps: int,
        *,
        stream: TextIO | None = None,
        memory_bytes: Callable[[], int | None] = lambda: None,
        every_s: float = 5.0,
    ) -> None:
        self._steps = steps
        self._stream = stream
        self._memory_bytes = memory_bytes
        self._every_s = every_s
        self._next = 0.0

    def step(self, step: int, *, loss: float, tokens_per_s: float | None, eta_s: float | None) -> None:
        now = time.monotonic()
        if now < self._next and step < self._steps:
            return
        self._next = now + self._every_s
        self.note(
            f"step {step}/{self._steps}  "
            + "  ".join(figures(loss, tokens_per_s, eta_s, self._memory_bytes()))
        )

    def note(self, text: str) -> None:
        with contextlib.suppress(OSError):  # whoever read this has gone; the run goes on
            print(text, file=self._stream or sys.stderr, flush=True)


class LiveProgress:
    """A bar with the loss, tokens a second, the time left and memory; a context."""

    def __init__(
        self, steps: int, *, start_step: int = 0, memory_bytes: Callable[[], int | None] = lambda: None
    ) -> None:
        import rich.console
        import rich.progress

        self._memory_bytes = memory_bytes
        self._bar = rich.progress.Progress(
            rich.progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            rich.progress.BarColumn(bar_width=24),
            rich.progress.TextColumn("{task.fields[figures]}"),
            console=rich.console.Console(stderr=True),
            transient=False,
        )
        self._task = self._bar.add_task("", total=steps, completed=start_step, figures="compiling")

    def step(self, step: int, *, loss: float, tokens_per_s: float | None, eta_s: float | None) -> None:
        text = "  ".join(figures(loss, tokens_per_s, eta_s, self._memory_bytes()))
        self._bar.update(self._task, completed=step, figures=text)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def __enter__(self) -> "LiveProgress":
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def figures(
    loss: float, tokens_per_s: float | None, eta_s: float | None, memory_bytes: int | None
) -> list[str]:
    """The figures of a step as a person reads them; those not known yet are left out.

    >>> figures(2.5, 180.4, 75.0, 500 * 2**20)
    ['loss 2.5000', '180 tokens/s', '1 min 15 s left', '500.0 MiB']
    """
    texts: list[Any] = [f"loss {loss:.4f}"]
    if tokens_per_s is not None:
        texts.append(f"{tokens_per_s:,.0f} tokens/s")
    if eta_s is not None:
        texts.append(f"{format_seconds(eta_s)} left")
    if memory_bytes is not None:
        texts.append(format_bytes(memory_bytes))
    return texts
