"""Limits read from a made-up /proc and /sys, and from the real ones."""

from pathlib import Path

import pytest

from edgejax.core.host import (
    cpu_name,
    disk_free_bytes,
    host_limits,
    package_versions,
    parse_cgroups,
    parse_meminfo,
)

pytestmark = pytest.mark.quick
GIB = 1 << 30


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_unified_cgroup_takes_the_smallest_limit_on_the_way_up(tmp_path):
    root = write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "0::/box/inner\n",
            "sys/fs/cgroup/box/inner/cpu.max": "max 100000\n",
            "sys/fs/cgroup/box/cpu.max": "150000 100000\n",
            "sys/fs/cgroup/box/inner/memory.max": f"{4 * GIB}\n",
            "sys/fs/cgroup/box/memory.max": f"{2 * GIB}\n",
            "sys/fs/cgroup/memory.max": "max\n",
            "proc/meminfo": "MemTotal: 8388608 kB\nMemAvailable: 6291456 kB\n",
        },
    )
    limits = host_limits(root)
    assert limits.cores_cgroup == 1.5
    assert limits.cores_usable == 1
    assert limits.memory_cgroup_bytes == 2 * GIB
    assert (limits.memory_total_bytes, limits.memory_available_bytes) == (8 * GIB, 6 * GIB)
    assert limits.memory_usable_bytes == 2 * GIB


def test_first_version_of_cgroups(tmp_path):
    root = write_tree(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/job\n4:memory:/job\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "9223372036854771712\n",
            "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n",
        },
    )
    limits = host_limits(root)
    assert limits.cores_cgroup == 0.5
    assert limits.cores_usable == 1
    assert limits.memory_cgroup_bytes == 3 * GIB


def test_no_limits_and_no_proc(tmp_path):
    limits = host_limits(tmp_path)
    assert limits.cores_cgroup is None
    assert limits.memory_cgroup_bytes is None
    assert limits.memory_available_bytes is None
    assert limits.cores_usable == limits.cores_affinity


def test_this_machine():
    limits = host_limits()
    assert 1 <= limits.cores_usable <= limits.cores_logical
    assert limits.memory_total_bytes is None or limits.memory_total_bytes > 100_000_000


def test_address_space_limit_is_read():
    import subprocess
    import sys

    program = "from edgejax.core.host import host_limits; print(host_limits().address_space_bytes)"
    done = subprocess.run(
        ["sh", "-c", f"ulimit -v {4 * GIB // 1024} && exec {sys.executable} -c '{program}'"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) == 4 * GIB


def test_disk_free_of_a_folder_that_is_not_there_yet(tmp_path):
    assert disk_free_bytes(tmp_path / "a" / "b") > 0


def test_meminfo_without_units_is_left_out():
    assert parse_meminfo("HugePages_Total: 3\nMemFree: 2 kB\n") == {"MemFree": 2048}


def test_cgroup_paths_may_hold_colons():
    assert parse_cgroups("0::/a:b\n") == {"": "/a:b"}


def test_cpu_name(tmp_path):
    root = write_tree(tmp_path, {"proc/cpuinfo": "processor\t: 0\nmodel name\t: Fast One 3000\n"})
    assert cpu_name(root) == "Fast One 3000"


def test_versions_name_what_is_installed():
    versions = package_versions()
    assert versions["jax"][0].isdigit()
    assert versions["edgejax"][0].isdigit()
    assert "python" in versions
