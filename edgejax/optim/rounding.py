"""Parameters held in bfloat16 alone, without a float32 master copy, by stochastic rounding.

bfloat16 keeps 8 bits of a number, so an update below 1/512 of a parameter is lost when the sum is rounded to the
nearest. Rounded up with a probability of its distance from the number below, the sum is right on average:

    E[round(w + u)] = w + u.

(Gupta et al. 2015, arXiv 1502.02551, section 3; for training in bfloat16 alone, Zamirai et al. 2020, arXiv 2010.06192.)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int, UInt32

from edgejax.core.arrays import Array, PyTree
from edgejax.core.counter_hash import element_indices, uniform_bits
from edgejax.optim.streaming import step_key


def round_stochastically(x: Float[Array, "..."], bits: UInt32[Array, "..."]) -> Array:
    """float32 to bfloat16, up or down with probabilities that make the mean ``x``.

    Args:
      x: float32. NaN and infinities stay what they are.
      bits: uniform uint32, of which the lower 16 are used.

    Example:
      >>> x = jnp.full(1000, 1 + 2**-9, jnp.float32)  # a quarter of the way from 1 to the next bfloat16
      >>> bits = uniform_bits(jnp.arange(1000), 0)
      >>> bool(abs(round_stochastically(x, bits).astype(jnp.float32).mean() - x[0]) < 1e-4)
      True
    """
    pattern = jax.lax.bitcast_convert_type(x, jnp.uint32)
    upper = ((pattern + (bits & 0xFFFF)) >> 16).astype(jnp.uint16)
    rounded = jax.lax.bitcast_convert_type(upper, jnp.bfloat16)
    return jnp.where(jnp.isfinite(x), rounded, x.astype(jnp.bfloat16))


class StochasticRoundingState(NamedTuple):
    """Attributes:
    count: int32, steps taken; with the seed it decides all random bits.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the name optax gives it, and a method of tuples


def stochastic_rounding(seed: int | Array = 0) -> optax.GradientTransformationExtraArgs:
    """Makes ``optax.apply_updates`` round bfloat16 parameters stochastically; the last link of a chain.

    The sum w + u is rounded here, and the update that leaves is the float32 difference of the rounded sum and w, so
    that adding it to w gives exactly the rounded sum. Updates of parameters in other dtypes pass unchanged.

    Args:
      seed: of the random bits, which depend on it, the step, the leaf and ``salt`` alone.

    Returns:
      A transformation whose ``update`` needs the parameters and takes ``salt``, an int32 that tells apart slices of
      one leaf that are updated one by one.

    Raises:
      ValueError: from ``update``, without parameters.

    Example:
      >>> optimizer = optax.chain(optax.sgd(1e-3), stochastic_rounding(seed=0))
      >>> params = {"w": jnp.ones(8, jnp.bfloat16)}
      >>> updates, _ = optimizer.update({"w": jnp.ones(8)}, optimizer.init(params), params)
      >>> optax.apply_updates(params, updates)["w"].dtype
      dtype(bfloat16)
    """

    def init(params: PyTree) -> StochasticRoundingState:
        del params
        return StochasticRoundingState(jnp.zeros((), jnp.int32))

    def update(
        updates: PyTree, state: StochasticRoundingState, params: PyTree = None, *, salt=0, **extra: Any
    ):
        del extra
        if params is None:
            raise ValueError("stochastic_rounding needs the parameters: update(updates, state, params)")
        count = optax.safe_increment(state.count)

        def difference(number: int, update, param):
            if param.dtype != jnp.bfloat16:
                return update
            wide = param.astype(jnp.float32)
            bits = uniform_bits(element_indices(param.shape), step_key(seed, count, number, salt))
            rounded = round_stochastically(wide + update.astype(jnp.float32), bits)
            return rounded.astype(jnp.float32) - wide

        leaves, treedef = jax.tree.flatten(updates)
        pairs = enumerate(zip(leaves, jax.tree.leaves(params), strict=True))
        new = [difference(number, update, param) for number, (update, param) in pairs]
        return jax.tree.unflatten(treedef, new), StochasticRoundingState(count)

    return optax.GradientTransformationExtraArgs(init, update)
