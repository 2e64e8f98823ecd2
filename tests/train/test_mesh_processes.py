"""Two real processes on this machine: the numbers of one, and what happens when one is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model
from helpers.tiny_run import LORA, make_model, make_rows, make_settings

from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_paths
from edgejax.train import SilentProgress, finetune, read_metrics
from edgejax.train.links import free_port
from edgejax.train.processes import check_processes

pytestmark = pytest.mark.slow
TESTS = Path(__file__).resolve().parents[1]
BOUND = 2e-6  # of a leaf's largest element, as in test_mesh.py
STEPS = 40


class Pair:
    """Two processes of one run, with one device each."""

    def __init__(self, folder: Path, command: list[str], arguments) -> None:
        path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
        self.errors = [folder / f"stderr-{index}.txt" for index in (0, 1)]
        self.started = []
        for index, file in enumerate(self.errors):
            with open(file, "w") as stderr:
                self.started.append(
                    subprocess.Popen(
                        [sys.executable, "-m", *command, *arguments(index)], stdout=subprocess.PIPE, stderr=stderr,
                        text=True, env={**os.environ, "PYTHONPATH": path},
                    )
                )  # fmt: skip

    def __enter__(self) -> "Pair":
        return self

    def __exit__(self, *exc_info) -> None:
        for process in self.started:
            process.kill()
            process.communicate()

    def end(self) -> tuple[list[int], list[str], list[str]]:
        """Exit codes, standard outputs and standard errors."""
        outputs = [process.communicate(timeout=600)[0] for process in self.started]
        return [p.returncode for p in self.started], outputs, [file.read_text() for file in self.errors]


def driver(folder: Path, what: str, run: Path, *arguments: str) -> Pair:
    port = str(free_port())
    return Pair(folder, ["helpers.mesh_driver", what], lambda index: [str(run), str(index), port, *arguments])


def train(folder: Path, pause_s: float = 0.0, **changes) -> Pair:
    changes = {"steps": STEPS, "eval_every": None, **changes}
    return driver(folder, "train", folder / "run", str(pause_s), json.dumps(changes))


def checkpoints(run: Path) -> list[int]:
    return sorted(int(p.name) for p in (run / "checkpoints").glob("*") if p.name.isdigit())


def assert_close(ours: Path, theirs: dict, bound: float = BOUND) -> None:
    found = np.load(ours)
    for name, leaf in theirs.items():
        assert np.abs(found[name] - leaf).max() / np.abs(leaf).max() < bound, name


@pytest.mark.parametrize("mesh", ["data=2", "shard=2"])
def test_two_processes_are_one_device(tmp_path, mesh):
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    alone = "from helpers.mesh_driver import *; np.savez(sys.argv[1], **jax.device_get(three_steps('f32', None, 8)[0]))"
    subprocess.run(
        [sys.executable, "-c", alone, str(tmp_path / "alone.npz")],
        check=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    with driver(tmp_path, "process", tmp_path, mesh) as pair:
        codes, _, errors = pair.end()
    assert codes == [0, 0], errors
    assert_close(tmp_path / f"processes-{mesh}.npz", dict(np.load(tmp_path / "alone.npz")))
    figures = json.loads((tmp_path / f"processes-{mesh}.json").read_text())
    assert len(figures["bytes_per_device"]) == 1  # of this process's device
    whole, repeated = figures["whole_bytes"], sum(figures["repeated"].values())
    expected = whole if mesh == "data=2" else (whole - repeated) / 2 + repeated
    assert expected <= figures["bytes_per_device"][0] <= expected + 8


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run of one device that the others are compared with."""
    settings = make_settings(steps=STEPS, batch_size=2, eval_every=None)
    return finetune(
        make_model(), make_rows(), make_rows(1, 5), settings, lora=LORA,
        out_dir=tmp_path_factory.mktemp("alone") / "run", progress=SilentProgress(),
    )  # fmt: skip


@pytest.mark.parametrize("victim", [0, 1])
def test_a_process_is_killed_and_all_go_on_from_the_checkpoint(tmp_path, alone, victim):
    run = tmp_path / "run"
    with train(tmp_path, 0.1) as pair:
        started = time.monotonic()
        while not checkpoints(run):
            assert time.monotonic() - started < 300
            assert all(process.poll() is None for process in pair.started), [
                f.read_text() for f in pair.errors
            ]
            time.sleep(0.05)
        pair.started[victim].send_signal(signal.SIGKILL)
        killed = time.monotonic()
        code = pair.started[1 - victim].wait(timeout=60)
        seconds = time.monotonic() - killed
        message = pair.errors[1 - victim].read_text()
    print(f"process {victim} killed: the other ended after {seconds:.2f} s")
    assert code == 2
    assert seconds < 10  # a minute is promised; 0.2 s was seen
    assert f"edgejax: process {victim} is gone: its connection was closed." in message
    assert (
        f"so process {1 - victim} of 2 stops too. The checkpoints that were written stay. Go on with this."
        in message
    )
    saved = checkpoints(run)
    assert saved
    assert saved[-1] < STEPS
    with train(tmp_path) as pair:
        codes, _, errors = pair.end()
    assert codes == [0, 0], errors
    steps = [r["step"] for r in read_metrics(run / "metrics.jsonl") if r["kind"] == "train"]
    assert steps == list(range(1, STEPS + 1))
    assert_close(tmp_path / "run.npz", tree_paths(alone.trainable), 1e-4)
    assert float(np.load(tmp_path / "run.npz")["held_out"]) == pytest.approx(
        alone.held_out_after.loss, rel=1e-5
    )


def test_a_signal_to_one_stops_all_at_the_same_step(tmp_path, alone):
    run = tmp_path / "run"
    with train(tmp_path, 0.1) as pair:
        while not checkpoints(run):
            time.sleep(0.05)
        pair.started[1].send_signal(signal.SIGTERM)
        codes, _, errors = pair.end()
    assert codes == [143, 143], errors
    saved = checkpoints(run)[-1]
    for error in errors:
        assert (
            f"stopped by SIGTERM after step {saved} of {STEPS}; the checkpoint of step {saved} is in" in error
        )
    # One process with one device goes on: a checkpoint does not depend on the mesh.
    settings = make_settings(steps=STEPS, batch_size=2, eval_every=None)
    result = finetune(
        make_model(), make_rows(), make_rows(1, 5), settings, lora=LORA, out_dir=run, progress=SilentProgress(),
        resume=True,
    )  # fmt: skip
    assert result.figures[0].step == saved + 1
    assert result.held_out_after.loss == pytest.approx(alone.held_out_after.loss, rel=1e-5)


def test_processes_that_were_given_different_settings(tmp_path):
    port = str(free_port())

    def arguments(index: int) -> list[str]:
        return [str(tmp_path / "run"), str(index), port, "0", json.dumps({"learning_rate": 0.01 + index})]

    with Pair(tmp_path, ["helpers.mesh_driver", "train"], arguments) as pair:
        codes, _, errors = pair.end()
    assert codes == [2, 2]
    assert "process 1 was given something else than process 0: learning_rate 1.01, not 0.01" in errors[1]
    assert "process 1 was given something else than process 0; its own message says what" in errors[0]
    assert not (tmp_path / "run").exists()


def test_the_command_line_with_two_processes(tmp_path):
    model, text = write_tiny_model(tmp_path / "model"), tmp_path / "text.jsonl"
    lines = [json.dumps({"text": f"number {i} jumps over the lazy dog"}) for i in range(40)]
    text.write_text("\n".join(lines))
    port = free_port()

    def arguments(index: int) -> list[str]:
        return [
            "finetune", "--model", str(model), "--data", str(text), "--seq", "32", "--batch", "2", "--steps", "4",
            "--prompt", "number", "--sample-tokens", "2", "--out", str(tmp_path / "run"), "--mesh", "shard=2", "--json",
            "--coordinator", f"127.0.0.1:{port}", "--processes", "2", "--process-index", str(index),
        ]  # fmt: skip

    with Pair(tmp_path, ["edgejax"], arguments) as pair:
        codes, outputs, errors = pair.end()
    assert codes == [0, 0], errors
    result = json.loads(outputs[0].splitlines()[-1])
    assert result["steps"] == 4
    assert result["held_out_after"]["loss"] < result["held_out_before"]["loss"]
    assert "mesh shard=2: a device holds" in errors[0]
    assert "held-out" not in outputs[1] + errors[1]  # process 0 alone tells
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["settings"]["mesh"] == "shard=2"
    assert not {"coordinator", "processes", "process_index"} & set(config["command"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((None, 2, None), "--processes needs a --coordinator host:port"),
        ((None, 2, 0), "--processes and --process-index need a --coordinator host:port"),
        (("auto", None, 0), "--process-index needs another --coordinator than auto"),
        (("here", 2, 0), "'here' is no address; write it as host:port"),
        (("host:1", 2, None), "--coordinator host:1 needs --process-index too"),
        (("host:1", None, None), "needs --processes and --process-index too"),
        (("host:1", 1, 0), "--processes 1 .* 2 processes or more"),
        (("host:1", 2, 2), "--process-index 2.*count from 0"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, message):
    with pytest.raises(ConfigError, match=message):
        check_processes(*arguments)
    with contextlib.suppress(ConfigError):
        check_processes(None, None, None)
