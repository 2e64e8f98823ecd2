"""``edgejax plan`` for this machine, for an amount of memory, and for a phone that has it.

Steps are compiled here, by ``edgejax finetune --dry-run`` in processes of their own, so what a phone would take is what this
machine's programs take: a stand-in, and called one.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from edgejax.cli.dry_run import SHAPE
from edgejax.cli.memory_budget import settings_to_try
from edgejax.cli.other_process import dry_run_of
from edgejax.core.errors import ConfigError
from edgejax.core.units import format_bytes

if TYPE_CHECKING:
    from edgejax.plan import Candidate, Footprint, Plan

HERE = ("this", "here")
_AT_ONCE = 2  # programs are compiled; XLA compiles one with several threads, but not all the time


class Place(NamedTuple):
    """Where a run would be.

    Attributes:
      name: for people.
      memory_bytes: that it may have.
      evidence: how its bytes are known.
    """

    name: str
    memory_bytes: int
    evidence: str


def find_place(text: str) -> Place | None:
    """What ``--device`` names, if it is no graphics card.

    Raises:
      ConfigError: an amount without a unit; a chip, whose memory is that of the phone around it; an unknown device.
    """
    from edgejax.core.host import host_limits
    from edgejax.devices import find_device, is_budget, parse_budget

    here = "compiled for this machine, with what was measured around its programs; 3 to 5% to spare"
    if text.lower() in HERE:
        memory = host_limits().memory_usable_bytes
        if memory is None:
            raise ConfigError("this system does not say how much memory is free; name an amount, like 2GB")
        return Place("this machine", memory, here)
    if is_budget(text):
        return Place("this machine", parse_budget(text), here)
    device = find_device(text)
    if device.kind == "gpu":
        return None
    if device.app_memory_bytes is None:
        raise ConfigError(
            f"{device.name} is a chip, or its memory is not known; name a phone or an amount of memory, like 1.2GB"
        )
    low, high = (format_bytes(size) for size in device.app_memory_bytes)
    known = (
        "as reported" if device.app_memory_reported else "by the share of its memory that apps got on others"
    )
    evidence = f"{here}, which stands in for the phone; an app gets {low} to {high} there, {known}"
    return Place(device.name, device.app_memory_bytes[0], evidence)


def plan_for_host(args: argparse.Namespace, place: Place, note: Callable[[str], object]) -> "Plan":
    """The settings of a run on this machine that stay within the memory of a place.

    Args:
      args: of ``edgejax plan``.
      place: of ``find_place``.
      note: told of each program that is compiled.

    Raises:
      ConfigError, WeightsError: an unknown model, or settings that do not go together.
    """
    from edgejax.core.host import cpu_name, host_limits
    from edgejax.plan import Candidate
    from edgejax.plan.candidate import abstract_model, is_here
    from edgejax.plan.search import find_options, make_plan
    from edgejax.plan.store import FootprintStore

    given = {"mode": args.mode, "batch": args.batch, "accumulate": args.accumulate}
    if args.base is not None:
        given["base"] = args.base
    shared = {"mode": args.mode, "seq": args.seq}
    if args.mode == "lora":
        here = is_here(args.model)  # the published files of others are not quantised
        shared |= {
            "base": args.base or ("auto" if here else "int4"),
            "rank": 8 if args.rank is None else args.rank,
        }
    candidates = [Candidate(**shared | chosen) for chosen in settings_to_try(given, place.memory_bytes)]
    config, _ = abstract_model(args.model, candidates[0].held_base)
    environment = [cpu_name(), host_limits().cores_usable, os.environ.get("XLA_FLAGS", "")]
    environment += [is_here(args.model)]
    store = FootprintStore(["this machine", *environment], note=note, without=())

    def find(candidates: Sequence[Candidate]):
        return find_options(args.model, candidates, _footprints, store, note)

    return make_plan(
        args.model,
        [one for one in candidates if one.schedule != "streamed"],
        config.max_position,
        find,
        last_resort=[one for one in candidates if one.schedule == "streamed"],
        device=place.name,
        memory_bytes=place.memory_bytes,
        reserve_bytes=0,  # what is uncertain is of each footprint
        evidence=place.evidence,
    )


def _footprints(model: str, candidates: "Sequence[Candidate]") -> "Iterator[Footprint | str]":
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        yield from pool.map(partial(_footprint, model), candidates)


def _footprint(model: str, candidate: "Candidate") -> "Footprint | str":
    import dataclasses

    from edgejax.plan import Footprint
    from edgejax.plan.candidate import is_here

    options = dataclasses.asdict(candidate) | {"model": model if is_here(model) else SHAPE + model}
    if candidate.mode == "full":
        del options["rank"]
    else:  # whose sample takes less than a step
        options["sample_tokens"] = 0
    try:
        with (
            tempfile.TemporaryDirectory() as empty
        ):  # a program that is kept already would not say what compiling takes
            environment = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": empty}
            return Footprint.from_json(dry_run_of(options, environment=environment)[0])
    except ConfigError as error:
        return str(error)
