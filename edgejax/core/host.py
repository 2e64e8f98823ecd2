"""What this machine allows: cores, memory and disk, with the limits that containers and shells put on them."""

import dataclasses
import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path

PACKAGES = (
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "numpy",
    "gguf",
    "tokenizers",
    "safetensors",
)
_NO_LIMIT = 1 << 60  # cgroup v1 writes "no limit" as a number near 2^63


@dataclasses.dataclass(frozen=True, kw_only=True)
class HostLimits:
    """Limits of this process. ``None``: no such limit, or this system does not tell."""

    cores_logical: int
    cores_affinity: int  # the scheduler may use these
    cores_cgroup: float | None  # quota of the container, in cores
    memory_total_bytes: int | None
    memory_available_bytes: int | None  # now, without swapping
    memory_cgroup_bytes: int | None
    address_space_bytes: int | None  # RLIMIT_AS

    @property
    def cores_usable(self) -> int:
        """Whole cores that can be kept busy."""
        quota = self.cores_affinity if self.cores_cgroup is None else max(1, int(self.cores_cgroup))
        return min(self.cores_affinity, quota)

    @property
    def memory_usable_bytes(self) -> int | None:
        """The smallest of what is free and what the limits allow."""
        known = [self.memory_available_bytes, self.memory_cgroup_bytes, self.address_space_bytes]
        return min((value for value in known if value is not None), default=None)


def host_limits(root: Path = Path("/")) -> HostLimits:
    """Read the limits of this process; ``root`` is the folder that holds ``proc`` and ``sys``.

    >>> host_limits().cores_usable >= 1
    True
    """
    logical = os.cpu_count() or 1
    meminfo = parse_meminfo(_text(root / "proc/meminfo"))
    groups = parse_cgroups(_text(root / "proc/self/cgroup"))
    return HostLimits(
        cores_logical=logical,
        cores_affinity=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else logical,
        cores_cgroup=_cgroup_cores(root / "sys/fs/cgroup", groups),
        memory_total_bytes=meminfo.get("MemTotal") or _physical_memory_bytes(),
        memory_available_bytes=meminfo.get("MemAvailable"),
        memory_cgroup_bytes=_cgroup_memory_bytes(root / "sys/fs/cgroup", groups),
        address_space_bytes=_address_space_bytes(),
    )


def disk_free_bytes(path: str | os.PathLike) -> int:
    """Free bytes where ``path`` is, or would be: of its nearest parent that exists."""
    folder = Path(path).expanduser().absolute()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def package_versions() -> dict[str, str]:
    """Versions of Python, edgejax and what its numbers depend on; ``"not installed"`` where one is missing."""
    versions = {"python": platform.python_version(), "edgejax": _version("edgejax")}
    return versions | {name: _version(name) for name in PACKAGES}


def cpu_name(root: Path = Path("/")) -> str:
    """The processor's name as the system gives it."""
    match = re.search(r"^model name\s*:\s*(.+)$", _text(root / "proc/cpuinfo"), re.MULTILINE)
    return match.group(1).strip() if match else platform.processor() or platform.machine()


def parse_meminfo(text: str) -> dict[str, int]:
    """Bytes by field of ``/proc/meminfo``.

    >>> parse_meminfo("MemTotal:       24 kB\\nHugePages_Total:   0\\n")
    {'MemTotal': 24576}
    """
    return {name: int(kib) * 1024 for name, kib in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.MULTILINE)}


def parse_cgroups(text: str) -> dict[str, str]:
    """Path of this process by controller in ``/proc/self/cgroup``; ``""`` is the unified (v2) hierarchy.

    >>> parse_cgroups("4:cpu,cpuacct:/a\\n0::/b\\n")
    {'cpu': '/a', 'cpuacct': '/a', '': '/b'}
    """
    groups: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        groups |= {controller: path for controller in controllers.split(",")}
    return groups


def _cgroup_cores(base: Path, groups: dict[str, str]) -> float | None:
    found = []
    for folder in _upwards(base, groups.get("")):  # v2: "<quota or max> <period>", microseconds
        quota, _, period = _text(folder / "cpu.max").partition(" ")
        if quota.isdigit() and period.strip().isdigit():
            found.append(int(quota) / int(period))
    for folder in _upwards(base / "cpu", groups.get("cpu")):
        quota, period = (
            _text(folder / "cpu.cfs_quota_us").strip(),
            _text(folder / "cpu.cfs_period_us").strip(),
        )
        if quota.isdigit() and period.isdigit():  # no limit is -1
            found.append(int(quota) / int(period))
    return min(found, default=None)


def _cgroup_memory_bytes(base: Path, groups: dict[str, str]) -> int | None:
    texts = [_text(folder / "memory.max") for folder in _upwards(base, groups.get(""))]
    texts += [_text(f / "memory.limit_in_bytes") for f in _upwards(base / "memory", groups.get("memory"))]
    limits = [int(text) for text in texts if text.strip().isdigit()]
    return min((limit for limit in limits if limit < _NO_LIMIT), default=None)


def _upwards(base: Path, path: str | None) -> list[Path]:
    """The group's folder and its parents, for a limit of any of them holds."""
    if path is None:
        return []
    folder = base / path.lstrip("/")
    return [folder, *(parent for parent in folder.parents if parent.is_relative_to(base))]


def _address_space_bytes() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return None if limit == resource.RLIM_INFINITY else limit


def _physical_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
