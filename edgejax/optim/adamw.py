"""Adam with decoupled weight decay, its two moments held in 32, 8 or 4 bits.

For a gradient g at step t = 1, 2, ... (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1; Loshchilov and Hutter
2019, arXiv 1711.05101, algorithm 2):

    m = b1 m + (1 - b1) g                      v = b2 v + (1 - b2) g^2
    update = - rate ( (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)  +  weight_decay * w )

Between steps v is held as its root (whose relative error is the update's) in a code without zero, and m as its ratio to
that root, in a signed code that has zero (``codes``, ``moments``):

    s = encode(sqrt(v))        r = encode(m / decode(s))        m = decode(r) decode(s)

The update is the ratio, so that a code of it spreads its error evenly over the updates of a block. Of m itself, an
element far below its block's largest would get that one's error, and divide it by its own small root: in 4 bits that
was a noise of 1.4 times the update's energy, and is 0.26 times it with ratios (LOG.md, 2026-11-25).

Each step decodes both, updates, and encodes them with stochastic rounding, so that m and v are right on average. It has
to be stochastic: b2 = 0.999 changes a second moment by a thousandth, far less than half the distance of two levels,
so that rounding to the nearest would leave it where it was.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from edgejax.core.arrays import Array, PyTree
from edgejax.optim.codes import Code
from edgejax.optim.moments import check_bits, is_moment, zero_moment
from edgejax.optim.streaming import step_key, update_leaf

ScalarOrSchedule: TypeAlias = float | Array | optax.Schedule
Mask: TypeAlias = PyTree | Callable[[PyTree], PyTree] | None

DEFAULT_CODES = {8: "dynamic", 4: "linear"}


class ScaleByAdamState(NamedTuple):
    """Attributes:
    count: int32, steps taken.
    mu: first moment of each leaf; where quantised, its ratio to the root of the second as that is held.
    nu: second moment; where quantised, its square root.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the name optax gives it, and a method of tuples
    mu: PyTree
    nu: PyTree


def scale_by_adam(
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    *,
    bits: int = 32,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """The Adam direction of the module's docstring, without rate and decay.

    Args:
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second.
      bits: of each moment: 32, 8 or 4. Leaves below ``moments.SMALLEST_QUANTIZED`` elements stay at 32.
      code: of the roots of second moments, ``dynamic`` or ``linear``; None: dynamic with 8 bits, linear with 4.
      seed: of the stochastic rounding of moments.

    Returns:
      A transformation; its update streams over large leaves and has the gradient's dtype. ``update`` takes
      ``salt``, an int32 that tells apart slices of one leaf that are updated one by one.

    Raises:
      ConfigError: other ``bits`` or ``code``.
    """
    check_bits(bits)
    family = code or DEFAULT_CODES.get(bits, "linear")
    mu_code, nu_code = Code("linear", bits, signed=True), Code(family, bits, signed=False)

    def init(params: PyTree) -> ScaleByAdamState:
        def zeros(code: Code) -> PyTree:
            return jax.tree.map(lambda leaf: zero_moment(leaf, None if bits == 32 else code), params)

        return ScaleByAdamState(jnp.zeros((), jnp.int32), zeros(mu_code), zeros(nu_code))

    def update(gradients: PyTree, state: ScaleByAdamState, params: PyTree = None, *, salt=0, **extra: Any):
        del params, extra
        count = optax.safe_increment(state.count)
        correction1, correction2 = 1 - b1**count, 1 - b2**count

        def step(g, m, v):
            m = b1 * m + (1 - b1) * g
            v = b2 * v + (1 - b2) * g * g
            root = jnp.sqrt(v)
            return (m / correction1) / (root / jnp.sqrt(correction2) + eps), m, v, root

        def wide(g, v, m):
            update, m, v, _ = step(g, m, v)
            return update, v, m

        def quantized(g, root, ratio):
            update, m, _, root = step(g, ratio * root, root * root)
            return update, root, lambda held: jnp.where(held > 0, m / held, 0.0)

        leaves, treedef = jax.tree.flatten(gradients)
        mus, nus = jax.tree.leaves(state.mu, is_leaf=is_moment), jax.tree.leaves(state.nu, is_leaf=is_moment)
        updates, new_mu, new_nu = [], [], []
        for number, (g, mu, nu) in enumerate(zip(leaves, mus, nus, strict=True)):
            key = step_key(seed, count, number, salt)
            direction, (nu, mu) = update_leaf(quantized if is_moment(mu) else wide, g, (nu, mu), key)
            updates.append(direction)
            new_mu.append(mu)
            new_nu.append(nu)
        state = ScaleByAdamState(
            count, jax.tree.unflatten(treedef, new_mu), jax.tree.unflatten(treedef, new_nu)
        )
        return jax.tree.unflatten(treedef, updates), state

    return optax.GradientTransformationExtraArgs(init, update)


def adamw(
    learning_rate: ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    bits: int = 32,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """AdamW with moments in ``bits`` bits; the maths is in the module's docstring.

    Args:
      learning_rate: a number or an optax schedule.
      b1, b2, eps, bits, code, seed: see ``scale_by_adam``.
      weight_decay: decoupled, multiplied with the learning rate.
      mask: leaves that are decayed: a tree of bools, or a function from the parameters to one; None: all.

    Under ``optax.inject_hyperparams``, ``bits`` (and a mask that is a function) must be in its ``static_args``; or use
    ``adamw8bit`` and ``adamw4bit``, which have no such argument.

    Example:
      >>> optimizer = adamw(1e-3, bits=4)
      >>> params = {"w": jnp.ones((64, 128))}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update({"w": jnp.ones((64, 128))}, state, params)
      >>> round(float(updates["w"][0, 0]), 6)
      -0.001
    """
    return optax.chain(
        scale_by_adam(b1, b2, eps, bits=bits, code=code, seed=seed),
        decoupled_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def decoupled_decay(weight_decay: float | Array, mask: Mask) -> optax.GradientTransformation:
    """``optax.add_decayed_weights``, or nothing at all where the decay is the number 0."""
    if isinstance(weight_decay, int | float) and weight_decay == 0:
        return optax.identity()
    return optax.add_decayed_weights(weight_decay, mask)


def adamw8bit(
    learning_rate: ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """``adamw`` with 8-bit moments: 2.06 bytes of state a parameter (Dettmers et al. 2022, arXiv 2110.02861)."""
    return adamw(learning_rate, b1, b2, eps, weight_decay, mask, bits=8, code=code, seed=seed)


def adamw4bit(
    learning_rate: ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """``adamw`` with 4-bit moments: 1.06 bytes of state a parameter (after Li et al. 2023, arXiv 2309.01507)."""
    return adamw(learning_rate, b1, b2, eps, weight_decay, mask, bits=4, code=code, seed=seed)
