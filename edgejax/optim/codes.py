"""Codes of a few bits for numbers that a block's scale has brought into [-1, 1] or [0, 1].

A code has levels ``0 = x_0 < x_1 < ... < x_n = 1``; signed codes have their negatives too. A number's *coordinate* is
where it lies among the levels, j + (x - x_j) / (x_{j+1} - x_j), and encoding rounds it to a whole number: to the
nearest, or stochastically, so that the mean over many roundings is x. Two families:

* ``linear``: x_j = j / n.
* ``dynamic``: half of the levels in the decade (0.1, 1], a quarter in the one below, and so on, evenly spaced inside
  each (the dynamic tree code of Dettmers 2015, arXiv 1511.04561, as used for optimizer states by Dettmers et al.
  2022, arXiv 2110.02861). For j = 2^d + f with 0 <= f < 2^d, and D decades,
  x_j = 10^(d - D + 1) (0.1 + 0.9 (f + 1/2) / 2^d), but x_n = 1, so that a block's largest element is kept.

Zero is a level of every signed code. The unsigned codes, for second moments, have none for it (Li et al. 2023, arXiv
2309.01507, section 4.1): a moment rounded to zero would be a division by epsilon. A block of zeros stays zero all the
same, for its scale is zero. They hold roots of moments, and it is the mean of the squares that has to be right: with few
levels the variance of the rounding would be added to every small moment (measured after 600 steps in 4 bits: 32% too
large), so the linear one goes up from level j with the probability (x^2 - x_j^2) / (x_{j+1}^2 - x_j^2).
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from edgejax.core.arrays import Array
from edgejax.core.errors import ConfigError

FAMILIES = ("dynamic", "linear")
NEAREST = 0.5  # noise that rounds to the nearest level


@dataclasses.dataclass(frozen=True)
class Code:
    """Levels in ``bits`` bits; see the module's docstring.

    Attributes:
      family: ``dynamic`` or ``linear``.
      bits: 4 or 8.
      signed: codes -n..n for -x_n..x_n; else codes 0..n-1 for x_1..x_n.

    Example:
      >>> code = Code("linear", 4, signed=True)
      >>> code.encode(jnp.array([-1.0, 0.0, 0.4])).tolist()
      [-7, 0, 3]
    """

    family: str
    bits: int
    signed: bool

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise ConfigError(f"no code named {self.family!r}; there are: {', '.join(FAMILIES)}")

    def encode(
        self, x: Float[Array, "..."], noise: Float[Array, "..."] | float = NEAREST
    ) -> Int[Array, "..."]:
        """Codes of ``x``, int32.

        Args:
          x: float32, in [-1, 1] where signed, else in [0, 1].
          noise: added before the coordinate is cut to a whole number: ``NEAREST``, or uniform in [0, 1).
        """
        levels = _magnitudes(self.family, self.bits, self.signed)
        top = len(levels) - 1
        coordinate = _piecewise_linear(jnp.abs(x), levels, np.arange(top + 1.0))
        if not self.signed and self.family == "linear":
            coordinate = _for_squares(coordinate)
        level = jnp.floor(coordinate + noise)
        if self.signed:
            level = jnp.clip(level, 0, top)
            return jnp.where(x < 0, -level, level).astype(jnp.int32)
        return (jnp.clip(level, 1, top) - 1).astype(jnp.int32)

    def decode(self, codes: Int[Array, "..."]) -> Float[Array, "..."]:
        """The levels of ``codes``, float32."""
        levels = _magnitudes(self.family, self.bits, self.signed)
        index = codes.astype(jnp.float32)
        index = jnp.abs(index) if self.signed else index + 1
        level = _piecewise_linear(index, np.arange(float(len(levels))), levels)
        return jnp.where(codes < 0, -level, level) if self.signed else level

    @property
    def largest(self) -> int:
        """The code of 1."""
        return len(_magnitudes(self.family, self.bits, self.signed)) - (1 if self.signed else 2)


@functools.cache
def _magnitudes(family: str, bits: int, signed: bool) -> np.ndarray:
    """Levels 0 = x_0 .. x_n = 1, float64; ``dynamic`` has 2^D - 1 of them above zero, D = bits of the magnitude."""
    decades = bits - signed
    if family == "linear":
        n = 2**decades - signed
        return np.arange(n + 1) / n
    levels = [0.0]
    for d in range(decades):
        fraction = (np.arange(2**d) + 0.5) / 2**d
        levels.extend(10.0 ** (d - decades + 1) * (0.1 + 0.9 * fraction))
    levels[-1] = 1.0
    return np.array(levels)


def _for_squares(coordinate):
    """j + f for a root, in even levels, as j + f (2 j + f) / (2 j + 1) for its square."""
    below = jnp.floor(coordinate)
    f = coordinate - below
    return below + f * (2 * below + f) / (2 * below + 1)


def _piecewise_linear(x, starts: np.ndarray, values: np.ndarray):
    """The broken line through the points (starts, values), by selects: a table look-up is ten times slower on CPU."""
    slopes = np.diff(values) / np.diff(starts)
    bends = [0, *(1 + np.flatnonzero(~np.isclose(slopes[1:], slopes[:-1], rtol=1e-6)))]
    line = None
    for i in bends:
        piece = x * np.float32(slopes[i]) + np.float32(values[i] - slopes[i] * starts[i])
        line = piece if line is None else jnp.where(x >= np.float32(starts[i]), piece, line)
    return line
