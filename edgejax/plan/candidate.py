"""One way to train, of those that a plan compares."""

import dataclasses
import functools
import json
from pathlib import Path

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.models import LoraConfig, ModelConfig
from edgejax.models.shapes import find_shape
from edgejax.train.recipe import StepRecipe
from edgejax.train.whole import Mode
from edgejax.weights.leaves import check_base
from edgejax.weights.load import abstract_params, open_model
from edgejax.weights.presets import PRESETS
from edgejax.weights.random import RandomSource


@dataclasses.dataclass(frozen=True, kw_only=True)
class Candidate:
    """The settings that decide a step's memory, but for the model.

    Raises:
      ConfigError: a count below 1, or choices that do not go together.

    Example:
      >>> Candidate(mode="full", base="bf16", schedule="layerwise", optimizer="adamw4bit").recipe().bfloat16
      True
    """

    mode: Mode = "lora"
    base: str = "int4"  # how frozen weights are held; with full: bf16 or f32, how trained ones are
    rank: int = 8
    batch: int = 1  # rows of a micro-step
    accumulate: int = 1  # micro-steps of an optimizer step
    seq: int = 512
    schedule: str = "whole"
    optimizer: str = "adamw"
    remat: str = "full"
    boundaries: str = "f32"
    small_code: bool = False  # of this machine's CPU (core.small_code)

    def __post_init__(self):
        for name in ("rank", "batch", "accumulate"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.seq < 2:
            raise ConfigError(f"a row needs at least 2 positions, not {self.seq}")
        if self.mode == "full" and self.base not in ("bf16", "f32"):
            raise ConfigError(f"full-parameter training holds weights in bf16 or f32, not in {self.base}")
        self.recipe()

    def recipe(self) -> StepRecipe:
        """How its step is computed."""
        return _recipe(
            mode=self.mode,
            schedule=self.schedule,
            optimizer=self.optimizer,
            remat=self.remat,
            boundaries=self.boundaries,
            bfloat16=self.mode == "full" and self.base == "bf16",
        )

    def lora(self) -> LoraConfig | None:
        """Its adapters."""
        return LoraConfig(rank=self.rank, alpha=2.0 * self.rank) if self.mode == "lora" else None

    @property
    def held_base(self) -> str:
        """How the model is held when training begins."""
        return "f32" if self.mode == "full" else self.base

    def to_json(self) -> str:
        """For another process, and for the name of a kept result."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> "Candidate":
        """What ``to_json`` gave."""
        return cls(**json.loads(text))

    def describe(self) -> str:
        """What a person calls it, the options that ``edgejax finetune`` takes.

        >>> Candidate(remat="mlp", boundaries="bf16").describe()
        '--base int4 --remat mlp --boundaries bf16'
        """
        said = {"base": self.base}
        if self.mode == "full":
            said = {"mode": "full"} | said | {"optimizer": self.optimizer}
        if self.mode == "lora" and self.optimizer != "adamw":
            said |= {"optimizer": self.optimizer}
        if self.schedule != "whole":
            said |= {"schedule": self.schedule}
        said |= {"remat": self.remat}
        if self.boundaries != "f32":
            said |= {"boundaries": self.boundaries}
        if self.accumulate > 1:
            said |= {"accumulate": str(self.accumulate)}
        words = [f"--{name} {value}" for name, value in said.items()]
        return " ".join([*words, *(["--small-code"] if self.small_code else [])])


_recipe = functools.cache(StepRecipe)  # some are tried out on small arrays when they are made


def is_here(name: str) -> bool:
    """Whether a model's name stands for files of this machine (or for a path, though there may be nothing)."""
    looks_like_a_path = "/" in name or name.endswith((".gguf", ".ejx", ".safetensors"))
    is_cached = name in PRESETS and PRESETS[name].is_cached()
    return looks_like_a_path or is_cached or Path(name).expanduser().exists()


@functools.cache
def abstract_model(name: str, base: str) -> tuple[ModelConfig, PyTree]:
    """A decoder, and the shapes and dtypes of its parameters held as ``base``; no weight is read or fetched.

    Args:
      name: a path, a preset that is on this machine already, or a name of ``models.shapes``.
      base: see ``weights.load_model``.

    Raises:
      ConfigError, WeightsError: no such model; names the nearest.
    """
    if is_here(name):
        opened = open_model(name, base=check_base(base), need_tokenizer=False)
        return opened.config, opened.abstract_params()
    config = find_shape(name.removesuffix("-bf16"))  # a preset may say how its file holds the weights
    return config, abstract_params(RandomSource(config, 0), check_base(base))
