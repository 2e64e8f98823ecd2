"""Plans for the accelerator of this machine: a device that says how much memory it has, compiled for as a run would be."""

import json
from types import SimpleNamespace

import jax
import pytest

from edgejax.cli import main as program
from edgejax.core.errors import ConfigError
from edgejax.measure.memory import device_memory, device_peak_bytes
from edgejax.plan import accelerator, compile_footprint, find_accelerator, plan_for_accelerator

pytestmark = pytest.mark.quick
MIB = 2**20


def device(limit=40 * MIB, platform="gpu", **stats):
    """What says of itself what an accelerator does; steps are compiled for the CPU all the same."""
    found = {"bytes_limit": limit, "peak_bytes_in_use": 7 * MIB} | stats
    return SimpleNamespace(
        platform=platform, device_kind="Some GPU", client=SimpleNamespace(platform_version="CUDA 1"),
        memory_stats=lambda: found if limit else None,
    )  # fmt: skip


@pytest.fixture
def present(monkeypatch):
    """Makes a device the first of this process."""

    def make(found):
        monkeypatch.setattr(jax, "local_devices", lambda: [found])

    return make


def test_a_cpu_is_no_accelerator(present):
    assert find_accelerator() is None
    present(device(platform="cpu"))
    assert find_accelerator() is None
    present(device(limit=None))  # it does not say
    assert find_accelerator() is None
    present(found := device())
    assert find_accelerator() is found


def test_memory_of_a_device(present):
    assert device_memory(jax.devices("cpu")[0]) is None
    assert device_peak_bytes() is None
    found = device_memory(device())
    assert (found.limit_bytes, found.peak_bytes) == (40 * MIB, 7 * MIB)
    present(device())
    assert device_peak_bytes() == 7 * MIB


def test_a_plan_within_what_the_allocator_may_take(present, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))
    present(found := device(limit=3 * MIB))

    def compiled_here(*arguments, device):
        assert device is found
        return compile_footprint(*arguments)

    monkeypatch.setattr(accelerator, "compile_footprint", compiled_here)
    words = ["plan", "--device", "this", "--model", "tiny", "--seq", "128", "--base", "int8", "--json"]
    code = program.main(words)
    plan = json.loads(capsys.readouterr().out)
    assert plan["device"] == "Some GPU"
    assert plan["memory_bytes"] == 3 * MIB
    assert plan["budget_bytes"] == 3 * MIB - round(accelerator.RESERVED * 3 * MIB)
    assert plan["evidence"] == "compiled on Some GPU (buffer assignment)"
    fits = {one["options"]: one["fits"] for one in plan["candidates"]}
    assert len(fits) == 4
    for one in plan["candidates"]:
        assert one["fits"] == (one["peak_bytes"] <= plan["budget_bytes"])
        assert one["sources_bytes"]["optimizer"] > 0
        assert "Python, JAX and data" not in one["sources_bytes"]  # which are not in the device's memory
    assert code == (0 if any(fits.values()) else 2)

    def never(*arguments, device):
        raise AssertionError("it was kept")

    monkeypatch.setattr(accelerator, "compile_footprint", never)
    program.main(words)
    assert json.loads(capsys.readouterr().out) == plan


def test_what_cannot_be_compiled_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))

    def broken(candidate, config, params, device):
        raise RuntimeError("no registers are left\nand more")

    monkeypatch.setattr(accelerator, "compile_footprint", broken)
    plan = plan_for_accelerator(device(), "tiny", seq=64)
    assert plan.options == ()
    assert set(plan.failed.values()) == {"no registers are left"}
    assert plan.chosen is None
    with pytest.raises(ConfigError, match="Some GPU does not say how much memory it has"):
        plan_for_accelerator(device(limit=None), "tiny")


def test_the_memory_of_a_process_is_not_a_cards(monkeypatch, capsys):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert (
        program.main(["finetune", "--model", "shape:tiny", "--seq", "64", "--steps", "2", "--dry-run"]) == 2
    )
    assert "count the memory of a process that computes on the CPU" in capsys.readouterr().err
