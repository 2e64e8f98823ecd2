"""What a person reads when a run has ended."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from edgejax.cli.summary import closing_text
from edgejax.measure.memory import MemoryReport

MIB = 2**20


def result(**memory):
    report = {
        "weights_bytes": 10 * MIB, "trainable_bytes": 2 * MIB, "optimizer_bytes": 4 * MIB, "activations_bytes": 8 * MIB,
        "runtime_bytes": 16 * MIB, "peak_rss_bytes": 50 * MIB,
    }  # fmt: skip
    evaluation = SimpleNamespace(loss=1.0, perplexity=2.72)
    return SimpleNamespace(
        mode="lora", held_out_before=evaluation, held_out_after=evaluation, tokens_per_s=None, seconds=61.0, steps=3,
        memory=MemoryReport(**report | memory), run_dir=Path("run"),
    )  # fmt: skip


@pytest.mark.quick
def test_sources_add_up_to_the_peak():
    text = closing_text(result(), None, Path("a"), Path("p"))
    assert "peak memory          50.0 MiB resident" in text
    sizes = [float(line.split()[-2]) for line in text.splitlines() if line.startswith("  ")]
    assert sum(sizes) == 50
    assert "device memory" not in text  # a CPU has none of its own


@pytest.mark.quick
def test_an_accelerators_memory_stands_beside_the_steps():
    text = closing_text(
        result(device_peak_bytes=30 * MIB, step_peak_bytes=24 * MIB), None, Path("a"), Path("p")
    )
    assert "device memory        30.0 MiB in use at its most, 24.0 MiB by the compiled step" in text
