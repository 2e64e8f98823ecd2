"""The next token from its logits: the likeliest, or drawn from the likeliest ones.

    p = softmax(logits / temperature), cut to the top_k likeliest and then to the smallest set of likeliest tokens
    whose mass reaches top_p, and scaled to 1 again

(top-p: Holtzman et al. 2020, arXiv 1904.09751, section 3.1; mass is counted within what top-k left, as Hugging Face
does.) The settings are arrays, so that one compiled program serves them all.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, Int

from edgejax.core.arrays import Array, ArrayLike
from edgejax.core.errors import ConfigError

NOT_FINITE = -1  # the "token" where logits hold NaN or infinity


class Sampling(NamedTuple):
    """How tokens are drawn; see ``make_sampling``."""

    temperature: Float[ArrayLike, ""]  # 0: the likeliest token
    top_p: Float[ArrayLike, ""]  # 1: all
    top_k: Int[ArrayLike, ""]  # 0: all


def make_sampling(temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0) -> Sampling:
    """Checked settings.

    Raises:
      ConfigError: a temperature below 0 or not finite, ``top_p`` outside (0, 1], ``top_k`` below 0.

    Example:
      >>> float(make_sampling(temperature=0.5).top_p)
      1.0
    """
    if not (temperature >= 0 and math.isfinite(temperature)):
        raise ConfigError(
            f"temperature must be a number of at least 0 (0: the likeliest token), not {temperature}"
        )
    if not 0 < top_p <= 1:
        raise ConfigError(f"top_p must be above 0 and at most 1 (1: all tokens), not {top_p}")
    if top_k < 0:
        raise ConfigError(f"top_k must be at least 0 (0: all tokens), not {top_k}")
    return Sampling(jnp.float32(temperature), jnp.float32(top_p), jnp.int32(top_k))


def next_token(logits: Float[Array, "B V"], key: Array, sampling: Sampling) -> Int[Array, " B"]:
    """int32 tokens; among equally likely ones the lowest id goes first. ``NOT_FINITE`` for a row without an answer."""
    tokens = lax.cond(
        sampling.temperature > 0,
        lambda: _draw(logits, key, sampling),
        lambda: jnp.argmax(logits, axis=-1).astype(jnp.int32),
    )
    return jnp.where(jnp.isfinite(logits).all(axis=-1), tokens, NOT_FINITE)


def likeliest(
    logits: Float[Array, "B V"], sampling: Sampling
) -> tuple[Float[Array, "B V"], Int[Array, "B V"]]:
    """Log-weights of the tokens that may be drawn, likeliest first (-inf: may not), and the token ids in that order.

    Needs a temperature above 0.
    """
    ids = jnp.broadcast_to(jnp.arange(logits.shape[-1], dtype=jnp.int32), logits.shape)
    descending, order = lax.sort((-logits, ids), num_keys=1, is_stable=True)
    scaled = (
        descending[:, :1] - descending
    ) / sampling.temperature  # the likeliest is 0, however small the divisor
    ranks = jnp.arange(logits.shape[-1])
    kept = (ranks < sampling.top_k) | (sampling.top_k == 0)
    probabilities = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    mass_before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept &= (mass_before < sampling.top_p) | (sampling.top_p >= 1)
    kept |= ranks == 0
    return jnp.where(kept, scaled, -jnp.inf), order


def _draw(logits, key, sampling):
    weights, order = likeliest(logits, sampling)
    rank = jax.random.categorical(key, weights, axis=-1)
    return jnp.take_along_axis(order, rank[:, None], axis=-1)[:, 0]
