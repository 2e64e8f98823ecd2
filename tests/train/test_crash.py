"""Runs in processes of their own, killed and interrupted: nothing is lost and the bits are the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from edgejax.train import read_metrics

TESTS = Path(__file__).resolve().parents[1]
N_KILLS = 20


def drive(*arguments: str) -> dict:
    result = subprocess.run(
        [sys.executable, "-m", "helpers.crash_driver", *arguments],
        capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": str(TESTS)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def curve(folder: Path) -> list[tuple]:
    return [
        (r["kind"], r["step"], r["loss"], r.get("grad_norm"))
        for r in read_metrics(folder / "metrics.jsonl")
        if "loss" in r
    ]


def assert_same_run(a: Path, b: Path) -> None:
    assert (a / "trained.txt").read_text() == (b / "trained.txt").read_text()
    assert curve(a) == curve(b)


@pytest.mark.slow
def test_kill_nine_at_random_moments(tmp_path):
    """20 kills, every one resumed, and the bits of the end are those of an unbroken run."""
    kills = drive("kill", str(tmp_path), str(N_KILLS), "1")["kills"]
    assert len(kills) == N_KILLS
    steps = [kill["step"] for kill in kills]
    assert steps == sorted(steps), "a kill lost a finished checkpoint"
    assert len(set(steps)) >= 6, "the kills did not come at different steps"
    assert not list((tmp_path / "broken").glob("checkpoints_damaged/*")), "a checkpoint was left half written"
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


@pytest.mark.slow
@pytest.mark.parametrize(
    "names",
    [
        ("adamw", "adamw8bit", "adamw4bit/layerwise", "apollo"),
        ("apollo_mini/layerwise", "scale_sgd", "lion8bit/layerwise", "sgd8bit"),
    ],
)
def test_every_optimizer_goes_on_with_the_same_bits_after_kill_nine(tmp_path, names):
    saved = drive("optimizers", str(tmp_path), *names)
    for name in names:
        assert saved[name] >= 3, f"{name} was killed before it had a checkpoint"
        optimizer, _, schedule = name.partition("/")
        whole, broken = (tmp_path / f"{optimizer}-{schedule}-{what}" for what in ("whole", "broken"))
        assert_same_run(whole, broken)
        assert (broken / "checkpoints").is_dir()


def test_signals_save_and_say_how_to_go_on(tmp_path):
    seen = drive("signals", str(tmp_path))
    for name, code in (("SIGINT", 130), ("SIGTERM", 143)):
        assert seen[name]["code"] == code
        assert seen[name]["saved"] >= 5
        assert f"stopped by {name} after step {seen[name]['saved']} of" in seen[name]["error"]
        assert "resume" in seen[name]["error"]
        assert seen[name]["resumed"] == 0
        assert_same_run(tmp_path / "whole", tmp_path / name)
    assert seen["second"]["alive_after_first"]
    assert seen["second"]["code"] == 130
    assert seen["second"]["seconds"] < 2
