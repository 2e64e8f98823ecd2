"""Footprints on the accelerator of this machine: compiled for it as a run would, within what its allocator may take."""

import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax

from edgejax.core.cache import forget_traces
from edgejax.core.errors import ConfigError, EdgejaxError
from edgejax.measure.memory import device_memory
from edgejax.plan.candidate import Candidate, abstract_model
from edgejax.plan.footprint import Footprint, compile_footprint
from edgejax.plan.search import Plan, candidates_for, find_options, make_plan
from edgejax.plan.store import FootprintStore

# Contexts and libraries are beside what the allocator may take; its gaps, and the scratch of choosing kernels, are not.
RESERVED = 0.05  # not measured: no accelerator was at hand
_FAILURES = (EdgejaxError, RuntimeError, ValueError, TypeError)  # of a step that cannot be compiled


def find_accelerator() -> Any | None:
    """The first device that JAX computes on here, if it has memory of its own and says how much."""
    device = jax.local_devices()[0]
    return None if device.platform == "cpu" or device_memory(device) is None else device


def plan_for_accelerator(
    device: Any,
    model: str,
    *,
    mode: str = "lora",
    base: str = "int4",
    rank: int = 8,
    seq: int = 512,
    batch: int = 1,
    accumulate: int = 1,
    note: Callable[[str], object] = lambda text: None,
) -> Plan:
    """The settings whose step fits on a device of this process.

    What a run really took, ``edgejax finetune`` says beside this figure when it ends (``memory.device_peak_bytes``).

    Args:
      device: of ``find_accelerator``.
      model, mode, base, rank, seq, batch, accumulate, note: as of ``plan_for_card``.

    Raises:
      ConfigError: the device does not say how much memory it has; an unknown model; settings that do not go together.
    """
    memory = device_memory(device)
    if memory is None:
        raise ConfigError(f"{device.device_kind} does not say how much memory it has")
    about = [device.platform, device.device_kind, device.client.platform_version]
    store = FootprintStore([*about, os.environ.get("XLA_FLAGS", "")], note=note)
    candidates = candidates_for(mode, base=base, rank=rank, seq=seq, batch=batch, accumulate=accumulate)
    config, _ = abstract_model(model, candidates[0].held_base)

    def find(candidates: Sequence[Candidate]):
        return find_options(model, candidates, partial(_footprints, device), store, note)

    return make_plan(
        model,
        candidates,
        config.max_position,
        find,
        device=device.device_kind,
        memory_bytes=memory.limit_bytes,
        reserve_bytes=round(RESERVED * memory.limit_bytes),
        evidence=f"compiled on {device.device_kind} (buffer assignment)",
    )


def _footprints(device: Any, model: str, candidates: Sequence[Candidate]) -> Iterator[Footprint | str]:
    for candidate in candidates:
        try:
            yield compile_footprint(candidate, *abstract_model(model, candidate.held_base), device=device)
        except _FAILURES as error:
            yield (str(error).splitlines() or [type(error).__name__])[0]
        forget_traces()
