"""From ``runs.jsonl`` to a result file: ``python experiments/memory_forecast/analyse.py``; then ``render.py``."""

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

from edgejax.measure.record import make_record, write_record
from edgejax.plan import process

HERE = Path(__file__).resolve().parent


def analyse(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """How far the forecasts were from what was measured, and how many runs ended within their limits."""
    errors = [row["forecast"]["running_bytes"] / row["peak_rss_bytes"] - 1 for row in rows]
    short = [row["peak_rss_bytes"] / row["forecast"]["running_bytes"] - 1 for row in rows]
    limited = [row for row in rows if row["limit_bytes"] is not None]
    return {
        "n_settings": len(rows),
        "median_error": statistics.median(map(abs, errors)),
        "worst_error": max(map(abs, errors)),
        "most_short": max(short),
        "n_limited": len(limited),
        "n_ended_within": sum(row["exit_status"] == 0 for row in limited),
        "n_above_limit": sum(row["peak_rss_bytes"] > row["limit_bytes"] for row in limited),
    }


def main() -> None:
    """Writes one result file, which is never overwritten."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "runs" / "memory_forecast")
    path = parser.parse_args().work / "runs.jsonl"
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    constants = {name: value for name, value in vars(process).items() if name.endswith("_BYTES")}
    record = make_record("memory_forecast", config=constants, results={"rows": rows, **analyse(rows)})
    print(write_record(HERE / "results" / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))


if __name__ == "__main__":
    main()
