"""The fastest setting whose step fits."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from edgejax.core.errors import ConfigError
from edgejax.core.units import format_bytes
from edgejax.models import ModelConfig
from edgejax.plan.candidate import Candidate, abstract_model
from edgejax.plan.footprint import Footprint
from edgejax.plan.speed import relative_speed
from edgejax.plan.store import FootprintStore

Compile = Callable[[str, Sequence[Candidate]], Iterator[Footprint | str]]
# What is kept of a layer, the least first that is computed again.
_KEPT: tuple[dict[str, Any], ...] = (
    {"remat": "none"},
    {"remat": "mlp", "boundaries": "bf16"},
    {"remat": "full"},
    {"remat": "full", "boundaries": "int8"},
)
_FULL: tuple[dict[str, Any], ...] = (
    {"base": "f32", "optimizer": "adamw", "remat": "none"},
    {"base": "bf16", "optimizer": "adamw8bit", "schedule": "layerwise", "remat": "mlp", "boundaries": "bf16"},
    {"base": "bf16", "optimizer": "adamw4bit", "schedule": "layerwise", "remat": "full"},
    {
        "base": "bf16",
        "optimizer": "adamw4bit",
        "schedule": "layerwise",
        "remat": "full",
        "boundaries": "int8",
    },
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Option:
    """A candidate with what it takes."""

    candidate: Candidate
    footprint: Footprint
    relative_speed: float  # of the same step that computes nothing again; calculated

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "settings": dataclasses.asdict(self.candidate),
            "options": self.candidate.describe(),
            "relative_speed": self.relative_speed,
            **self.footprint.to_json(),
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What fits, the fastest first; what does not, the nearest first.

    Attributes:
      model: as it was named.
      device: what it is for.
      memory_bytes: that it has.
      reserve_bytes: of that, kept free for what no program's figures show.
      evidence: how the bytes are known.
      options: all that could be compiled.
      failed: why others could not, by their options.
      longer: the same for rows twice as long.
    """

    model: str
    device: str
    memory_bytes: int
    reserve_bytes: int
    evidence: str
    options: tuple[Option, ...]
    failed: dict[str, str]
    longer: "Plan | None" = None

    @property
    def budget_bytes(self) -> int:
        """What a step may take."""
        return self.memory_bytes - self.reserve_bytes

    def fitting(self) -> list[Option]:
        """Those within the budget, the fastest first; of equals the first, which rounds least."""
        fits = [option for option in self.options if option.footprint.needed_bytes <= self.budget_bytes]
        return sorted(fits, key=lambda option: -round(option.relative_speed, 3))

    def too_large(self) -> list[Option]:
        """The others, the smallest first."""
        rest = [option for option in self.options if option.footprint.needed_bytes > self.budget_bytes]
        return sorted(rest, key=lambda option: option.footprint.needed_bytes)

    @property
    def chosen(self) -> Option | None:
        """The fastest that fits."""
        return next(iter(self.fitting()), None)

    def floor_bytes(self) -> int:
        """Of the smallest option, what is there whatever is computed again: below it nothing can be trained at all."""
        return min(option.footprint.floor_bytes for option in self.options)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        chosen = self.chosen
        return {
            "model": self.model,
            "device": self.device,
            "memory_bytes": self.memory_bytes,
            "reserve_bytes": self.reserve_bytes,
            "budget_bytes": self.budget_bytes,
            "evidence": self.evidence,
            "chosen": None if chosen is None else chosen.to_json(),
            "candidates": [
                option.to_json() | {"fits": option.footprint.needed_bytes <= self.budget_bytes}
                for option in [*self.fitting(), *self.too_large()]
            ],
            "failed": self.failed,
            "longer": None if self.longer is None else self.longer.to_json(),
        }


def candidates_for(mode: str, *, base: str = "int4", **shared: Any) -> list[Candidate]:
    """The settings a plan compares.

    Args:
      mode: ``lora`` or ``full``.
      base: how a frozen base is held.
      shared: fields of all of them: rank, batch, accumulate, seq.
    """
    if mode == "full":
        return [Candidate(mode="full", **shared, **kept) for kept in _FULL]
    return [Candidate(base=base, **shared, **kept) for kept in _KEPT]


def make_plan(
    model: str,
    candidates: Sequence[Candidate],
    max_position: int,
    find: Callable[[Sequence[Candidate]], tuple[tuple[Option, ...], dict[str, str]]],
    *,
    device: str,
    memory_bytes: int,
    reserve_bytes: int,
    evidence: str,
    last_resort: Sequence[Candidate] = (),
) -> Plan:
    """Compare candidates, then look what would have to give for rows twice as long.

    Args:
      model: see ``abstract_model``.
      candidates: to compare.
      max_position: the model's context.
      find: ``find_options`` with its other arguments given.
      device, memory_bytes, reserve_bytes, evidence: see ``Plan``.
      last_resort: slower ones, looked at only where nothing else fits.
    """
    about: Any = {
        "model": model, "device": device, "memory_bytes": memory_bytes, "reserve_bytes": reserve_bytes,
        "evidence": evidence,
    }  # fmt: skip
    plan = _with(Plan(options=(), failed={}, **about), *find(candidates))
    if plan.chosen is None and last_resort:
        plan = _with(plan, *find(last_resort))
    if plan.chosen is None or 2 * plan.chosen.candidate.seq > max_position:
        return plan
    longer = Plan(options=(), failed={}, **about)
    rows = [option.candidate for option in _may_be_longer(plan)]
    for candidate in dict.fromkeys([*rows, *last_resort]):
        longer = _with(longer, *find([dataclasses.replace(candidate, seq=2 * candidate.seq)]))
        if longer.chosen is not None:
            break
    return dataclasses.replace(plan, longer=longer) if longer.options else plan


def _with(plan: Plan, options: tuple[Option, ...], failed: dict[str, str]) -> Plan:
    return dataclasses.replace(plan, options=plan.options + options, failed=plan.failed | failed)


def _may_be_longer(plan: Plan) -> list[Option]:
    """Of what fits, what may fit with rows twice as long, the fastest first; at least the smallest."""
    fitting = plan.fitting()

    def least_bytes(option: Option) -> int:
        found = option.footprint
        if option.candidate.mode == "full":  # gradients may be most of a step's memory
            return found.running_bytes
        return found.running_bytes + found.xla.temp_bytes // 2  # at least half of it is of positions

    hopeful = [option for option in fitting if least_bytes(option) <= plan.budget_bytes]
    return hopeful or [min(fitting, key=lambda option: option.footprint.needed_bytes)]


def find_options(
    model: str,
    candidates: Sequence[Candidate],
    compile_all: Compile,
    store: FootprintStore,
    note: Callable[[str], object] = lambda text: None,
) -> tuple[tuple[Option, ...], dict[str, str]]:
    """What each candidate takes, kept or compiled now, and why some could not be.

    Args:
      model: see ``candidate.abstract_model``.
      candidates: to look at.
      compile_all: from the model and candidates to their footprints, or a text that says why there is none.
      store: of those that were compiled before.
      note: told of each that is compiled.
    """
    found: dict[Candidate, Footprint] = {}
    configs: dict[Candidate, ModelConfig] = {}
    paths = {}
    for candidate in candidates:
        configs[candidate], params = abstract_model(model, candidate.held_base)
        if candidate.seq > configs[candidate].max_position:
            raise ConfigError(
                f"rows of {candidate.seq} positions are beyond the context of {model}, {configs[candidate].max_position}"
            )
        paths[candidate] = store.path(candidate, configs[candidate], params)
        kept = store.get(paths[candidate])
        if kept is not None:
            found[candidate] = kept
    failed = {}
    missing = [candidate for candidate in candidates if candidate not in found]
    answers = compile_all(model, missing) if missing else iter(())
    for number, (candidate, answer) in enumerate(zip(missing, answers, strict=True), 1):
        if isinstance(answer, str):
            failed[candidate.describe()] = answer
            note(f"compiled {number} of {len(missing)}: {candidate.describe()}: {answer}")
            continue
        store.put(paths[candidate], answer)
        found[candidate] = answer
        note(
            f"compiled {number} of {len(missing)}: {candidate.describe()}: {format_bytes(answer.peak_bytes)}"
        )
    options = tuple(
        Option(
            candidate=candidate,
            footprint=found[candidate],
            relative_speed=relative_speed(candidate, configs[candidate]),
        )
        for candidate in candidates
        if candidate in found
    )
    return options, failed
