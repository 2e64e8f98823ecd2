"""Phones, chips and graphics cards by name, from a table whose every row says where its figures come from."""

import csv
import dataclasses
import difflib
import functools
import re
from importlib import resources

from edgejax.core.errors import ConfigError

GIB = 2**30
# The share of a phone's memory that one app got, of those in the table where somebody reported it: from Pixel 7 (1.2 of
# 8 GB, Android 14) to iPhone 12 mini (2.1 of 4 GB). Left out: what iOS gives with entitlements or gave before it changed.
APP_SHARE_LOW, APP_SHARE_HIGH = 0.15, 0.525
KINDS = ("phone", "soc", "gpu")
NEEDLESS = {
    "nvidia",
    "geforce",
    "amd",
    "radeon",
    "intel",
    "google",
    "samsung",
    "apple",
    "sxm4",
    "sxm5",
}  # in names


@dataclasses.dataclass(frozen=True, kw_only=True)
class DeviceProfile:
    """What is published about a device. ``None``: not known.

    Memory is in bytes, and what makers call a GB of memory is a GiB. ``cpu_gflop_per_s`` is cores x clock x FLOP per
    cycle, which nothing reaches.
    """

    kind: str  # phone, soc or gpu
    name: str
    chip: str  # the chip in a phone, the architecture of a chip or card
    memory_bytes: int | None = None  # of the phone, or of the card
    app_memory_bytes: tuple[int, int] | None = None  # lowest and highest figure for one app
    app_memory_reported: bool = False  # for this very phone; else it is a share of its memory
    cpu_cores: str = ""
    cpu_gflop_per_s: float | None = None
    gpu_gflop_per_s: float | None = None
    bandwidth_gb_per_s: float | None = None
    tdp_w: float | None = None
    battery_mah: float | None = None
    cpu_power_w: float | None = None  # all cores at their highest clock
    compute_capability: tuple[int, int] | None = None  # of NVIDIA's cards, and what follows
    multiprocessors: int | None = None
    boost_clock_ghz: float | None = None
    l2_bytes: int | None = None
    source: str
    notes: str = ""


@functools.cache
def device_profiles() -> tuple[DeviceProfile, ...]:
    """All rows of the table, in its order."""
    table = resources.files("edgejax.devices").joinpath("table.csv").read_text(encoding="utf-8")
    return tuple(_profile(row) for row in csv.DictReader(table.splitlines()))


def find_device(name: str) -> DeviceProfile:
    """The device of that name. Capitals, blanks, dashes, the maker and a card's usual memory may be left out.

    >>> find_device("rtx3060").name
    'NVIDIA GeForce RTX 3060 12 GB'
    >>> find_device("Pixel 7").memory_bytes // GIB
    8

    Raises:
      ConfigError: no such device, or more than one; names the nearest.
    """
    wanted = _key(name)
    profiles = device_profiles()
    for key_of in (_key, lambda full: _key(re.sub(r" \d+ GB$", "", full))):
        found = [profile for profile in profiles if key_of(profile.name) == wanted]
        if len(found) == 1:
            return found[0]
        if found:
            raise ConfigError(f"{name!r} is one of several: {', '.join(profile.name for profile in found)}")
    names = {_key(profile.name): profile.name for profile in profiles}
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    nearest = f"; the nearest names: {', '.join(names[key] for key in near)}" if near else ""
    raise ConfigError(f"no device named {name!r}{nearest}")


def _key(name: str) -> str:
    words = re.sub(r"[^a-z0-9.]+", " ", name.lower()).split()
    return "".join(word for word in words if word not in NEEDLESS)


def _profile(row: dict[str, str]) -> DeviceProfile:
    numbers = {
        name: float(row[name]) if row[name] else None
        for name in (
            "cpu_gflop_per_s", "gpu_gflop_per_s", "bandwidth_gb_per_s", "tdp_w", "battery_mah", "boost_clock_ghz",
        )
    }  # fmt: skip
    memory = round(float(row["memory_gib"]) * GIB) if row["memory_gib"] else None
    reported = bool(row["app_memory_low_gib"])
    app = None
    if reported:
        low, high = (round(float(row[f"app_memory_{end}_gib"]) * GIB) for end in ("low", "high"))
        app = (low, high)
    elif row["kind"] == "phone" and memory is not None:
        app = (round(APP_SHARE_LOW * memory), round(APP_SHARE_HIGH * memory))
    major, _, minor = row["compute_capability"].partition(".")
    return DeviceProfile(
        compute_capability=(int(major), int(minor)) if major else None,
        multiprocessors=int(row["multiprocessors"]) if row["multiprocessors"] else None,
        l2_bytes=round(float(row["l2_mib"]) * 2**20) if row["l2_mib"] else None,
        kind=row["kind"],
        name=row["name"],
        chip=row["chip"],
        memory_bytes=memory,
        app_memory_bytes=app,
        app_memory_reported=reported,
        cpu_cores=row["cpu_cores"],
        cpu_power_w=float(row["cpu_power_w"]) if row["cpu_power_w"] else None,
        source=row["source"],
        notes=row["notes"],
        **numbers,
    )
