"""The tables in this folder's README.md from the newest result: ``python experiments/residuals/render.py``."""

import json
from pathlib import Path
from typing import Any

from edgejax.measure.tables import newest, with_table

HERE = Path(__file__).parent


def render(path: Path) -> str:
    """Both tables."""
    record = json.loads(path.read_text(encoding="utf-8"))
    results, source = record["results"], f"[{path.name}](results/{path.name})"
    return "\n\n".join(
        [
            f"From {source}, on {record['device']['cpu']}. The worst layer of {_n_layers(results)}; in brackets the median.",
            _gradients(results),
            _stream(results["stream"]),
            "XLA temp of a LoRA training step, compiled for this CPU (MB = 10^6 bytes):",
            _temps(results["step_temp_bytes"]),
        ]
    )


def _n_layers(results: dict[str, Any]) -> int:
    return len(next(iter(next(iter(results["gradients"].values())).values()))["cosine"])


def _gradients(results: dict[str, Any]) -> str:
    states = list(results["gradients"])
    f32 = results["stored_bytes"]["f32"] / 4
    lines = [
        "| remat, boundaries | bytes a value | "
        + " | ".join(f"cosine {state} | norm off by" for state in states)
        + " |",
        "|---|--:|" + "--:|--:|" * len(states),
    ]
    for name, stored in results["stored_bytes"].items():
        cells = [name, f"{stored / f32:.3f}"]
        for state in states:
            found = results["gradients"][state][name]
            cosines = sorted(found["cosine"])
            cells.append(f"{cosines[0]:.6f} ({cosines[len(cosines) // 2]:.6f})")
            cells.append(f"{max(abs(ratio - 1) for ratio in found['norm_ratio']):.2%}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _stream(found: dict[str, list[float]]) -> str:
    ratio = max(a / b for a, b in zip(found["largest_size"], found["median_size"], strict=True))
    channel, change = (
        found["largest_channel_over_median_channel"],
        sorted(found["change_over_size_median_of_tokens"]),
    )
    return (
        f"The stream: its largest value is up to {ratio:,.0f} times the median one, its largest channel {min(channel):.0f} "
        f"to {max(channel):.0f} times the median one (mean sizes over tokens). From a layer to the next it changes by "
        f"{change[len(change) // 2]:.2f} of its norm (median of layers; {change[0]:.2f} to {change[-1]:.2f}, the largest "
        "in the first)."
    )


def _temps(found: dict[str, dict[str, int]]) -> str:
    shapes = list(found)
    lines = ["| | " + " | ".join(shapes) + " |", "|---|" + "--:|" * len(shapes)]
    for name in found[shapes[0]]:
        lines.append(
            f"| {name} | " + " | ".join(f"{found[shape][name] / 1e6:.1f}" for shape in shapes) + " |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    target, result = HERE / "README.md", newest(HERE / "results")
    assert result is not None  # there is one in the repository
    target.write_text(with_table(target.read_text(encoding="utf-8"), render(result)), encoding="utf-8")
