"""What ``edgejax bench`` measures: plain values, handed to the measuring process as JSON. Imports no JAX."""

import dataclasses
import json
from typing import TYPE_CHECKING

from edgejax.core.errors import ConfigError

if TYPE_CHECKING:
    from edgejax.train.recipe import StepRecipe

SCHEDULES = ("whole", "layerwise", "streamed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSettings:
    """One measured configuration.

    Raises:
      ConfigError: a count below 1, an unknown mode or schedule, or a base that full training cannot have.
    """

    model: str = "smollm2-135m"  # a preset, a path, or with random_weights a name of models.shapes.SHAPES
    mode: str = "lora"  # lora: adapters on all linear layers; full: all parameters
    rank: int = 8
    batch: int = 1  # rows of a micro-step
    accumulate: int = 1  # micro-steps of an optimizer step
    seq: int = 512  # tokens of a row
    remat: str = "auto"  # none with the schedule whole, full with layerwise
    boundaries: str = "f32"
    mlp_tile: int | None = None
    base: str = "auto"
    optimizer: str = "adamw"
    learning_rate: float = 1e-4
    schedule: str = "whole"
    warmup: int = 1  # steps after the first one that are not counted
    repeats: int = 10  # steps that are
    threads: int = 2  # cores the process may use; fewer if there are fewer
    compile_cache: bool = False
    random_weights: bool = False  # random weights and tokens: needs no file
    seed: int = 0  # of adapters, random weights and random tokens

    def __post_init__(self):
        for name in ("rank", "batch", "accumulate", "repeats", "threads"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name} must be at least 1, not {getattr(self, name)}")
        if self.seq < 2:
            raise ConfigError(f"--seq must be at least 2, not {self.seq}")
        if self.warmup < 0:
            raise ConfigError(f"--warmup must be at least 0, not {self.warmup}")
        if self.mode not in ("lora", "full"):
            raise ConfigError(f"--mode {self.mode!r} is unknown; there are: lora, full")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"--schedule {self.schedule!r} is unknown; there are: {', '.join(SCHEDULES)}")
        if self.mode == "full" and self.base not in ("auto", "f32", "bf16"):
            raise ConfigError(
                f"--mode full trains weights in f32 or bf16, so --base {self.base} cannot be honoured; leave it out"
            )
        if self.remat == "auto":
            object.__setattr__(self, "remat", "none" if self.schedule == "whole" else "full")

    @property
    def bfloat16(self) -> bool:
        """Whether matrices are trained in bfloat16."""
        return self.mode == "full" and self.base == "bf16"

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step; every position of every row holds one."""
        return self.accumulate * self.batch * self.seq

    def flop_per_token(self, n_params: int) -> int:
        """The convention: 2N forward, 2N for the gradient of activations, 2N for that of weights where they train.

        >>> BenchSettings().flop_per_token(100), BenchSettings(mode="full").flop_per_token(100)
        (400, 600)
        """
        return (4 if self.mode == "lora" else 6) * n_params

    def recipe(self) -> "StepRecipe":
        """How the measured step is computed.

        Raises:
          ConfigError: choices that do not go together.
        """
        from edgejax.train.recipe import StepRecipe

        return StepRecipe(
            mode=self.mode,  # type: ignore[arg-type]
            schedule=self.schedule,
            optimizer=self.optimizer,
            learning_rate=self.learning_rate,
            remat=self.remat,
            boundaries=self.boundaries,
            mlp_tile=self.mlp_tile,
            bfloat16=self.bfloat16,
            seed=self.seed,
        )

    def to_json(self) -> str:
        """For the measuring process."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "BenchSettings":
        """What ``to_json`` wrote."""
        return cls(**json.loads(text))
