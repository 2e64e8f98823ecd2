"""Finished runs, one line of JSON each, and what follows from them: which run is next, which learning rate won."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from settings import Optimizer, Settings

Row = dict[str, Any]


class Run(NamedTuple):
    """What tells one run from another."""

    kind: str  # grid or final
    optimizer: str  # its label
    learning_rate: float  # peak
    seed: int


def read_rows(path: Path) -> list[Row]:
    """All rows of a file; a last line that was not written to its end is removed from it."""
    if not path.exists():
        return []
    whole, end, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        with open(path, "r+b") as file:
            file.truncate(len(whole + end))
    return [json.loads(line) for line in whole.splitlines()]


def append_row(path: Path, row: Row) -> None:
    """Write one row and wait until it is on the disk."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def run_of(row: Row) -> Run:
    """The run that a row is of."""
    return Run(*(row[field] for field in Run._fields))


def loss_of(row: Row) -> float:
    """Validation loss, infinite for a run that diverged."""
    return math.inf if row["validation_loss"] is None else row["validation_loss"]


def grid_losses(rows: list[Row], label: str) -> dict[float, list[float]]:
    """An optimizer's validation losses by learning rate, ascending."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if row["kind"] == "grid" and row["optimizer"] == label:
            found.setdefault(row["learning_rate"], []).append(loss_of(row))
    return dict(sorted(found.items()))


def best_rate(losses: dict[float, list[float]]) -> float | None:
    """The learning rate with the lowest mean loss, the lower one of two that are equal; None where all diverged."""
    means = {rate: sum(values) / len(values) for rate, values in losses.items()}
    best = min(means, key=lambda rate: means[rate], default=None)
    return None if best is None or math.isinf(means[best]) else best


def missing(settings: Settings, rows: list[Row], known: set[str]) -> Iterator[Run]:
    """Runs that are still to be done, in order; ``rows`` must grow by each before the next is asked for.

    Those with a claim go first, seed by seed, so that whenever it is stopped the finished seeds are paired.

    Args:
      known: names of optimizers there are; runs of others are left out.
    """
    done = {run_of(row) for row in rows}
    for optimizers in (settings.with_claim(), *([o] for o in settings.without_claim())):
        present = [o for o in optimizers if o.name in known]
        yield from (run for o in present for run in _grid_runs(settings, o) if run not in done)
        rates = {o.label: best_rate(grid_losses(rows, o.label)) for o in present}
        for seed in settings.training["seeds"]:
            for optimizer in present:
                rate = rates[optimizer.label]
                if rate is None or seed not in settings.final_seeds(optimizer):
                    continue
                run = Run("final", optimizer.label, rate, seed)
                if run not in done:
                    yield run


def n_steps_left(settings: Settings, rows: list[Row], known: set[str]) -> int:
    """Training steps of all runs that are still to be done."""
    grid, training = settings.grid, settings.training
    total = sum(
        len(grid["learning_rates"]) * len(grid["seeds"]) * grid["steps"]
        + len(settings.final_seeds(optimizer)) * training["steps"]
        for optimizer in settings.optimizers
        if optimizer.name in known
    )
    return total - sum({"grid": grid, "final": training}[row["kind"]]["steps"] for row in rows)


def _grid_runs(settings: Settings, optimizer: Optimizer) -> list[Run]:
    return [
        Run("grid", optimizer.label, rate, seed)
        for seed in settings.grid["seeds"]
        for rate in settings.grid["learning_rates"]
    ]
