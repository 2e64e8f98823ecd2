"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), in the rotate-half layout of Hugging Face.

(x1, x2) = halves of a head;  out = (x1 cos - x2 sin, x2 cos + x1 sin),  angle = position * theta^(-2 i / C)
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array, ArrayLike
from edgejax.models.config import ModelConfig, RopeScaling


class RopeTables(NamedTuple):
    """Cosines and sines ``[B, T, C // 2]`` float32, for global layers and (if any) for sliding ones."""

    cos: Float[Array, "B T C2"]
    sin: Float[Array, "B T C2"]
    cos_sliding: Float[Array, "B T C2"] | None = None
    sin_sliding: Float[Array, "B T C2"] | None = None

    def of_layer(
        self, sliding: Bool[Array, ""] | None
    ) -> tuple[Float[Array, "B T C2"], Float[Array, "B T C2"]]:
        """Cosines and sines for a layer of either kind, chosen at run time where a stack mixes them."""
        if sliding is None or self.cos_sliding is None or self.sin_sliding is None:
            return self.cos, self.sin
        return jnp.where(sliding, self.cos_sliding, self.cos), jnp.where(sliding, self.sin_sliding, self.sin)


def rope_tables(config: ModelConfig, positions: Int[ArrayLike, "B T"]) -> RopeTables:
    """Tables for the positions of a batch; computed once and shared by all layers."""
    cos, sin = _cos_sin(frequencies(config.rope_theta, config.head_dim, config.rope_scaling), positions)
    if not any(config.sliding_layers):
        return RopeTables(cos, sin)
    theta = config.rope_theta if config.rope_theta_sliding is None else config.rope_theta_sliding
    scaling = config.rope_scaling if config.rope_theta_sliding is None else None
    return RopeTables(cos, sin, *_cos_sin(frequencies(theta, config.head_dim, scaling), positions))


def frequencies(theta: float, head_dim: int, scaling: RopeScaling | None) -> np.ndarray:
    """Radians a position for each pair of channels, float32 ``[C // 2]``."""
    base = 1.0 / theta ** (np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if scaling is None:
        return base.astype(np.float32)
    if scaling.kind == "linear":
        return (base / scaling.factor).astype(np.float32)
    turns = scaling.original_max_position * base / (2 * math.pi)  # full turns within the original context
    blend = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    blend = np.clip(blend, 0.0, 1.0)  # 0: stretched by the factor, 1: kept
    return ((1 - blend) * base / scaling.factor + blend * base).astype(np.float32)


def rotate(
    x: Float[Array, "B T H C"], cos: Float[Array, "B T C2"], sin: Float[Array, "B T C2"]
) -> Float[Array, "B T H C"]:
    """Turn each pair of channels by its position's angle."""
    first, second = jnp.split(x, 2, axis=-1)
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _cos_sin(radians: np.ndarray, positions):
    angles = positions[..., None].astype(jnp.float32) * radians
    return jnp.cos(angles), jnp.sin(angles)
