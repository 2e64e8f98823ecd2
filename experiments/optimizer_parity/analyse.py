"""From finished runs to one result file, which is never overwritten.

    python experiments/optimizer_parity/analyse.py        writes results/<date>.json
    python experiments/optimizer_parity/render.py         its table, into README.md

An optimizer whose runs are not all there is listed with what there is and gets no verdict.
"""

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

from rows import Row, best_rate, grid_losses, loss_of, read_rows
from settings import Optimizer, Settings
from tost import DIFFERENT, interval, verdict

from edgejax.measure.record import make_record, write_record

HERE = Path(__file__).resolve().parent
WORK = HERE.parents[1] / "runs" / "optimizer_parity"


def final_losses(rows: list[Row], label: str) -> dict[int, float]:
    """Validation loss by seed; infinite where a run diverged."""
    return {r["seed"]: loss_of(r) for r in rows if r["kind"] == "final" and r["optimizer"] == label}


def judge(settings: Settings, rows: list[Row], optimizer: Optimizer) -> dict[str, Any]:
    """What the result file says of one optimizer, the rule of README.md applied."""
    question, label = settings.question, optimizer.label
    grid, losses = grid_losses(rows, label), final_losses(rows, label)
    rate = best_rate(grid)
    found: dict[str, Any] = {
        "label": label,
        "claim": optimizer.claim,
        "n_parameters": settings.model_config().n_params(),
        "learning_rate": rate,
        "at_edge_of_grid": rate in (min(grid), max(grid)) if rate is not None else None,
        "grid_losses": [{"learning_rate": r, "losses": _finite(values)} for r, values in grid.items()],
        "seeds": sorted(losses),
        "losses": _finite([losses[seed] for seed in sorted(losses)]),
        "is_complete": _is_complete(settings, rows, optimizer),
        "verdict": None,
    }
    for row in rows:
        if row["optimizer"] == label:
            found |= {name: row[name] for name in ("state_bytes", "weight_bytes")}
    finite = [loss for loss in losses.values() if math.isfinite(loss)]
    if len(finite) > 1:
        found |= {"mean_loss": statistics.fmean(finite), "sd_loss": statistics.stdev(finite)}
    reference = final_losses(rows, question["reference"])
    paired = [seed for seed in sorted(losses) if seed in reference]
    if label == question["reference"] or len(paired) < 2:
        return found
    gaps = [(losses[seed] - reference[seed]) / reference[seed] for seed in paired]
    diverged = not all(math.isfinite(gap) for gap in gaps)
    if not diverged:
        low, high = interval(gaps, question["confidence"])
        found |= {"relative_gaps": gaps, "mean_gap": statistics.fmean(gaps), "interval": [low, high]}
    is_paired = found["is_complete"] and paired == settings.final_seeds(optimizer)
    if optimizer.claim and is_paired:
        found["verdict"] = DIFFERENT if diverged else verdict(low, high, question["margin"])
    return found


def results_of(settings: Settings, rows: list[Row]) -> dict[str, Any]:
    """All of the result file's results."""
    return {
        "optimizers": [judge(settings, rows, optimizer) for optimizer in settings.optimizers],
        "programs": _programs(rows),
        "runs": [_short(row) for row in rows],
    }


def _is_complete(settings: Settings, rows: list[Row], optimizer: Optimizer) -> bool:
    grid = [r for r in rows if r["kind"] == "grid" and r["optimizer"] == optimizer.label]
    n_grid = len(settings.grid["learning_rates"]) * len(settings.grid["seeds"])
    seeds = sorted(final_losses(rows, optimizer.label))
    return len(grid) == n_grid and seeds == sorted(settings.final_seeds(optimizer))


def _programs(rows: list[Row]) -> list[dict[str, Any]]:
    """The states of edgejax that rows came from, and how many from each."""
    counts: dict[str, int] = {}
    for row in rows:
        key = json.dumps(row["source"], sort_keys=True)
        counts[key] = counts.get(key, 0) + 1
    return [json.loads(key) | {"n_runs": n} for key, n in counts.items()]


def _short(row: Row) -> Row:
    """A row without what the record says once, its training losses as the means of ten stretches."""
    losses = row["training_losses"]
    size = math.ceil(len(losses) / 10)
    stretches = [losses[first : first + size] for first in range(0, len(losses), size)]
    left_out = ("training_losses", "data", "optimizer_settings", "state_bytes", "weight_bytes")
    kept = {name: value for name, value in row.items() if name not in left_out}
    kept["source"] = row["source"]["sha256"]
    means = [None if None in part else round(statistics.fmean(part), 4) for part in stretches]
    return kept | {"training_loss_means": means}


def _finite(values: list[float]) -> list[float | None]:
    return [value if math.isfinite(value) else None for value in values]


def main() -> None:
    """Write the record of the runs in a work folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=WORK, help="default: runs/optimizer_parity")
    parser.add_argument("--results", type=Path, help="default: results beside this file; quick runs: --work")
    arguments = parser.parse_args()
    settings = Settings.from_json(json.loads((arguments.work / "settings.json").read_text(encoding="utf-8")))
    rows = read_rows(arguments.work / "rows.jsonl")
    if not rows:
        raise SystemExit(f"{arguments.work} holds no finished run; run.py makes them")
    record = make_record(
        "optimizer_parity",
        config=settings.to_json(),
        results=results_of(settings, rows),
        hashes={f"data_{name}": value for name, value in rows[0]["data"].items()},
    )
    folder = arguments.results or (arguments.work if settings.quick else HERE / "results")
    print(write_record(folder / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))
    for found in record["results"]["optimizers"]:
        gap = "gap {:+.3%} to {:+.3%}".format(*found["interval"]) if "interval" in found else "no gap"
        n_runs = f"{len(found['seeds'])} seeds{'' if found['is_complete'] else ', not complete'}"
        print(f"{found['label']}: {gap} ({n_runs}): {found['verdict'] or 'no verdict'}")


if __name__ == "__main__":
    main()
