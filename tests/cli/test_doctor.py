"""doctor in a process of its own, what it says of a broken machine, and that its gradient check can fail."""

import json
import os
import subprocess
import sys

import pytest

from edgejax.cli import doctor, gradient_check
from edgejax.core.guard import FLAG
from edgejax.measure.checks import CheckResult


def run_doctor(*arguments: str, **environ: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "EDGEJAX_GUARD")}
    return subprocess.run(
        [sys.executable, "-m", "edgejax", "doctor", *arguments],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environ,
        capture_output=True,
        text=True,
        check=False,
    )


def test_json_in_a_fresh_process():
    done = run_doctor("--json")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["passed"]
    assert {check["name"] for check in found["checks"]} == {
        "sum over einsum",
        "vmapped matrix-vector product, then a sum",
        "gradients, lora",
        "gradients, full",
    }
    assert all(check["worst_error"] <= check["tolerance"] for check in found["checks"])
    assert found["numerics_guard"]["state"] == "set by edgejax"
    assert found["devices"][0]["platform"] == "cpu"
    assert found["limits"]["cores_usable"] >= 1
    assert found["disk_free_bytes"]["cache"] > 0
    assert {
        "python",
        "jax",
        "jaxlib",
        "flax",
        "optax",
        "orbax-checkpoint",
        "numpy",
        "gguf",
        "tokenizers",
    } <= set(found["versions"])


def test_the_users_own_flag_is_shown_and_judged_by_its_numbers():
    """With the fusion on, wrong numbers end with 1 where the processor gives them; the report is whole either way."""
    done = run_doctor("--json", XLA_FLAGS=f"{FLAG}=+reduce")
    found = json.loads(done.stdout)
    assert found["numerics_guard"]["state"] == "set by the user"
    assert not found["numerics_guard"]["in_place"]
    assert done.returncode == (0 if found["passed"] else 1)


@pytest.fixture
def few_checks(monkeypatch):
    """Replaces the checks by ready results."""

    def use(*results):
        monkeypatch.setattr(doctor, "run_checks", lambda: [doctor._guarded("planted", r) for r in results])

    return use


def result(passed: bool, error: float):
    return lambda: CheckResult(name="planted", passed=passed, worst_error=error, tolerance=1e-5, detail="d")


@pytest.mark.quick
def test_a_failed_check_ends_with_1(few_checks, capsys):
    from edgejax.cli.main import main

    few_checks(result(True, 1e-7), result(False, 0.5))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    assert "1 of 2 checks failed" in out
    few_checks(result(True, 1e-7))
    assert main(["doctor"]) == 0
    assert "all checks passed" in capsys.readouterr().out


@pytest.mark.quick
def test_infinite_errors_are_valid_json(few_checks, capsys):
    from edgejax.cli.main import main

    few_checks(result(False, float("inf")))
    assert main(["doctor", "--json"]) == 1
    (check,) = json.loads(capsys.readouterr().out)["checks"]
    assert check["worst_error"] is None
    assert "not a finite number" in check["detail"]


@pytest.mark.quick
def test_a_check_that_cannot_run_has_failed(few_checks, capsys):
    from edgejax.cli.main import main

    def broken():
        raise ZeroDivisionError("planted\nsecond line")

    few_checks(broken)
    assert main(["doctor"]) == 1
    assert "could not run: ZeroDivisionError: planted" in capsys.readouterr().out


@pytest.mark.parametrize("mode", ["lora", "full"])
def test_gradient_check_passes_and_notices(mode):
    right = gradient_check.check_gradients(mode)
    assert right.passed, right
    wrong = gradient_check.check_gradients(mode, perturb=1e-5)
    assert not wrong.passed, wrong


def test_gradient_check_notices_a_wrong_model(monkeypatch):
    monkeypatch.setattr(gradient_check, "_rotate", lambda x, cos, sin: x)
    assert not gradient_check.check_gradients("lora").passed
