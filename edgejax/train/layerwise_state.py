"""The optimizer's state as the ``layerwise`` schedule keeps it: one state a layer, one a part of each table.

The optimizer sees one layer of the stack at a time, as a tree ``{"blocks": slice}``, and a table (the embedding, the
head) in parts of some thousand rows, ``{"embed": {"table": rows}}``. Parameters held as bit patterns of bfloat16 reach it
as bfloat16 arrays. So an optimizer can be used if what it does to a leaf depends on that leaf alone; one that looks at
a whole matrix (a norm, a projection) looks at a layer's matrix, and at a part of a table.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Float

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.train.held import wide

TABLE_ROWS = 4096  # of a part: logits [512, 4096] are 8 MiB, a float32 gradient [4096, 576] is 9 MiB
TABLES = (("embed", "table"), ("head", "kernel"))


class TableState(NamedTuple):
    """Attributes:
    parts: optimizer states of the equal parts of a table, stacked.
    rest: that of the rows left over, or None.
    """

    parts: PyTree
    rest: PyTree | None


class LayerwiseState(NamedTuple):
    """Attributes:
    blocks: optimizer states of the layers, stacked; leaves ``[L, ...]``.
    tables: by name, those of the trained tables.
    other: that of the remaining leaves (the final norm), or None.
    grad_norm: float32, the global norm of the step before; 0 before the first.
    """

    blocks: PyTree
    tables: dict[str, TableState]
    other: PyTree | None
    grad_norm: Float[Array, ""]


class TableParts(NamedTuple):
    """How a table of V rows is cut: ``n_parts`` parts of ``rows`` rows, and ``rest`` more.

    >>> table_parts(49152), table_parts(50257)
    (TableParts(n_parts=12, rows=4096, rest=0), TableParts(n_parts=13, rows=3865, rest=12))
    """

    n_parts: int
    rows: int
    rest: int


def table_parts(vocab_size: int) -> TableParts:
    """Parts of about ``TABLE_ROWS`` rows, as equal as can be."""
    count = -(-vocab_size // TABLE_ROWS)
    rows = vocab_size // count
    return TableParts(count, rows, vocab_size - count * rows)


def init_layerwise(trainable: PyTree, optimizer: optax.GradientTransformation) -> LayerwiseState:
    """The state before the first step, for adapters or all parameters."""

    def init_block(block: PyTree) -> PyTree:
        return optimizer.init(wide({"blocks": block}))

    tables = {}
    for name, leaf in TABLES:
        if name in trainable:
            tables[name] = _init_table(trainable[name][leaf], (name, leaf), optimizer)
    rest = other_leaves(trainable)
    return LayerwiseState(
        blocks=jax.vmap(init_block)(trainable["blocks"]),
        tables=tables,
        other=optimizer.init(rest) if rest else None,
        grad_norm=jnp.zeros((), jnp.float32),
    )


def _init_table(table, names: tuple[str, str], optimizer: optax.GradientTransformation) -> TableState:
    count, rows, rest = table_parts(table.shape[0])

    def init(part: PyTree) -> PyTree:
        return optimizer.init(wide({names[0]: {names[1]: part}}))

    stacked = jax.tree.map(lambda leaf: leaf[: count * rows].reshape(count, rows, *leaf.shape[1:]), table)
    return TableState(
        jax.vmap(init)(stacked),
        init(jax.tree.map(lambda leaf: leaf[count * rows :], table)) if rest else None,
    )


def other_leaves(trainable: PyTree) -> PyTree:
    """What is trained besides the layers and the tables."""
    tables = {name for name, _ in TABLES}
    return {name: leaf for name, leaf in trainable.items() if name != "blocks" and name not in tables}


def check_layerwise(optimizer: optax.GradientTransformation) -> None:
    """Raises ConfigError if what the optimizer does to one leaf depends on another leaf's gradient.

    Found out by trying: three steps on two small matrices together and on one of them alone must agree.

    Example:
      >>> check_layerwise(optax.adamw(1e-3))
      >>> check_layerwise(optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(1e-3)))
      Traceback (most recent call last):
      ...
      edgejax.core.errors.ConfigError: this optimizer needs the whole gradient at once ...
    """
    random = np.random.default_rng(0)
    draw = lambda: jnp.asarray(10 * random.standard_normal((8, 16)), jnp.float32)  # noqa: E731
    params = {"a": {"kernel": draw()}, "b": {"kernel": draw()}}
    gradients = [{"a": {"kernel": draw()}, "b": {"kernel": draw()}} for _ in range(3)]
    alone = _updates(optimizer, {"a": params["a"]}, [{"a": g["a"]} for g in gradients])
    together = _updates(optimizer, params, gradients)
    if not np.allclose(together["a"]["kernel"], alone["a"]["kernel"], rtol=1e-5, atol=1e-12):
        raise ConfigError(
            "this optimizer needs the whole gradient at once (what it does to one matrix depends on the gradients of "
            "others, as clipping by the global norm does), and the layerwise schedule never has it. Use the schedule "
            "whole; or clip by layer, or by the norm of the step before (clip_by='layer' or 'previous')."
        )


def _updates(optimizer: optax.GradientTransformation, params: PyTree, gradients: list[PyTree]) -> PyTree:
    @jax.jit
    def run(params, gradients):
        state = optimizer.init(params)
        for gradient in gradients:
            updates, state = optimizer.update(gradient, state, params)
        return updates

    return jax.device_get(run(params, gradients))
