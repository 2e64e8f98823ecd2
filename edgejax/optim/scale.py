"""SCALE: gradients normalised by column, with momentum in the last layer only.

Glentis et al. 2025 (arXiv 2506.16659, algorithm 1). For a matrix with gradient g:

    m = beta m + (1 - beta) g  in the last layer,   m = g  elsewhere (nothing is kept)
    direction = C(m)

In the paper a weight is ``[inputs, outputs]`` and C divides each column by its length, so that each *output*
has a step of one size. Weights here are ``[O, I]``, so C divides each row, along the inputs (the last axis).
The same holds for the head ``[V, D]``, whose outputs are the V tokens. An embedding table ``[V, D]`` is the
one leaf stored inputs first (it maps V tokens to D channels): there C divides each of the D columns, along
the vocabulary. A table that is the head too is treated as a head, with momentum.

    C(m)_o = m_o / max(rms(m_o), eps),     rms(x) = |x| / sqrt(I)       (``norm="rms"``, the default)
    C(m)_o = m_o / max(|m_o|, eps)                                      (``norm="l2"``)

The paper's equation has the length |m_o|. The authors' code
(github.com/OptimAI-Lab/Minimalist_LLM_Pretraining), to which the learning rates in it belong (1e-3, and 2e-4
for a billion parameters), has the root mean square: a step sqrt(I) times as large. Vectors (norm scales,
biases) follow Adam in that code, and here.

Deviation: the tied table. The authors' code would normalise it as an embedding, without momentum; here it is
the last layer, where the paper finds the gradient's variance largest.
"""

from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Float, Int

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.core.trees import tree_paths
from edgejax.optim.adamw import Mask, ScalarOrSchedule
from edgejax.optim.matrices import (
    Choice,
    adam_direction,
    check_number,
    chosen_leaves,
    masked_zeros,
    matrix_leaves,
    zip_leaves,
)

Norm = Literal["rms", "l2"]

NORMS = get_args(Norm)


class ScaleByColumnNormState(NamedTuple):
    """Attributes:
    count: int32, steps taken.
    mu: float32 momentum of the last layer, and first moment of vectors; no array for other leaves.
    nu: float32 second moment of vectors; no array for matrices.
    """

    count: Int[Array, ""]  # type: ignore[assignment]  # optax's name for it; tuple.count is never called
    mu: PyTree
    nu: PyTree


class LeafKind(NamedTuple):
    """How a leaf is updated.

    Attributes:
      matrix: normalised by output; otherwise a vector, and Adam's.
      momentum: a matrix whose gradient is averaged first.
      inputs_first: a matrix stored ``[I, O]``, as an embedding table is.
    """

    matrix: bool
    momentum: bool
    inputs_first: bool


def leaf_kinds(
    tree: PyTree, momentum_mask: Choice = None, inputs_first_mask: Choice = None, matrix_mask: Choice = None
) -> list[LeafKind]:
    """The kind of each leaf, in the order of ``jax.tree.leaves``; arguments as in ``scale_by_column_norm``.

    >>> tied = {"blocks": {"q_proj": {"kernel": jnp.ones((3, 2, 2))}}, "embed": {"table": jnp.ones((5, 2))}}
    >>> [(kind.momentum, kind.inputs_first) for kind in leaf_kinds(tied)]
    [(False, False), (True, False)]
    >>> untied = tied | {"head": {"kernel": jnp.ones((5, 2))}}
    >>> [(kind.momentum, kind.inputs_first) for kind in leaf_kinds(untied)]
    [(False, False), (False, True), (True, False)]
    """
    # A head that another optimizer of optax.partition has is a masked node here, and a head all the same.
    names = tree_paths(tree, is_leaf=lambda node: isinstance(node, optax.MaskedNode))
    has_head = any(_is_in(name, "head") for name in names)
    last = "head" if has_head else "embed"
    matrices = matrix_leaves(tree, matrix_mask)
    momentum = chosen_leaves(
        tree, (lambda name: _is_in(name, last)) if momentum_mask is None else momentum_mask
    )
    inputs_first = chosen_leaves(
        tree,
        (lambda name: has_head and _is_in(name, "embed")) if inputs_first_mask is None else inputs_first_mask,
    )
    return [
        LeafKind(matrix, matrix and average, matrix and first)
        for matrix, average, first in zip(matrices, momentum, inputs_first, strict=True)
    ]


def scale_by_column_norm(
    momentum: float | Array = 0.9,
    eps: float | Array = 1e-8,
    *,
    norm: Norm = "rms",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    vector_scale: float | Array = 1.0,
    momentum_mask: Choice = None,
    inputs_first_mask: Choice = None,
    matrix_mask: Choice = None,
) -> optax.GradientTransformationExtraArgs:
    """The direction of the module's docstring, without rate and decay.

    A choice of leaves is a tree of bools or a function of the leaf's dotted name. The defaults look at the
    whole tree for a head; give all three where the transformation is shown one leaf at a time.

    Args:
      momentum: beta of the last layer.
      eps: least divisor of a column, and Adam's for vectors.
      norm: ``rms`` or ``l2``.
      b1: Adam's decay of the first moment of vectors.
      b2: Adam's decay of their second moment.
      vector_scale: factor of the direction of vectors; the authors give them a learning rate of their own, 5
        times the other for a billion parameters.
      momentum_mask: the last layer; vectors in it are Adam's. None: leaves under ``head``, or under ``embed``
        where there is no head (the table is tied); a tree with neither, as of LoRA factors, has no momentum.
      inputs_first_mask: matrices stored ``[I, O]``. None: leaves under ``embed`` where there is a head.
      matrix_mask: leaves that are treated as matrices. None: those with two axes or more that are not named
        ``scale`` or ``bias``; leading axes count separate matrices.

    Returns:
      A transformation; all arithmetic is float32, its updates have the gradient's dtype. ``update`` ignores
      extra arguments.

    Raises:
      ConfigError: an option out of range.
    """
    _check_options(momentum, eps, norm, b1, b2, vector_scale)

    def kinds_of(tree: PyTree) -> list[LeafKind]:
        return leaf_kinds(tree, momentum_mask, inputs_first_mask, matrix_mask)

    def init(params: PyTree) -> ScaleByColumnNormState:
        kinds = list(zip(jax.tree.leaves(params), kinds_of(params), strict=True))
        mu = [leaf.shape if kind.momentum or not kind.matrix else None for leaf, kind in kinds]
        nu = [None if kind.matrix else leaf.shape for leaf, kind in kinds]
        return ScaleByColumnNormState(
            jnp.zeros((), jnp.int32), masked_zeros(params, mu), masked_zeros(params, nu)
        )

    def update(gradients: PyTree, state: ScaleByColumnNormState, params: PyTree = None, **extra: Any):
        del params, extra
        count = optax.safe_increment(state.count)

        def one(kind, gradient, mu, nu):
            wide = gradient.astype(jnp.float32)
            if not kind.matrix:
                direction, mu, nu = adam_direction(wide, mu, nu, count, b1, b2, eps)
                direction = vector_scale * direction
            else:
                if kind.momentum:
                    wide = mu = momentum * mu + (1 - momentum) * wide
                direction = _normalised(wide, -2 if kind.inputs_first else -1, norm, eps)
            return direction.astype(gradient.dtype), mu, nu

        rows = zip_leaves(gradients, state.mu, state.nu)
        results = [one(kind, *row) for kind, row in zip(kinds_of(gradients), rows, strict=True)]
        treedef = jax.tree.structure(gradients)
        updates, *new = (jax.tree.unflatten(treedef, [row[i] for row in results]) for i in range(3))
        return updates, ScaleByColumnNormState(count, *new)

    return optax.GradientTransformationExtraArgs(init, update)


def scale_sgd(
    learning_rate: ScalarOrSchedule,
    momentum: float | Array = 0.9,
    eps: float | Array = 1e-8,
    weight_decay: float | Array = 0.0,
    mask: Mask = None,
    *,
    norm: Norm = "rms",
    b1: float | Array = 0.9,
    b2: float | Array = 0.999,
    vector_scale: float | Array = 1.0,
    momentum_mask: Choice = None,
    inputs_first_mask: Choice = None,
    matrix_mask: Choice = None,
) -> optax.GradientTransformationExtraArgs:
    """SCALE with decoupled weight decay: state for the head and the vectors only.

    Args:
      learning_rate: a number or an optax schedule; with ``norm="rms"`` about AdamW's.
      weight_decay: decoupled, multiplied with the learning rate.
      mask: leaves that are decayed: a tree of bools, or a function from the parameters to one; None: all.
      momentum, eps, norm, b1, b2, vector_scale, momentum_mask, inputs_first_mask, matrix_mask: see
        ``scale_by_column_norm``.

    Under ``optax.inject_hyperparams``, masks that are functions must be in its ``static_args``; with bfloat16
    parameters set its ``hyperparam_dtype`` to float32, as 0.999 in bfloat16 is 1.

    Example:
      >>> optimizer = scale_sgd(1e-3)
      >>> params = {"blocks": {"kernel": jnp.ones((3, 8, 16))}, "head": {"kernel": jnp.ones((32, 8))}}
      >>> state = optimizer.init(params)
      >>> updates, state = optimizer.update(params, state, params)
      >>> [leaf.shape for leaf in jax.tree.leaves(state[0].mu)]
      [(32, 8)]
    """
    return optax.chain(
        scale_by_column_norm(
            momentum,
            eps,
            norm=norm,
            b1=b1,
            b2=b2,
            vector_scale=vector_scale,
            momentum_mask=momentum_mask,
            inputs_first_mask=inputs_first_mask,
            matrix_mask=matrix_mask,
        ),
        optax.add_decayed_weights(weight_decay, mask),
        optax.scale_by_learning_rate(learning_rate),
    )


def _normalised(x: Float[Array, "... O I"], inputs: int, norm: Norm, eps) -> Float[Array, "... O I"]:
    reduce = jnp.mean if norm == "rms" else jnp.sum
    return x / jnp.maximum(jnp.sqrt(reduce(x**2, axis=inputs, keepdims=True)), eps)


def _is_in(name: str, part: str) -> bool:
    return part in name.split(".")


def _check_options(momentum, eps, norm, b1, b2, vector_scale) -> None:
    if norm not in NORMS:
        raise ConfigError(f"norm must be one of {', '.join(NORMS)}, not {norm!r}")
    check_number("momentum", momentum, 0, 1)
    check_number("b1", b1, 0, 1)
    check_number("b2", b2, 0, 1)
    check_number("eps", eps, 0, above=True)
    check_number("vector_scale", vector_scale, 0)
