"""The numerics guard: keeps XLA:CPU's reduce fusion, which gives wrong numbers, switched off.

Since jaxlib 0.10.2 XLA:CPU hands reductions to YNNPACK by default. Reductions over matrix products are then
silently wrong in some shapes, by up to 31 orders of magnitude (jax issue 39103 and
``edgejax.measure.checks``). ``--xla_cpu_experimental_ynn_fusion_type=-reduce`` in ``XLA_FLAGS`` removes the
reductions and keeps the fast matrix products. XLA reads its flags once, when the backend starts, so
``import edgejax`` has to set the flag before the first array is made. That is the one thing importing edgejax
does besides defining names; it starts no backend and does not import jax.

XLA ends the process on a flag it does not know. The flag is therefore set for the jaxlib versions that are
known to have it, and for a newer jaxlib only if its library contains the flag's name.
"""

import dataclasses
import importlib.metadata
import importlib.util
import mmap
import os
import re
import sys
import warnings
from collections.abc import MutableMapping
from pathlib import Path
from typing import Literal

FLAG = "--xla_cpu_experimental_ynn_fusion_type"
SAFE_VALUE = "-reduce"
FIRST_AFFECTED = (0, 10, 2)  # 0.10.1 gives right numbers, says jax issue 39103
FIRST_UNTRIED = (0, 13)  # up to here the flag was seen to be accepted
_OURS = "EDGEJAX_GUARD"  # tells child processes that the flag they inherit is edgejax's

State = Literal["set by edgejax", "set by the user", "too late", "not needed"]


class NumericsGuardWarning(UserWarning):
    """The guard could not be put in place: numbers from XLA:CPU may be silently wrong."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class GuardStatus:
    """What the guard did when edgejax was imported."""

    state: State
    value: str | None  # of the flag as XLA reads it; None: not set
    advice: str  # what to do, empty when there is nothing to do

    @property
    def in_place(self) -> bool:
        """Whether the reduce fusion is known to be off, or not there."""
        if self.state in ("set by edgejax", "not needed"):
            return True
        return self.state == "set by the user" and disables_reduce(self.value or "")


_status: GuardStatus | None = None


def install_guard() -> GuardStatus:
    """Set the flag if that is still possible and the user has not; called once by ``import edgejax``.

    Warns:
      NumericsGuardWarning: the JAX backend had already started without the flag, or ``XLA_FLAGS`` names a
        file that cannot be read.
    """
    global _status
    if _status is None:
        _status = _decide(os.environ)
        if _status.advice:
            warnings.warn(_status.advice, NumericsGuardWarning, stacklevel=3)
    return _status


def guard_status() -> GuardStatus:
    """What the guard did.

    >>> import edgejax
    >>> guard_status().state in ("set by edgejax", "set by the user", "too late", "not needed")
    True
    """
    return install_guard()


def disables_reduce(value: str) -> bool:
    """Whether a value of the flag leaves no reduce fusion.

    The value is a list of fusion types. Signed entries change the default (which has ``reduce``), plain ones
    replace it, an empty list turns all of them off. Tried with jaxlib 0.10.2, value by value.

    >>> [disables_reduce(v) for v in ("", "-reduce", "individual_dot", "individual_dot,reduce", "+reduce")]
    [True, True, True, False, False]
    """
    entries = [entry.strip() for entry in value.split(",") if entry.strip()]
    about_reduce = [entry for entry in entries if entry.lstrip("+-") == "reduce"]
    if about_reduce:
        return about_reduce[-1] == "-reduce"
    return not any(entry[0] in "+-" for entry in entries)


def flag_value(flags: str) -> str | None:
    """Value of the guard's flag in the text of ``XLA_FLAGS``; the last one counts.

    >>> flag_value("--xla_foo=1 --xla_cpu_experimental_ynn_fusion_type=-reduce")
    '-reduce'
    >>> flag_value("--xla_foo=1") is None
    True
    """
    found = re.findall(rf"(?:^|\s){FLAG}=(\S*)", flags)
    return found[-1].strip("'\"") if found else None


def _decide(environ: MutableMapping[str, str]) -> GuardStatus:
    raw = environ.get("XLA_FLAGS", "")
    try:
        flags = _flags_text(raw)
    except OSError as error:
        advice = (
            f"edgejax cannot add {FLAG}={SAFE_VALUE} to XLA_FLAGS={raw!r}: XLA takes that for a file of flags "
            f"({error}). XLA:CPU may give silently wrong numbers. Write the flags themselves into XLA_FLAGS."
        )
        return GuardStatus(state="too late", value=None, advice=advice)
    value = flag_value(flags)
    if value is not None:
        ours = environ.get(_OURS) == value
        return GuardStatus(state="set by edgejax" if ours else "set by the user", value=value, advice="")
    if not _flag_applies():
        return GuardStatus(state="not needed", value=None, advice="")
    if _backend_started():
        advice = (
            "The JAX backend started before edgejax was imported, so edgejax could not switch off the XLA:CPU "
            "reduce fusion that gives silently wrong numbers. Restart Python and either import edgejax before "
            f"JAX makes its first array, or set XLA_FLAGS={FLAG}={SAFE_VALUE} in the environment. "
            "`edgejax doctor` shows whether this machine is affected."
        )
        return GuardStatus(state="too late", value=None, advice=advice)
    environ["XLA_FLAGS"] = f"{flags} {FLAG}={SAFE_VALUE}".strip()
    environ[_OURS] = SAFE_VALUE
    return GuardStatus(state="set by edgejax", value=SAFE_VALUE, advice="")


def _flags_text(raw: str) -> str:
    """The flags in ``XLA_FLAGS``: its text, or, when that does not start with ``--``, those in the file it names."""
    stripped = raw.strip()
    if not stripped or stripped.startswith("--"):
        return stripped
    return Path(stripped).read_text().strip()


def _backend_started() -> bool:
    """Whether JAX has started a backend. JAX has no public question for it (as of 0.12)."""
    bridge = sys.modules.get("jax._src.xla_bridge")
    if bridge is None:
        return False
    ask = getattr(bridge, "backends_are_initialized", None)
    return bool(ask() if ask is not None else getattr(bridge, "_backends", False))


def _flag_applies() -> bool:
    """Whether the installed jaxlib has the fusion, and so knows the flag."""
    version = jaxlib_version()
    if version < FIRST_AFFECTED:
        return False
    return version < FIRST_UNTRIED or _library_names_flag()


def jaxlib_version() -> tuple[int, ...]:
    """The numbers at the start of jaxlib's version: ``(0, 12, 0, 1)``."""
    text = importlib.metadata.version("jaxlib")
    match = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in match.group().split(".")) if match else (0,)


def _library_names_flag() -> bool:
    """Search jaxlib's largest shared library for the flag's name (it is near the front: some milliseconds)."""
    spec = importlib.util.find_spec("jaxlib")
    if spec is None or spec.origin is None:
        return False
    libraries = [
        p for p in Path(spec.origin).parent.iterdir() if p.suffix in (".so", ".dylib", ".dll", ".pyd")
    ]
    if not libraries:
        return False
    with (
        max(libraries, key=lambda p: p.stat().st_size).open("rb") as handle,
        mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as content,
    ):
        return content.find(FLAG.removeprefix("--").encode()) >= 0
