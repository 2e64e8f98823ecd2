"""APOLLO: Adam's step sizes for whole channels of a matrix, estimated in a random space of a few dimensions.

A weight ``[O, I]`` has C = max(O, I) *channels* (its rows where O >= I, else its columns) of K = min(O, I)
numbers. Its gradient, channels first, is G ``[C, K]``. At step t = 1, 2, ... (Zhu et al. 2025, arXiv
2412.05270, algorithm 1, transposed, as our channels come first):

    P ~ N(0, 1/r)  [r, K], drawn anew every T steps           R = G P^T  [C, r]
    m = b1 m + (1 - b1) R,   v = b2 v + (1 - b2) R^2          R~ = m / (sqrt(v) + eps)
    s_j = |R~_j| / |R_j|  for each channel j  (APOLLO),   or  s = |R~| / |R|  for the tensor  (APOLLO-Mini)
    N = s G;   if |N| > gamma |N'|:  N = N gamma |N'| / |N|   (N' is N of the step before)
    direction = alpha sqrt(1 - b2^t) / (1 - b1^t) N

Only m and v, ``2 r max(O, I)`` floats, and the number |N'| are kept of a matrix, instead of Adam's ``2 O I``.
Random projections keep lengths on average, which is all that s needs. P is never stored: each step draws it
again from the seed, the leaf's name, the matrix's place in its stack and (t - 1) // T.

The bound gamma on the growth of N is Fira's (Chen et al. 2024, arXiv 2410.01623). As in the authors' code
(github.com/zhuhanqing/APOLLO), it comes before Adam's bias correction, and moments stay as they are when P
changes.

Deviations. The authors' code has |R| + 1e-8 and |N'| + 1e-8 in the denominators; here s is 0 where |R| is 0,
and a step without a gradient leaves |N'| alone: with theirs, a matrix whose first gradient is exactly zero
(as that of a LoRA factor A is, B being zero at first) would have its next updates held to lengths near 1e-8.
They use APOLLO in attention and MLP only, and Adam for the embedding and the head; here every matrix takes
part that ``matrix_mask`` does not leave out.
"""

import functools
import math
from typing import Any, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Int

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_paths
from edgejax.optim.adamw import Mask, ScalarOrSchedule
from edgejax.optim.apollo_step import Mode, leaf_key, step_matrix, step_stack
from edgejax.optim.matrices import (
    Choice,
    adam_direction,
    check_number,
    masked_zeros,
    matrix_leaves,
    zip_leaves,
)

MODES = get_args(Mode)
MINI_SCALE = math.sqrt(128)


class ScaleByApolloState(NamedTuple):
    """Attributes:
    count: int32, steps taken.
    mu: float32 first moments, of R ``[..., max(O, I), r]`` for matrices, of the gradient for other leaves.
    nu: float32 second moments, shaped as ``mu``.
    norm: float32 |N'| of each matrix ``[...]``; no array for other leaves.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # optax's name for it; tuple.count is never called
    mu: PyTree
    nu: PyTree
    norm: PyTree


def scale_by_apollo(
    rank: int = 128,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    scale: float | Array = 1.0,
    mode: Mode = "channel",
    update_projection_every: int | Array = 200,
    seed: int | Array = 0,
    *,
    norm_growth: float | Array | None = 1.01,
    matrix_mask: Choice = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of the module's docstring, without rate and decay.

    Matrices are the last two axes of a leaf; leading axes, like a stack of layers, count separate matrices.
    Vectors, and matrices whose smaller side is at most ``rank``, follow Adam with float32 moments instead.

    Args:
      rank: r. The paper takes a quarter of the model's width; for a billion parameters and more, 256 do.
      b1: decay of the first moment.
      b2: decay of the second.
      eps: added to the root of the second, in Adam as well; 1e-6 in the authors' code.
      scale: alpha, which makes up for a small rank: 1 for APOLLO, sqrt(128) for APOLLO-Mini.
      mode: ``channel`` or ``tensor``: what has a step size of its own.
      update_projection_every: T, steps a projection stays.
      seed: of the projections.
      norm_growth: gamma, at least 1; None does not bound growth.
      matrix_mask: leaves that are treated as matrices: a tree of bools, or a function of the leaf's dotted
        name. None: all with two axes or more that are not named ``scale`` or ``bias``.

    Returns:
      A transformation; all arithmetic is float32, its updates have the gradient's dtype. ``update`` takes
      ``salt``, the place in its stack of a matrix that is updated alone, and ignores other extra arguments.

    Raises:
      ConfigError: an option out of range.
    """
    _check_options(rank, b1, b2, eps, scale, mode, update_projection_every, norm_growth)

    def init(params: PyTree) -> ScaleByApolloState:
        low_rank = _low_rank_leaves(params, rank, matrix_mask)
        kinds = list(zip(jax.tree.leaves(params), low_rank, strict=True))
        moments = [_moment_shape(leaf.shape, rank) if low else leaf.shape for leaf, low in kinds]
        norms = [leaf.shape[:-2] if low else None for leaf, low in kinds]
        return ScaleByApolloState(
            count=jnp.zeros((), jnp.int32),
            mu=masked_zeros(params, moments),
            nu=masked_zeros(params, moments),
            norm=masked_zeros(params, norms),
        )

    def update(gradients: PyTree, state: ScaleByApolloState, params: PyTree = None, *, salt=0, **extra: Any):
        del params, extra
        count = optax.safe_increment(state.count)
        period = state.count // update_projection_every
        correction = scale * jnp.sqrt(1 - b2**count) / (1 - b1**count)
        rule = functools.partial(step_matrix, b1=b1, b2=b2, eps=eps, mode=mode, norm_growth=norm_growth)

        def one(name, low, gradient, mu, nu, norm):
            wide = gradient.astype(jnp.float32)
            if low:
                key = leaf_key(seed, period, name)
                direction, mu, nu, norm = step_stack(rule, key, wide, mu, nu, norm, salt)
                direction = correction * direction
            else:
                direction, mu, nu = adam_direction(wide, mu, nu, count, b1, b2, eps)
            return direction.astype(gradient.dtype), mu, nu, norm

        rows = zip_leaves(gradients, state.mu, state.nu, state.norm)
        low_rank = _low_rank_leaves(gradients, rank, matrix_mask)
        results = [
            one(*parts, *row) for *parts, row in zip(tree_paths(gradients), low_rank, rows, strict=True)
        ]
        treedef = jax.tree.structure(gradients)
        updates, *new = (jax.tree.unflatten(treedef, [row[i] for row in results]) for i in range(4))
        return updates, ScaleByApolloState(count, *new)

    return optax.GradientTransformationExtraArgs(init, update)


def apollo(
    learning_rate: ScalarOrSchedule,
    rank: int = 128,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    scale: float | Array = 1.0,
    mode: Mode = "channel",
    update_projection_every: int | Array = 200,
    norm_growth: float | Array | None = 1.01,
    seed: int | Array = 0,
    matrix_mask: Choice = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO with decoupled weight decay; the maths is in the module's docstring.

    Args:
      learning_rate: a number or an optax schedule; the paper's is 0.01 for training from scratch, with
        warm-up.
      weight_decay: decoupled, multiplied with the learning rate.
      mask: leaves that are decayed: a tree of bools, or a function from the parameters to one; None: all.
      rank, b1, b2, eps, scale, mode, update_projection_every, norm_growth, seed, matrix_mask: see
        ``scale_by_apollo``.

    Under ``optax.inject_hyperparams``, ``rank`` (and a mask that is a function) must be in its
    ``static_args``; with bfloat16 parameters set its ``hyperparam_dtype`` to float32, as 0.999 in bfloat16 is
    1.

    Example:
      >>> optimizer = apollo(0.01, rank=4)
      >>> params = {"q_proj": {"kernel": jnp.ones((32, 16))}}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> state[0].mu["q_proj"]["kernel"].shape
      (32, 4)
    """
    return optax.chain(
        scale_by_apollo(
            rank,
            b1,
            b2,
            eps,
            scale,
            mode,
            update_projection_every,
            seed,
            norm_growth=norm_growth,
            matrix_mask=matrix_mask,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def apollo_mini(
    learning_rate: ScalarOrSchedule,
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    scale: float | Array = MINI_SCALE,
    update_projection_every: int | Array = 200,
    norm_growth: float | Array | None = 1.01,
    seed: int | Array = 0,
    matrix_mask: Choice = None,
) -> optax.GradientTransformationExtraArgs:
    """APOLLO-Mini: rank 1, one step size a matrix, alpha = sqrt(128); ``2 max(O, I)`` floats a matrix.

    Arguments as in ``apollo``. Under ``optax.inject_hyperparams``, a mask that is a function must be in its
    ``static_args``.

    Example:
      >>> optimizer = apollo_mini(0.01)
      >>> params = {"q_proj": {"kernel": jnp.ones((32, 16))}}
      >>> optimizer.init(params)[0].nu["q_proj"]["kernel"].shape
      (32, 1)
    """
    return apollo(
        learning_rate,
        1,
        b1,
        b2,
        eps,
        weight_decay,
        mask,
        scale=scale,
        mode="tensor",
        update_projection_every=update_projection_every,
        norm_growth=norm_growth,
        seed=seed,
        matrix_mask=matrix_mask,
    )


def _low_rank_leaves(tree: PyTree, rank: int, choice: Choice) -> list[bool]:
    matrices = matrix_leaves(tree, choice)
    leaves = jax.tree.leaves(tree)
    return [flag and min(leaf.shape[-2:]) > rank for leaf, flag in zip(leaves, matrices, strict=True)]


def _moment_shape(shape: tuple[int, ...], rank: int) -> tuple[int, ...]:
    return (*shape[:-2], max(shape[-2:]), rank)


def _check_options(rank, b1, b2, eps, scale, mode, update_projection_every, norm_growth) -> None:
    if isinstance(rank, jax.Array):
        raise ConfigError(
            "rank decides shapes and cannot be traced; under inject_hyperparams, name it in static_args"
        )
    if not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"rank must be an integer of at least 1, not {rank!r}; apollo_mini has rank 1")
    if mode not in MODES:
        raise ConfigError(f"mode must be one of {', '.join(MODES)}, not {mode!r}")
    every = update_projection_every
    if not isinstance(every, int | jax.Array) or (isinstance(every, int) and every < 1):
        raise ConfigError(
            f"update_projection_every must be a whole number of steps, at least 1, not {every!r}; the "
            "authors take 200"
        )
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("eps", eps, 0, above=True)
    check_number("scale", scale, 0, above=True)
    if norm_growth is not None:
        check_number("norm_growth", norm_growth, 1)
