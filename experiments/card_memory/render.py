"""The tables of the newest results: ``python experiments/card_memory/render.py`` writes them into README.md here."""

import json
from pathlib import Path
from typing import Any

from lengths import SPARE, longest

from edgejax.measure.tables import newest, with_table

HERE = Path(__file__).resolve().parent


def render(path: Path | None) -> str:
    """The table and what has to be known to read it."""
    if path is None:
        return "No result yet."
    record = json.loads(path.read_text(encoding="utf-8"))
    card, (plugin, version) = record["config"]["card"]["name"], record["config"]["plugin"]
    rows = "\n".join(row for case in record["results"]["cases"] for row in _rows(case))
    return f"""\
Compiled for {card} (buffer assignment of {plugin} {version}), nothing measured: [{path.name}](results/{path.name}). \
Arguments + outputs - alias + temp of one step of 1 row; speed is calculated from operations, beside the same step that \
keeps everything.

| model | trained | positions | settings | GiB | less than the usual step in bfloat16 | in float32 | speed |
|---|---|---|---|---|---|---|---|
{rows}"""


def _rows(case: dict[str, Any]) -> list[str]:
    start = f"| {case['model']} | {'LoRA' if case['mode'] == 'lora' else 'all parameters'} | {case['seq']} |"
    usual = case["baseline_peak_bytes"]
    rows = [f"{start} the usual step, {dtype} | {_gib(size)} | | | |" for dtype, size in usual.items()]
    for option in case["options"]:
        peak = option["peak_bytes"]
        less = [f"{1 - peak / usual[dtype]:.0%}" for dtype in ("bfloat16", "float32")]
        rows.append(
            f"{start} `{option['options']}` | {_gib(peak)} | {' | '.join(less)} | {option['relative_speed']:.2f} |"
        )
    return rows


def render_sequences(path: Path | None) -> str:
    """For each kind of training a table: what rows of 1024 positions take, and the longest that fit."""
    if path is None:
        return "No result yet."
    record = json.loads(path.read_text(encoding="utf-8"))
    config, results = record["config"], record["results"]
    plugin, version = config["plugin"]
    by_memory: dict[int, list[str]] = {}
    for card, size in config["cards"].items():
        by_memory.setdefault(size, []).append(card.removeprefix("NVIDIA ").removeprefix("GeForce "))
    tables = [_sequences_table(kind, config, results["rows"], by_memory) for kind in config["settings"]]
    return f"""\
Compiled for {config["compiled_for"]} (buffer assignment of {plugin} {version}), nothing measured: \
[{path.name}](sequences/{path.name}). One row a step; {_gib(config["reserve_bytes"])} GiB of each card are left for what no \
buffer assignment sees, and {SPARE:.0%} of the rest for the error of the lines. Cells: the longest row that fits, ours / the usual step in bfloat16; "all" is the model's context, \
"no" not even 128 positions.

{(chr(10) * 2).join(tables)}

{_checks(results["checks"])}"""


def _sequences_table(
    kind: str, config: dict[str, Any], rows: list[dict[str, Any]], by_memory: dict[int, list[str]]
) -> str:
    of_kind = {(row["model"], row["side"]): row for row in rows if row["kind"] == kind}
    columns = [f"{size / 2**30:.0f} GB ({', '.join(cards)})" for size, cards in by_memory.items()]
    head = ["model", "context", "GiB at 1024", "of which", "the usual step", "less", *columns]
    lines = [
        f"**{kind}**: `{config['settings'][kind]}`",
        "",
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
    ]
    for (model, side), ours in of_kind.items():
        if side != "ours":
            continue
        usual = next(
            (row for (name, other), row in of_kind.items() if name == model and other != "ours"), None
        )
        at, usual_at = (None if row is None else _at_1024(row) for row in (ours, usual))
        assert at is not None
        sources = ", ".join(f"{name} {_gib(size)}" for name, size in at["sources_bytes"].items())
        less = ["", ""] if usual_at is None else [
            _gib(usual_at["peak_bytes"]), f"{1 - at['peak_bytes'] / usual_at['peak_bytes']:.0%}"
        ]  # fmt: skip
        cells = [
            " / ".join(
                _longest(row, (1 - SPARE) * (size - config["reserve_bytes"]))
                for row in (ours, usual)
                if row is not None
            )
            for size in by_memory
        ]
        lines.append(
            f"| {' | '.join([model, str(ours['context']), _gib(at['peak_bytes']), sources, *less, *cells])} |"
        )
    return "\n".join(lines)


def _at_1024(row: dict[str, Any]) -> dict[str, Any]:
    return next(point for point in row["points"] if point["seq"] == 1024)


def _longest(row: dict[str, Any], budget_bytes: float) -> str:
    found = longest(row["points"], budget_bytes, row["context"], parabola=row["side"] != "ours").seq
    return "no" if not found else "all" if found == row["context"] else str(found)


def _checks(checks: list[dict[str, Any]]) -> str:
    lines = [
        "Compiled again at the length that was found without that spare, for the card itself:",
        "",
        "| card | model | trained | step | positions | predicted, GiB | compiled, GiB | off by |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in checks:
        start = f"| {one['card'].removeprefix('NVIDIA ')} | {one['model']} | {one['kind']} | {one['side']} |"
        if not one["seq"]:
            lines.append(f"{start} no | | | |")
            continue
        predicted, compiled = one["predicted_bytes"], one["compiled_bytes"]
        lines.append(
            f"{start} {one['seq']} | {_gib(predicted)} | {_gib(compiled)} | {predicted / compiled - 1:+.1%} |"
        )
    return "\n".join(lines)


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f}"


def with_tables(document: str) -> str:
    """The README with the tables of the newest results."""
    document = with_table(document, render(newest(HERE / "results")))
    return with_table(document, render_sequences(newest(HERE / "sequences")), "sequences")


if __name__ == "__main__":
    target = HERE / "README.md"
    target.write_text(with_tables(target.read_text(encoding="utf-8")), encoding="utf-8")
