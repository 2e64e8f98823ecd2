"""``edgejax doctor``: what is installed, what this machine allows, and whether it computes right numbers."""

import argparse
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgejax.core.cache import cache_dir, compile_cache_state
from edgejax.core.guard import guard_status
from edgejax.core.host import HostLimits, cpu_name, disk_free_bytes, host_limits, package_versions
from edgejax.core.units import format_bytes

if TYPE_CHECKING:
    from edgejax.measure.checks import CheckResult


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax doctor``."""
    parser.epilog = "Ends with 0 if all checks pass, 1 if one fails."
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of text")


def run(args: argparse.Namespace) -> int:
    """Look, check, print; 0 if all is right, 1 if a check fails."""
    found = examine()
    print(json.dumps(found, allow_nan=False) if args.json else as_text(found))
    return 0 if found["passed"] else 1


def examine() -> dict[str, Any]:
    """All that doctor shows, as plain values."""
    checks = run_checks()
    return {
        "passed": all(check["passed"] for check in checks),
        "versions": package_versions(),
        "devices": _devices(),
        "cpu": cpu_name(),
        "limits": _limits(host_limits()),
        "disk_free_bytes": {
            "cache": disk_free_bytes(cache_dir()),
            "working_directory": disk_free_bytes(Path.cwd()),
        },
        "cache_directory": str(cache_dir()),
        "numerics_guard": {**dataclasses.asdict(guard_status()), "in_place": guard_status().in_place},
        "compile_cache": compile_cache_state(),
        "models_here": _models_here(),
        "checks": checks,
    }


def run_checks() -> list[dict[str, Any]]:
    """Every check as plain values; one that cannot run counts as failed, and the others still run."""
    from edgejax.cli.gradient_check import check_gradients
    from edgejax.measure.checks import check_sum_over_einsum, check_vmapped_matvec

    checks: dict[str, Callable[[], CheckResult]] = {
        "sum over einsum": check_sum_over_einsum,
        "vmapped matrix-vector product, then a sum": check_vmapped_matvec,
        "gradients, lora": lambda: check_gradients("lora"),
        "gradients, full": lambda: check_gradients("full"),
    }
    return [_guarded(name, check) for name, check in checks.items()]


def _guarded(name: str, check: Callable[[], "CheckResult"]) -> dict[str, Any]:
    try:
        found = dataclasses.asdict(check())
    except Exception as error:  # whatever is broken here, the rest of the report is still wanted
        detail = f"could not run: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return {"name": name, "passed": False, "worst_error": None, "tolerance": None, "detail": detail}
    if found["worst_error"] == float("inf"):  # JSON has no infinity
        found |= {"worst_error": None, "detail": f"not a finite number; {found['detail']}"}
    return found


def _devices() -> list[dict[str, Any]]:
    import jax

    try:
        return [{"id": d.id, "platform": d.platform, "kind": d.device_kind} for d in jax.devices()]
    except RuntimeError as error:  # no back end; the checks above have failed for the same reason
        return [{"id": -1, "platform": "none", "kind": str(error).splitlines()[0]}]


def _limits(limits: HostLimits) -> dict[str, Any]:
    usable = {"cores_usable": limits.cores_usable, "memory_usable_bytes": limits.memory_usable_bytes}
    return dataclasses.asdict(limits) | usable


def _models_here() -> list[str]:
    from edgejax.weights.presets import list_presets

    return [preset.name for preset in list_presets() if preset.cached]


def as_text(found: dict[str, Any]) -> str:
    """What ``examine`` found, for a person."""
    limits, guard, cache = found["limits"], found["numerics_guard"], found["compile_cache"]
    flag = "" if guard["value"] is None else f" (fusion type {guard['value']!r})"
    rows = [
        ("versions", ", ".join(f"{name} {version}" for name, version in found["versions"].items())),
        ("devices", ", ".join(f"{d['platform']}:{d['id']} ({d['kind']})" for d in found["devices"])),
        ("processor", f"{found['cpu']}, {limits['cores_usable']} of {limits['cores_logical']} cores usable"
                      + _where(limits, "cores_cgroup", "container quota {:.2f}")),
        ("memory", f"{_size(limits['memory_available_bytes'])} free of {_size(limits['memory_total_bytes'])}"
                   + _where(limits, "memory_cgroup_bytes", "container limit {}", format_bytes)
                   + _where(limits, "address_space_bytes", "address space limit {}", format_bytes)),
        ("disk", f"{format_bytes(found['disk_free_bytes']['cache'])} free for {found['cache_directory']}, "
                 f"{format_bytes(found['disk_free_bytes']['working_directory'])} here"),
        ("compile cache", f"{cache['entries']} programs, {format_bytes(cache['size_bytes'])} in {cache['directory']}"),
        ("models here", ", ".join(found["models_here"]) or "none yet"),
        ("numerics guard", guard["state"] + flag + ("" if guard["in_place"] else ": NOT IN PLACE")),
    ]  # fmt: skip
    lines = [f"{name:<15} {value}" for name, value in rows]
    if guard["advice"]:
        lines.append(guard["advice"])
    lines += [_check_line(check) for check in found["checks"]]
    n_failed = sum(not check["passed"] for check in found["checks"])
    if n_failed:
        lines.append(
            f"{n_failed} of {len(found['checks'])} checks failed: numbers from this machine cannot be trusted"
        )
        if not guard["in_place"]:
            lines.append(
                "remove --xla_cpu_experimental_ynn_fusion_type from XLA_FLAGS, and edgejax sets it right"
            )
    else:
        lines.append("all checks passed")
    return "\n".join(lines)


def _check_line(check: dict[str, Any]) -> str:
    verdict = "passed" if check["passed"] else "FAILED"
    error = (
        ""
        if check["worst_error"] is None
        else f"error {check['worst_error']:.1e} (allowed {check['tolerance']:.0e}), "
    )
    return f"{verdict:<15} {check['name']}: {error}{check['detail']}"


def _size(n_bytes: int | None) -> str:
    return "unknown" if n_bytes is None else format_bytes(n_bytes)


def _where(limits: dict[str, Any], name: str, text: str, show: Callable[[Any], Any] = float) -> str:
    return "" if limits[name] is None else ", " + text.format(show(limits[name]))
