"""The tables of the newest results: ``python experiments/memory_forecast/render.py`` writes them into README.md here."""

import json
from pathlib import Path
from typing import Any

from edgejax.devices import parse_budget
from edgejax.measure.tables import newest, with_table

HERE = Path(__file__).resolve().parent


def render(path: Path | None) -> str:
    """The table and what has to be known to read it."""
    if path is None:
        return "No result yet."
    record = json.loads(path.read_text(encoding="utf-8"))
    found = record["results"]
    rows = "\n".join(_row(row) for row in found["rows"])
    return f"""\
Measured on {record["device"]["cpu"]}, jax {record["versions"]["jax"]}: [{path.name}](results/{path.name}). {found["n_settings"]} \
settings: the forecast is off by {found["median_error"]:.1%} (median) and {found["worst_error"]:.1%} (worst); the most that a run took \
beyond it is {found["most_short"]:.1%}. Of {found["n_limited"]} runs in a control group of the forecast and 3% more, \
{found["n_ended_within"]} ended well, and {found["n_above_limit"]} had a resident peak above that limit (pages of libraries that others \
use too are not charged to the group).

| setting | forecast, MB | measured, MB | forecast / measured | compiling, MB |
|---|---|---|---|---|
{rows}"""


def _row(row: dict[str, Any]) -> str:
    setting = " ".join(
        value if name == "model" else f"--{name}" if value is True else f"--{name} {value}"
        for name, value in row["setting"].items()
    )
    forecast, peak = row["forecast"]["running_bytes"], row["peak_rss_bytes"]
    compiling = row["forecast"]["compiling_bytes"]
    return f"| {setting} | {forecast / 1e6:.0f} | {peak / 1e6:.0f} | {forecast / peak - 1:+.1%} | {compiling / 1e6:.0f} |"


def render_budgets(path: Path | None) -> str:
    """What ``--memory`` chose for each amount, and the most that any process had."""
    if path is None:
        return "No result yet."
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = "\n".join(_budget_row(row) for row in record["results"]["rows"])
    return f"""\
Measured on {record["device"]["cpu"]}, jax {record["versions"]["jax"]}: [{path.name}](budgets/{path.name}).

| `--memory` | chosen (its forecast) | tried before | largest process, MB | the run, MB | of the amount | tokens/s |
|---|---|---|---|---|---|---|
{rows}"""


def _budget_row(row: dict[str, Any]) -> str:
    if row["exit_status"]:
        return f"| {row['amount']} | ended with {row['exit_status']}: {' '.join(row['said'])} | | | | | |"
    *before, chosen = (line.removeprefix("->").removeprefix("x").strip() for line in row["tried"])
    share = row["peak_rss_bytes"] / parse_budget(row["amount"])
    return (
        f"| {row['amount']} | {chosen} | {'<br>'.join(before)} | {row['largest_process_bytes'] / 1e6:.0f} | "
        f"{row['peak_rss_bytes'] / 1e6:.0f} | {share:.0%} | {row['tokens_per_s']:.0f} |"
    )


def with_tables(readme: str) -> str:
    """The README with its tables replaced."""
    readme = with_table(readme, render(newest(HERE / "results")))
    return with_table(readme, render_budgets(newest(HERE / "budgets")), "budgets")


if __name__ == "__main__":
    target = HERE / "README.md"
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
