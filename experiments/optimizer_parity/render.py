"""The table of the newest result: ``python experiments/optimizer_parity/render.py`` writes it into README.md here."""

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
    config, results, device = record["config"], record["results"], record["device"]
    margin, confidence = config["question"]["margin"], config["question"]["confidence"]
    reference = config["question"]["reference"]
    rows = "\n".join(_row(found, reference) for found in results["optimizers"])
    programs = len(results["programs"])
    minutes = sum(run["cpu_s"] for run in results["runs"]) / 60
    notes = "".join(
        f"\n- {found['label']}: its best learning rate, {found['learning_rate']:g}, is at an edge of the grid."
        for found in results["optimizers"]
        if found["at_edge_of_grid"] and found["is_complete"]
    )
    quick = "**Made with --quick: no answer to anything.** " if config["quick"] else ""
    return f"""\
{quick}Measured on {device["cpu"]}, {record["limits"]["cores_affinity"]} cores, [{path.name}](results/{path.name}): \
{len(results["runs"])} runs, {minutes:.0f} CPU minutes without compiling, of {programs} state{"s" * (programs > 1)} of \
edgejax. Loss and gap are of the validation topics; the gap is relative to {reference} with the \
same seed, its interval {confidence:.0%}, the margin {margin:.1%}.

| optimizer | state, bytes a parameter | weights, bytes a parameter | learning rate | seeds | loss, mean (sd) | gap, \
mean | gap, interval | verdict |
|---|---|---|---|---|---|---|---|---|
{rows}
{notes}""".rstrip()


def _row(found: dict[str, Any], reference: str) -> str:
    if "state_bytes" not in found:
        return f"| {found['label']} | | | | 0 | | | | not run |"
    n_parameters = found["n_parameters"]
    loss = f"{found['mean_loss']:.4f} ({found['sd_loss']:.4f})" if "mean_loss" in found else ""
    gap, interval = "", ""
    if "interval" in found:
        low, high = found["interval"]
        gap, interval = f"{found['mean_gap']:+.2%}", f"{low:+.2%} to {high:+.2%}"
    rate = "all diverged" if found["learning_rate"] is None else f"{found['learning_rate']:g}"
    unjudged = "reference" if found["label"] == reference else "no claim"
    judged = found["verdict"] or (unjudged if found["is_complete"] else "not complete")
    return (
        f"| {found['label']} | {found['state_bytes'] / n_parameters:.2f} | "
        f"{found['weight_bytes'] / n_parameters:.2f} | {rate} | {len(found['seeds'])} | {loss} | {gap} | {interval} | "
        f"{judged} |"
    )


if __name__ == "__main__":
    target = HERE / "README.md"
    table = render(newest(HERE / "results"))
    target.write_text(with_table(target.read_text(encoding="utf-8"), table), encoding="utf-8")
