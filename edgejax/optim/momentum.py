"""Lion, and SGD with momentum, their one moment held in 32, 8 or 4 bits.

Lion (Chen et al. 2023, arXiv 2302.06675, algorithm 2), for a gradient g:

    update = - rate ( sign(b1 m + (1 - b1) g) + weight_decay * w ),      m = b2 m + (1 - b2) g

SGD (Sutskever et al. 2013, in optax's form):

    m = momentum m + g,      update = - rate m,  or  - rate (momentum m + g) with Nesterov's
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from edgejax.core.arrays import Array, PyTree
from edgejax.optim.adamw import DEFAULT_CODES, Mask, ScalarOrSchedule, decoupled_decay
from edgejax.optim.codes import Code
from edgejax.optim.moments import check_bits, is_moment, zero_moment
from edgejax.optim.streaming import Rule, step_key, update_leaf


class MomentumState(NamedTuple):
    """Attributes:
    count: int32, steps taken.
    mu: the moment of each leaf, wide or quantised.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # the name optax gives it, and a method of tuples
    mu: PyTree


def _one_moment(rule: Rule, bits: int, code: str | None, seed) -> optax.GradientTransformationExtraArgs:
    check_bits(bits)
    held_in = None if bits == 32 else Code(code or DEFAULT_CODES[bits], bits, signed=True)

    def init(params: PyTree) -> MomentumState:
        return MomentumState(
            jnp.zeros((), jnp.int32), jax.tree.map(lambda leaf: zero_moment(leaf, held_in), params)
        )

    def update(gradients: PyTree, state: MomentumState, params: PyTree = None, *, salt=0, **extra: Any):
        del params, extra
        count = optax.safe_increment(state.count)
        leaves, treedef = jax.tree.flatten(gradients)
        moments = jax.tree.leaves(state.mu, is_leaf=is_moment)
        updates, new = [], []
        for number, (g, mu) in enumerate(zip(leaves, moments, strict=True)):
            direction, (mu,) = update_leaf(rule, g, (mu,), step_key(seed, count, number, salt))
            updates.append(direction)
            new.append(mu)
        return jax.tree.unflatten(treedef, updates), MomentumState(count, jax.tree.unflatten(treedef, new))

    return optax.GradientTransformationExtraArgs(init, update)


def scale_by_lion(
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    *,
    bits: int = 32,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """The sign that Lion steps by; arguments as in ``lion``."""

    def rule(g, m):
        return jnp.sign(b1 * m + (1 - b1) * g), b2 * m + (1 - b2) * g

    return _one_moment(rule, bits, code, seed)


def trace(
    decay: float | Array,
    nesterov: bool = False,
    *,
    bits: int = 32,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """The decaying sum of gradients that SGD with momentum steps by; arguments as in ``sgd``."""

    def rule(g, m):
        m = decay * m + g
        return (decay * m + g if nesterov else m), m

    return _one_moment(rule, bits, code, seed)


def lion(
    learning_rate: ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    bits: int = 32,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """Lion with its moment in ``bits`` bits; the maths is in the module's docstring.

    Args:
      learning_rate: a number or an optax schedule; three to ten times below AdamW's.
      b1, b2: decays of the direction and of the moment.
      weight_decay: decoupled, multiplied with the learning rate.
      mask: leaves that are decayed, a tree of bools or a function from the parameters to one; None: all.
      bits, seed: see ``adamw.scale_by_adam``.
      code: of the moment, ``dynamic`` or ``linear``; None: dynamic with 8 bits, linear with 4.

    Example:
      >>> optimizer = lion(1e-4, bits=8)
      >>> params = {"w": jnp.ones((64, 128))}
      >>> updates, _ = optimizer.update({"w": jnp.ones((64, 128))}, optimizer.init(params), params)
      >>> round(float(updates["w"][0, 0]), 6)
      -0.0001
    """
    return optax.chain(
        scale_by_lion(b1, b2, bits=bits, code=code, seed=seed),
        decoupled_decay(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def lion8bit(
    learning_rate: ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.99,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """``lion`` with an 8-bit moment: 1.03 bytes of state a parameter."""
    return lion(learning_rate, b1, b2, weight_decay, mask, bits=8, code=code, seed=seed)


def sgd(
    learning_rate: ScalarOrSchedule,
    momentum: float | Array = 0.9,
    nesterov: bool = False,
    *,
    bits: int = 32,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """SGD with its momentum in ``bits`` bits; the maths is in the module's docstring.

    Args:
      learning_rate: a number or an optax schedule.
      momentum: decay of the sum of gradients.
      nesterov: look one step ahead.
      bits, seed: see ``adamw.scale_by_adam``.
      code: of the moment, see ``lion``.

    Example:
      >>> optimizer = sgd(0.1, bits=8)
      >>> params = {"w": jnp.ones((64, 128))}
      >>> updates, _ = optimizer.update({"w": jnp.ones((64, 128))}, optimizer.init(params), params)
      >>> round(float(updates["w"][0, 0]), 6)
      -0.1
    """
    return optax.chain(
        trace(momentum, nesterov, bits=bits, code=code, seed=seed),
        optax.scale_by_learning_rate(learning_rate),
    )


def sgd8bit(
    learning_rate: ScalarOrSchedule,
    momentum: float | Array = 0.9,
    nesterov: bool = False,
    *,
    code: str | None = None,
    seed: int | Array = 0,
) -> optax.GradientTransformationExtraArgs:
    """``sgd`` with an 8-bit momentum: 1.03 bytes of state a parameter."""
    return sgd(learning_rate, momentum, nesterov, bits=8, code=code, seed=seed)
