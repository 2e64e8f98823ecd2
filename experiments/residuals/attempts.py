"""Ways to store a boundary in 8 bits that were tried, the one that was taken among them, as one family."""

import dataclasses
import math

import jax.numpy as jnp

from edgejax.core.counter_hash import element_indices, uniform
from edgejax.memory.residuals import TINY

TOP = {"nearest": 127.0, "stochastic": 127.0, "dither": 126.5}


@dataclasses.dataclass(frozen=True)
class Attempt:
    """8-bit blocks with choices; ``Attempt(change=True, level=0.5, rounding="dither")`` is ``int8``.

    Attributes:
      block: values that share a scale.
      change: code the change since the boundary before (closed loop) instead of the boundary.
      level: channels are first divided by (mean size over positions) ^ level.
      rounding: nearest, stochastic, or dither (subtractive).
      wide: of each row, so many of the largest values are kept as they are.
    """

    block: int = 32
    change: bool = False
    level: float = 0.0
    rounding: str = "stochastic"
    wide: int = 0

    def start(self, shape):
        return jnp.zeros(shape, jnp.float32) if self.change else ()

    def store(self, h, reference, key):
        stored = self._coded(h - reference if self.change else h, key)
        return stored, reference + stored if self.change else ()

    def restore(self, stored, reference, key):
        return (reference, reference - stored) if self.change else (stored, ())

    def stored_bytes(self, shape):
        """What the codes would take; here they are kept as the float32 values that they stand for."""
        *rows, width = shape
        scales = 4 * math.prod(rows) * -(-width // self.block)
        kept = math.prod(rows) * self.wide * 6  # a value and its place
        return math.prod(shape) + scales + kept + (4 * width if self.level else 0)

    def _coded(self, x, key):
        exact = x
        if self.wide:
            largest = jnp.sort(jnp.abs(x), axis=-1)[..., -self.wide, None]
            x = jnp.where(jnp.abs(x) >= largest, 0.0, x)
        size = jnp.mean(jnp.abs(x), axis=tuple(range(x.ndim - 1))) ** self.level
        channel = jnp.where(size < TINY, 1.0, size)
        blocks = (x / channel).reshape(*x.shape[:-1], -1, self.block)
        top = jnp.max(jnp.abs(blocks), axis=-1, keepdims=True)
        step = jnp.where(top < TINY, 1.0, top / TOP[self.rounding])
        u = uniform(element_indices(x.shape), key).reshape(blocks.shape)
        if self.rounding == "nearest":
            codes = jnp.round(blocks / step)
        elif self.rounding == "stochastic":
            codes = jnp.floor(blocks / step + u)
        else:
            codes = jnp.round(blocks / step + (u - 0.5)) - (u - 0.5)
        coded = (codes * jnp.where(top < TINY, 0.0, step)).reshape(x.shape) * channel
        return jnp.where(jnp.abs(exact) >= largest, exact, coded) if self.wide else coded
