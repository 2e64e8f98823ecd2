"""What a person can choose about a training run, checked when it is made."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optax

from edgejax.core.errors import ConfigError
from edgejax.train.learning_rate import SCHEDULES, warmup_steps
from edgejax.train.mesh import check_mesh, parse_mesh
from edgejax.train.recipe import StepRecipe
from edgejax.train.whole import Mode

# Changing these between stop and resume changes no trained bit; a mesh changes the order in which rows are summed.
_NOT_IN_FINGERPRINT = (
    "mesh",
    "spill_to",
    "log_every",
    "eval_every",
    "eval_rows",
    "checkpoint_every",
    "keep_checkpoints",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one run. The model, its adapters and the data are given beside them.

    Raises:
      ConfigError: a value outside its range, an unknown optimizer or schedule, an option nobody would read.

    Example:
      >>> settings = TrainSettings(steps=100, learning_rate=5e-4)
      >>> TrainSettings.from_json(settings.to_json()) == settings
      True
    """

    steps: int = 100  # optimizer steps of the whole run, those before a resume included
    batch_size: int = 1  # rows of a micro-step
    accumulate: int = 1  # micro-steps whose gradients are summed into one optimizer step
    optimizer: str = "adamw"  # a name of optimizer_names()
    optimizer_options: Mapping[str, Any] = dataclasses.field(
        default_factory=dict
    )  # e.g. {"b2": 0.95}; JSON values
    learning_rate: float = 5e-4  # peak, after the warm-up
    lr_schedule: str = "cosine"  # cosine, linear or constant
    warmup: int | float = 0.05  # steps (int), or a share of steps (float below 1)
    final_rate_fraction: float = 0.0  # learning rate at the end as a share of the peak
    weight_decay: float = 0.0  # decoupled; norm scales and biases are left out
    clip_norm: float | None = 1.0  # largest gradient norm; None does not clip
    clip_by: str | None = (
        None  # global, layer or previous (train.layerwise); None: the first that the schedule can
    )
    schedule: str = "whole"  # how a step is run: whole, layerwise or streamed
    mesh: str | None = None  # devices that a step runs on, like data=4,shard=2 (train.mesh); None: one
    spill_to: str | None = None  # streamed: a folder where inputs of layers wait instead of in memory
    remat: str = "full"  # what a layer keeps for the backward pass: a policy of memory.remat
    boundaries: str = "f32"  # how the inputs of layers wait for it: f32, bf16 or int8 (memory.residuals)
    mlp_tile: int | None = None  # positions of a row whose MLP values exist at once; None: all
    bfloat16: bool = (
        False  # train matrices in bfloat16 with stochastic rounding; full-parameter training only
    )
    small_code: bool = (
        False  # compile with XLA's older emitter for CPUs (core.small_code); streamed always does
    )
    seed: int = 0  # of the adapters' start and the order of rows
    log_every: int = 1  # steps between lines of metrics.jsonl
    eval_every: int | None = None  # steps between held-out evaluations; None: before and after only
    eval_rows: int | None = None  # held-out rows of each evaluation, always the same ones; None: all
    checkpoint_every: int = 50  # steps between checkpoints; one is always written at the end
    keep_checkpoints: int = 2  # newest checkpoints that stay

    def __post_init__(self):
        for name in (
            "steps",
            "batch_size",
            "accumulate",
            "log_every",
            "checkpoint_every",
            "keep_checkpoints",
        ):
            _check_count(name, getattr(self, name))
        for name in ("eval_every", "eval_rows"):
            if getattr(self, name) is not None:
                _check_count(name, getattr(self, name))
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**32:
            raise ConfigError(f"seed must be a whole number from 0 to 2**32 - 1, not {self.seed!r}")
        if self.lr_schedule not in SCHEDULES:
            raise ConfigError(
                f"no learning-rate schedule named {self.lr_schedule!r}; there are: {', '.join(SCHEDULES)}"
            )
        _check_number("learning_rate", self.learning_rate, above=0.0)
        _check_number("final_rate_fraction", self.final_rate_fraction, at_least=0.0, at_most=1.0)
        if self.lr_schedule == "constant" and self.final_rate_fraction:
            raise ConfigError(
                "a constant schedule has no final_rate_fraction; leave it 0 or choose cosine or linear"
            )
        warmup_steps(self.warmup, self.steps)
        object.__setattr__(self, "optimizer_options", dict(self.optimizer_options))
        try:
            json.dumps(self.optimizer_options, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"optimizer_options must be JSON values: {error}") from error
        if self.mesh is not None:
            check_mesh(parse_mesh(self.mesh), batch_size=self.batch_size, schedule=self.schedule)
        rate = self.learning_rate if self.is_constant else lambda step: self.learning_rate + 0 * step
        self.recipe("full" if self.bfloat16 else "lora", rate)

    @property
    def is_constant(self) -> bool:
        """Whether the learning rate never changes; some optimizers take no other."""
        return self.lr_schedule == "constant" and warmup_steps(self.warmup, self.steps) == 0

    def recipe(self, mode: Mode, learning_rate: float | optax.Schedule) -> StepRecipe:
        """How a step of this run is computed.

        Raises:
          ConfigError: choices that do not go together.
        """
        return StepRecipe(
            mode=mode,
            schedule=self.schedule,
            optimizer=self.optimizer,
            optimizer_options=self.optimizer_options,
            learning_rate=learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm,
            clip_by=self.clip_by,
            remat=self.remat,
            boundaries=self.boundaries,
            mlp_tile=self.mlp_tile,
            spill_to=None if self.spill_to is None else Path(self.spill_to),
            bfloat16=self.bfloat16,
            seed=self.seed,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values, for ``json.dumps``."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "TrainSettings":
        """The settings ``to_json`` gave.

        Raises:
          ConfigError: a field that there is not (a misspelt one, or one of another version).
        """
        fields = [field.name for field in dataclasses.fields(cls)]
        unknown = [name for name in values if name not in fields]
        if unknown:
            raise ConfigError(
                f"no training setting named {', '.join(unknown)}; there are: {', '.join(fields)}"
            )
        return cls(**values)

    def deciding(self) -> dict[str, Any]:
        """The settings that decide the trained bits: all but logging, evaluation and checkpoint intervals."""
        return {name: value for name, value in self.to_json().items() if name not in _NOT_IN_FINGERPRINT}

    def fingerprint(self) -> str:
        """SHA-256 (hex) over ``deciding()``; equal for runs that may resume each other's checkpoints."""
        return hashlib.sha256(json.dumps(self.deciding(), sort_keys=True).encode()).hexdigest()


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"{name} must be a whole number of at least 1 and below 2**31, not {value!r}")


def _check_number(
    name: str,
    value: Any,
    *,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
) -> None:
    good = (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and value == value
        and abs(value) != float("inf")
    )
    if not good or (above is not None and value <= above):
        raise ConfigError(
            f"{name} must be a finite number{'' if above is None else f' above {above:g}'}, not {value!r}"
        )
    if (at_least is not None and value < at_least) or (at_most is not None and value > at_most):
        raise ConfigError(f"{name} must be between {at_least:g} and {at_most:g}, not {value!r}")
