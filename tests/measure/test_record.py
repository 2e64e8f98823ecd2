"""A result record is complete, is written once, and is whole or not there."""

import json
import subprocess
from pathlib import Path

import pytest

from edgejax.core.errors import RunError
from edgejax.measure.record import make_record, source_state, write_record

pytestmark = pytest.mark.quick


def test_holds_what_is_needed_to_judge_a_number(tmp_path):
    record = make_record(
        "bench",
        config={"seq": 512},
        results={"step_s": [0.5, 0.25]},
        seeds={"weights": 3},
        hashes={"model": "ab"},
    )
    read = json.loads(write_record(tmp_path / "runs" / "a.json", record).read_text())
    assert read["kind"] == "bench"
    assert read["results"]["step_s"] == [0.5, 0.25]
    assert read["seeds"] == {"weights": 3}
    assert read["hashes"] == {"model": "ab"}
    assert read["versions"]["jax"]
    assert read["device"]["platform"] == "cpu"
    assert read["limits"]["cores_affinity"] >= 1
    assert read["numerics_guard"]["state"]
    assert read["written_at"].startswith("20")
    assert "load_average" in read
    assert "source" in read


def test_refuses_to_overwrite(tmp_path):
    path = write_record(tmp_path / "a.json", {"x": 1})
    with pytest.raises(RunError, match="never overwritten"):
        write_record(path, {"x": 2})
    assert json.loads(path.read_text()) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, value):
    with pytest.raises(RunError, match="not finite"):
        write_record(tmp_path / "a.json", {"loss": value})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="choose another place"):
        write_record(tmp_path / "file" / "a.json", {"x": 1})


def test_source_state_is_the_commit_of_its_own_repository(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
        done = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return done.stdout.strip()

    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert source_state(package) is None
    git("init", "-q")
    assert source_state(package) is None  # someone else's repository, as for a package in a project's .venv
    git("add", "package")
    git("commit", "-qm", "start")
    assert source_state(package) == {"commit": git("rev-parse", "HEAD"), "dirty": False}
    (Path(package) / "__init__.py").write_text("x = 1\n")
    assert source_state(package)["dirty"] is True
