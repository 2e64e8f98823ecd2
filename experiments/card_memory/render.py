"""The table of the newest result: ``python experiments/card_memory/render.py`` writes it into README.md here."""

import json
from pathlib import Path
from typing import Any

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


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / 2**30:.2f}"


if __name__ == "__main__":
    target = HERE / "README.md"
    table = render(newest(HERE / "results"))
    target.write_text(with_table(target.read_text(encoding="utf-8"), table), encoding="utf-8")
