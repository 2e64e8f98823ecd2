"""Low-rank adapters: y = W x + (alpha / R) B (A x), with only A and B trained.

Hu et al. 2021, arXiv 2106.09685, equation 3. ``rslora`` scales by alpha / sqrt(R) instead (Kalajdzievski 2023,
arXiv 2312.03732). A starts Kaiming-uniform with a = sqrt(5), that is U(-1/sqrt(I), 1/sqrt(I)), as in PEFT; B
starts at zero, so that the first forward pass is the base model's to the bit.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.models.config import LINEAR_NAMES, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """Which linear layers get adapters, and their size."""

    rank: int = 8
    alpha: float = 16.0
    rslora: bool = False  # alpha / sqrt(rank) instead of alpha / rank
    targets: tuple[str, ...] = LINEAR_NAMES

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"LoRA rank must be at least 1, not {self.rank}")
        if not math.isfinite(self.alpha):
            raise ConfigError(f"LoRA alpha must be a finite number, not {self.alpha}")
        if not self.targets:
            raise ConfigError(f"LoRA needs at least one target layer; there are: {', '.join(LINEAR_NAMES)}")
        unknown = [name for name in self.targets if name not in LINEAR_NAMES]
        if unknown:
            raise ConfigError(
                f"no linear layer named {', '.join(unknown)}; there are: {', '.join(LINEAR_NAMES)}"
            )

    @property
    def scaling(self) -> float:
        """What multiplies B A."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


def init_lora(config: ModelConfig, lora: LoraConfig, key: Array) -> PyTree:
    """Adapters ``{"blocks": {name: {"lora_a": f32 [L, R, I], "lora_b": f32 [L, O, R]}}}``, B zero."""
    shapes = config.linear_shapes()
    blocks = {}
    for name, subkey in zip(lora.targets, jax.random.split(key, len(lora.targets)), strict=True):
        n_out, n_in = shapes[name]
        bound = n_in**-0.5
        a = jax.random.uniform(subkey, (config.n_layers, lora.rank, n_in), jnp.float32, -bound, bound)
        blocks[name] = {"lora_a": a, "lora_b": jnp.zeros((config.n_layers, n_out, lora.rank), jnp.float32)}
    return {"blocks": blocks}
