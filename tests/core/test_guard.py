"""The guard in fresh processes: set before JAX starts, too late after, the user's own choice, child processes."""

import json
import os
import subprocess
import sys
import warnings

import pytest

from edgejax.core import guard

FLAG = f"{guard.FLAG}=-reduce"
REPORT = """
import dataclasses, json, os, sys
import edgejax
from edgejax.core.guard import guard_status
status = guard_status()
print(json.dumps({**dataclasses.asdict(status), "in_place": status.in_place, "flags": os.environ.get("XLA_FLAGS"),
                  "jax_imported": "jax" in sys.modules}))
"""
NUMBERS = """
import edgejax, json
from edgejax.measure.checks import numerics_checks
print(json.dumps([check.passed for check in numerics_checks()]))
"""


def run_fresh(program: str, **environ: str) -> tuple[object, str]:
    """The last line a fresh Python prints, as JSON, and its standard error."""
    clean = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "EDGEJAX_GUARD")}
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=clean | {"JAX_PLATFORMS": "cpu"} | environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.quick
def test_sets_the_flag_without_importing_jax():
    status, errors = run_fresh(REPORT)
    assert status["state"] == "set by edgejax"
    assert status["in_place"]
    assert status["flags"] == FLAG
    assert not status["jax_imported"]
    assert errors == ""


@pytest.mark.quick
def test_keeps_the_users_other_flags_and_they_still_work():
    program = REPORT + "import jax\nprint(json.dumps([os.environ['XLA_FLAGS'], jax.device_count()]))"
    (flags, devices), _ = run_fresh(program, XLA_FLAGS="--xla_force_host_platform_device_count=3")
    assert flags == f"--xla_force_host_platform_device_count=3 {FLAG}"
    assert devices == 3


@pytest.mark.quick
def test_flags_in_a_file_are_kept(tmp_path):
    file = tmp_path / "flags.txt"
    file.write_text("--xla_force_host_platform_device_count=2\n")
    program = REPORT + "import jax\nprint(json.dumps([guard_status().state, jax.device_count()]))"
    (state, devices), _ = run_fresh(program, XLA_FLAGS=str(file))
    assert (state, devices) == ("set by edgejax", 2)


@pytest.mark.quick
@pytest.mark.parametrize(("value", "in_place"), [("", True), ("individual_dot", True), ("reduce", False)])
def test_respects_what_the_user_set(value, in_place):
    flags = f"{guard.FLAG}={value} --xla_cpu_enable_fast_math=false"
    status, errors = run_fresh(REPORT, XLA_FLAGS=flags)
    assert (status["state"], status["value"], status["in_place"]) == ("set by the user", value, in_place)
    assert status["flags"] == flags
    assert errors == ""


@pytest.mark.quick
def test_says_loudly_when_it_is_too_late():
    status, errors = run_fresh("import jax\njax.devices()\n" + REPORT)
    assert (status["state"], status["in_place"], status["flags"]) == ("too late", False, None)
    assert "NumericsGuardWarning" in errors
    assert FLAG in errors  # what to do


@pytest.mark.quick
def test_jax_may_be_imported_first_as_long_as_it_has_not_started():
    results, errors = run_fresh("import jax\nimport jax.numpy\n" + NUMBERS)
    assert results == [True, True]
    assert "NumericsGuardWarning" not in errors


def test_a_child_process_knows_whose_flag_it_inherits():
    program = REPORT + (
        "import subprocess\n"
        f"print(subprocess.run([sys.executable, '-c', {REPORT!r}], capture_output=True, text=True).stdout.strip())"
    )
    status, _ = run_fresh(program)
    assert status["state"] == "set by edgejax"


def test_both_reproducers_are_right_under_the_guard():
    results, _ = run_fresh(NUMBERS)
    assert results == [True, True]


def test_reproducers_run_without_the_guard(record_property):
    """Whether they go wrong depends on the processor, so it is recorded, not asserted."""
    unguarded = f"{guard.FLAG}=+reduce"
    results, _ = run_fresh(NUMBERS, XLA_FLAGS=unguarded)
    record_property("right without the guard", results)
    assert len(results) == 2


def test_an_unreadable_flag_file_is_reported(tmp_path):
    status = guard._decide({"XLA_FLAGS": str(tmp_path / "missing")})
    assert not status.in_place
    assert "XLA_FLAGS" in status.advice


@pytest.mark.quick
def test_the_installed_jaxlib_names_the_flag():
    assert guard._library_names_flag() == (guard.jaxlib_version() >= (0, 10, 1))


@pytest.mark.parametrize(
    ("version", "named", "state"),
    [
        ((0, 10, 1), True, "not needed"),  # before the fusion came
        ((0, 12, 5), False, "set by edgejax"),  # known to have the flag, not searched
        ((0, 99), True, "set by edgejax"),
        ((0, 99), False, "not needed"),  # the flag is gone: setting it would end the process
    ],
)
@pytest.mark.quick
def test_other_jaxlib_versions(monkeypatch, version, named, state):
    monkeypatch.setattr(guard, "jaxlib_version", lambda: version)
    monkeypatch.setattr(guard, "_library_names_flag", lambda: named)
    monkeypatch.setattr(guard, "_backend_started", lambda: False)
    environ: dict[str, str] = {}
    assert guard._decide(environ).state == state
    assert ("XLA_FLAGS" in environ) == (state == "set by edgejax")


@pytest.mark.quick
def test_this_process_is_guarded():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert guard.guard_status().in_place


@pytest.mark.quick
@pytest.mark.parametrize(
    ("value", "safe"),
    [
        ("+individual_dot", False),
        ("-individual_dot", False),
        ("+reduce,-reduce", True),
        ("-reduce,+reduce", False),
    ],
)
def test_which_values_leave_the_fusion_on(value, safe):
    assert guard.disables_reduce(value) is safe
