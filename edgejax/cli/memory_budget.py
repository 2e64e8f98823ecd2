"""``edgejax finetune --memory``: the fastest way to run that stays within an amount of memory.

Each candidate is compiled by ``edgejax finetune --dry-run`` in a process of its own, the fastest first, until one fits. This
process has not imported JAX meanwhile, and afterwards finds the programs in the compile cache: neither compiling nor the run
exceeds the amount. What a person has given stays, but for how the rows of a step are split into micro-steps.
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any

from edgejax.cli.dry_run import OF_THE_CPU
from edgejax.cli.other_process import TooLarge, dry_run_of, packed_file, words_of
from edgejax.core.errors import ConfigError
from edgejax.core.units import format_bytes
from edgejax.devices.budget import parse_budget

# Below it, steps are compiled with small code: without, 512 to 685 MB (whole) and 716 to 869 (layerwise) have been seen.
COMPILING_BYTES = {
    "whole": 750_000_000,
    "layerwise": 950_000_000,
    "streamed": 0,
}  # which has small code anyway
# The fastest first, by their operations (plan.speed).
LORA: tuple[dict[str, Any], ...] = (
    {"remat": "none"},
    {"remat": "mlp", "boundaries": "bf16"},
    {"remat": "full"},
    {"remat": "full", "boundaries": "int8"},
    {"remat": "full", "boundaries": "bf16", "schedule": "streamed"},
    {"remat": "full", "boundaries": "int8", "schedule": "streamed"},
    {"remat": "full", "boundaries": "int8", "schedule": "streamed", "optimizer": "adamw8bit"},
)
_LAYERWISE = {"mode": "full", "base": "bf16", "schedule": "layerwise"}
FULL: tuple[dict[str, Any], ...] = (
    {"mode": "full", "base": "f32", "optimizer": "adamw", "remat": "none"},
    _LAYERWISE | {"optimizer": "adamw8bit", "remat": "mlp", "boundaries": "bf16"},
    _LAYERWISE | {"optimizer": "adamw4bit", "remat": "full"},
    _LAYERWISE | {"optimizer": "adamw4bit", "remat": "full", "boundaries": "int8"},
)


def settings_to_try(given: Mapping[str, Any], memory_bytes: int) -> list[dict[str, Any]]:
    """Options to try, the fastest first: those of the tables that agree with what was given, for each way to split a step.

    >>> [o["remat"] for o in settings_to_try({"schedule": "whole"}, 10**9)]
    ['none', 'mlp', 'full', 'full']
    >>> [(o["batch"], o["accumulate"]) for o in settings_to_try({"batch": 4, "remat": "none"}, 10**9)]
    [(4, 1), (1, 4)]
    """
    batch, accumulate = given.get("batch", 1), given.get("accumulate", 1)
    splits = dict.fromkeys([(batch, accumulate), (1, batch * accumulate)])
    found = []
    for kept in FULL if given.get("mode") == "full" else LORA:
        chosen = {"remat": "full", "boundaries": "f32", "schedule": "whole"} | kept
        if any(given.get(name, value) != value for name, value in chosen.items()):
            continue
        if chosen["schedule"] == "streamed" and given.get("sample_tokens"):
            continue  # it makes no samples
        chosen["small_code"] = given.get("small_code", memory_bytes < COMPILING_BYTES[chosen["schedule"]])
        found += [chosen | {"batch": b, "accumulate": a} for b, a in splits]
    return found


def choose_within(options: argparse.Namespace, given: Mapping[str, Any]) -> argparse.Namespace:
    """The options of a run that stays below ``options.memory``.

    Args:
      options: with every option's value.
      given: what a person gave of them.

    Raises:
      ConfigError: no amount; nothing fits, which names the nearest and the least there is; no compile cache; options that
        no setting goes with.
    """
    memory = parse_budget(options.memory)
    for name in ("resume", "mesh", "dry_run"):
        if getattr(options, name):
            flag = name.replace("_", "-")
            raise ConfigError(f"--memory chooses the settings of a new run of one device; leave out --{flag}")
    said = (lambda text: None) if options.quiet else (lambda text: print(text, file=sys.stderr, flush=True))
    said(f"looking for settings below {format_bytes(memory)}; a model that is not here is fetched first")
    tried: list[tuple[dict[str, Any], dict[str, Any]]] = []
    failed: list[tuple[str, str]] = []  # schedule and error
    too_large: set[tuple[str, bool]] = set()
    for chosen in settings_to_try(given, memory):
        schedule = chosen["schedule"]
        how = (schedule, chosen["small_code"])
        if how in too_large or any(failed.count(one) > 1 and one[0] == schedule for one in failed):
            continue  # compiled alike, or the same error twice
        if any(least_bytes(chosen, *other) > memory for other in tried):
            continue
        merged = argparse.Namespace(**vars(options) | chosen)
        try:
            if schedule == "streamed":
                _use_packed_file(merged, memory, said)
            found, keeps_programs = dry_run_of(vars(merged), memory)
        except TooLarge as error:  # steps that are compiled alike take about as much
            said(f" x {error}: {describe(chosen)}")
            too_large.add(how)
            failed.append((schedule, f"{error}: {describe(chosen)}"))
            continue
        except ConfigError as error:
            if OF_THE_CPU in str(error):
                raise
            failed.append((schedule, str(error)))
            continue
        if not keeps_programs:
            raise ConfigError(
                "compiled programs cannot be kept, and the run would have the memory that compiling takes; name a writable "
                "folder in EDGEJAX_CACHE"
            )
        fits = found["needed_bytes"] <= memory
        said(f"{'->' if fits else ' x'} {format_bytes(found['peak_bytes']):>9}  {describe(chosen)}")
        if fits:
            return merged
        tried.append((chosen, found))
    raise ConfigError(_nothing_fits(memory, given, tried, [error for _, error in failed]))


def _use_packed_file(options: argparse.Namespace, memory_bytes: int, said: Callable[[str], None]) -> None:
    """The streamed schedule maps its weights from one."""
    packed, is_new = packed_file(options.model, options.base, memory_bytes)
    if is_new:
        said(f"packed {options.model} into {packed}")
    if packed != options.model:
        options.model, options.base = packed, "auto"


def _nothing_fits(
    memory_bytes: int,
    given: Mapping[str, Any],
    tried: list[tuple[dict[str, Any], dict[str, Any]]],
    failed: list[str],
) -> str:
    if not tried and failed:
        return "; ".join(dict.fromkeys(failed))
    if not tried:
        names = [f"--{name.replace('_', '-')}" for name in given if name in LORA[-1] | FULL[-1]]
        return f"no setting that --memory chooses from goes with what was given: {', '.join(names)}"
    tried.sort(key=lambda one: one[1]["needed_bytes"])
    nearest = "; ".join(
        f"{format_bytes(found['needed_bytes'])} with {describe(chosen)}" for chosen, found in tried[:2]
    )
    floor = min(found["floor_bytes"] for _, found in tried)
    others = "".join(f" Not tried to the end: {error}." for error in dict.fromkeys(failed))
    return (
        f"no setting stays below {format_bytes(memory_bytes)}. The nearest needs (with 3 to 5% to spare) {nearest}. Python, JAX, "
        f"the data, weights and optimizer alone are {format_bytes(floor)}.{others} Use fewer or shorter rows, a smaller model, or "
        "a larger amount; nothing was loaded"
    )


def least_bytes(chosen: Mapping[str, Any], tried: Mapping[str, Any], found: Mapping[str, Any]) -> int:
    """What a setting takes at least, from one that was compiled.

    Inputs of layers may be stored in fewer bytes; otherwise settings of a schedule are alike only in their trees.

    >>> found = {"running_bytes": 500_000_000, "floor_bytes": 300_000_000, "sources_bytes": {"layer inputs": 40_000_000}}
    >>> full = {"remat": "full", "boundaries": "f32", "schedule": "whole", "batch": 1}
    >>> least_bytes(full | {"boundaries": "int8"}, full, found), least_bytes(full | {"remat": "none"}, full, found)
    (460000000, 300000000)
    >>> least_bytes(full | {"schedule": "streamed"}, full, found)
    0
    """
    if any(chosen.get(name) != tried.get(name) for name in ("schedule", "base", "optimizer")):
        return 0
    if any(chosen.get(name) != tried.get(name) for name in ("remat", "batch")):
        return found["floor_bytes"]
    return found["running_bytes"] - found["sources_bytes"].get("layer inputs", 0)


def describe(chosen: Mapping[str, Any]) -> str:
    """The options that differ from their defaults.

    >>> describe({"remat": "full", "boundaries": "int8", "schedule": "whole", "small_code": True, "batch": 1})
    '--remat full --boundaries int8 --small-code'
    """
    usual = {"schedule": "whole", "boundaries": "f32", "batch": 1, "accumulate": 1}
    return " ".join(words_of({name: value for name, value in chosen.items() if value != usual.get(name)}))
