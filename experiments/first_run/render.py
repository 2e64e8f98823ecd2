"""The README's numbers from a result file: ``python experiments/first_run/render.py`` writes them into README.md."""

import json
import statistics
from pathlib import Path
from typing import Any

from edgejax.core.units import format_bytes
from edgejax.measure.tables import newest, with_table

ROOT = Path(__file__).resolve().parents[2]
RESULTS = Path(__file__).parent / "results"
FIGURES = (
    "tokens_per_s_median",
    "fraction_of_matmul_peak",
    "xla_temp_bytes",
    "peak_rss_bytes",
    "first_step_s",
)


def render(path: Path) -> str:
    """The README's paragraph and table about a result file."""
    record = json.loads(path.read_text(encoding="utf-8"))
    results, device = record["results"], record["device"]
    run = results["finetune"]
    before, after = run["held_out_before"], run["held_out_after"]
    rows = "\n".join(
        _row(name, results[key] if isinstance(results[key], list) else [results[key]])
        for name, key in (
            ("all activations kept", "no_remat"),
            ("recomputed (`--remat full`, the default)", "remat"),
            ("the same, compile cache warm", "remat_warm"),
            ("two values a layer kept in bf16 (`--remat mlp --boundaries bf16`)", "remat_kept"),
        )
    )
    full, kept = (relative_speed(results[name], results["no_remat"]) for name in ("remat", "remat_kept"))
    return f"""\
Measured on {device["cpu"]}, {record["limits"]["cores_affinity"]} cores, \
[{path.name}]({path.relative_to(ROOT).as_posix()}): {run["steps"]} steps take the held-out perplexity from \
{before["perplexity"]:.2f} to {after["perplexity"]:.2f} in {run["seconds"]:.0f} s at \
{run["tokens_per_s_median"]:.0f} tokens/s, evaluations and compiling included in the time; the process peaks at \
{format_bytes(run["memory"]["peak_rss_bytes"])}. The step by itself (LoRA rank 8, 1 x 512 tokens, 4-bit base):

| activations | tokens/s | of the float32 matmul peak | XLA temp | peak of the process | first step after |
|---|---|---|---|---|---|
{rows}

Recomputing all runs at {full:.0%} of the speed of the first row, recomputing what is not kept in bf16 at {kept:.0%} \
(medians of {len(results["remat"])} runs in turns). The matmul peak is measured in turns with the steps of the same \
process; the machine is shared, so speeds vary by some ten percent from run to run."""


def relative_speed(runs: list[dict[str, Any]], others: list[dict[str, Any]]) -> float:
    """Median over rounds of a run's speed against the other's of the same round."""
    return statistics.median(
        ours["tokens_per_s_median"] / theirs["tokens_per_s_median"]
        for ours, theirs in zip(runs, others, strict=True)
    )


def _row(name: str, runs: list[dict[str, Any]]) -> str:
    found = {key: statistics.median(run[key] for run in runs) for key in FIGURES}
    return (
        f"| {name} | {found['tokens_per_s_median']:.0f} | {found['fraction_of_matmul_peak']:.1%} | "
        f"{format_bytes(found['xla_temp_bytes'])} | {format_bytes(found['peak_rss_bytes'])} | "
        f"{found['first_step_s']:.1f} s |"
    )


if __name__ == "__main__":
    target, result = ROOT / "README.md", newest(RESULTS)
    assert result is not None  # there is one in the repository
    target.write_text(with_table(target.read_text(encoding="utf-8"), render(result)), encoding="utf-8")
