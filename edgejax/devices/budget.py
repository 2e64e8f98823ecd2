"""Amounts of memory as people write them."""

import re

from edgejax.core.errors import ConfigError

_UNITS = {"kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_AMOUNT = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([a-z]*)")


def parse_budget(text: str) -> int:
    """Bytes of an amount with its unit: kB, MB, GB (powers of 1000) or KiB, MiB, GiB (of 1024), in any case.

    >>> parse_budget("600MB"), parse_budget("1.2 GB"), parse_budget("1GiB")
    (600000000, 1200000000, 1073741824)

    Raises:
      ConfigError: no amount, no unit, an unknown one, or nothing left of it.
    """
    match = _AMOUNT.fullmatch(text.strip().lower())
    if match is None:
        raise ConfigError(f"{text!r} is not an amount of memory; write it as 600MB or 1.2GB")
    number, unit = match.groups()
    if not unit:
        raise ConfigError(f"{text!r} has no unit; write {text.strip()}MB or {text.strip()}GB")
    if unit not in _UNITS:
        raise ConfigError(f"{text!r} has an unknown unit; there are: kB, MB, GB, KiB, MiB, GiB")
    size = float(number) * _UNITS[unit]
    if not 1 <= size < 2**63:
        raise ConfigError(f"{text!r} is no amount that a memory could have")
    return round(size)


def is_budget(text: str) -> bool:
    """Whether a text is an amount, with or without its unit, where a device's name could stand too.

    >>> is_budget("600MB"), is_budget("600"), is_budget("rtx3060"), is_budget("3060 Ti")
    (True, True, False, False)
    """
    match = _AMOUNT.fullmatch(text.strip().lower())
    return match is not None and match.group(2) in ("", *_UNITS)
