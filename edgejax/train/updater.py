"""Clipping and the optimizer for one layer, or one part of a table, at a time.

The norm that is clipped by has to be known before the first update. By ``layer``, each layer (and each part of a table) is
scaled by min(1, c / its own norm). By ``previous``, all are scaled by min(1, c / the global norm of the step before);
the first step is not clipped.
"""

import jax
import jax.numpy as jnp
import optax
from jax import lax

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.core.in_place import replace_rows, replace_rows_of_several
from edgejax.quant import dequantize
from edgejax.train.held import held_like, plain
from edgejax.train.layerwise_state import TableState, check_layerwise, table_parts

CLIP_KINDS = ("layer", "previous")


class Updater:
    """An optimizer that is given parts of the gradient as they appear; see the module's docstring.

    Args:
      optimizer: an optax transformation that treats each leaf by itself. Its ``update`` is given ``salt``, the number
        of the layer or of the table's first row, if it takes extra arguments.
      clip_norm: largest norm; None does not clip.
      clip_by: ``layer`` or ``previous``.

    Raises:
      ConfigError: an optimizer that needs the whole gradient, an unknown way to clip.
    """

    def __init__(self, optimizer: optax.GradientTransformation, clip_norm: float | None, clip_by: str):
        check_layerwise(optimizer)
        if clip_by not in CLIP_KINDS:
            raise ConfigError(
                f"parts of the gradient cannot be clipped by {clip_by!r}; they can by: {', '.join(CLIP_KINDS)}. "
                "Clipping by the global norm of the same step needs the schedule whole."
            )
        self.optimizer = optax.with_extra_args_support(optimizer)
        self.clip_norm, self.clip_by = clip_norm, clip_by

    def factor_of_step(self, previous_norm):
        """What all gradients of the step are scaled by."""
        if self.clip_norm is None or self.clip_by != "previous":
            return jnp.float32(1)
        return jnp.where(previous_norm > self.clip_norm, self.clip_norm / previous_norm, 1.0)

    def update(self, held: PyTree, opt_state: PyTree, gradient: PyTree, salt, factor):
        """(new parameters as they are held, new state, square of the gradient's norm)."""
        square = _square_of_norm(gradient)
        if self.clip_norm is not None and self.clip_by == "layer":
            norm = jnp.sqrt(square)
            factor = jnp.where(norm > self.clip_norm, self.clip_norm / norm, 1.0)
        if self.clip_norm is not None:
            gradient = jax.tree.map(lambda g: g * factor, gradient)
        params = plain(held)
        updates, opt_state = self.optimizer.update(gradient, opt_state, params, salt=salt)
        return held_like(optax.apply_updates(params, updates), held), opt_state, square

    def table(self, table, state: TableState, names: tuple[str, str], gradient_of, factor):
        """A table updated part by part: (new table, new state, square of the gradient's norm)."""
        count, rows, rest = table_parts(table.shape[0])
        outer, inner = names

        def one_part(part, first, opt_state, square):
            gradient = gradient_of(dequantize(part), first)
            new, opt_state, more = self.update(
                {outer: {inner: part}}, opt_state, {outer: {inner: gradient}}, first, factor
            )
            return new[outer][inner], opt_state, square + more

        def at(i, carry):
            table, parts, square = carry
            first = i * rows

            def on_part(groups, square):
                part, opt_state = groups[0], jax.tree.map(lambda leaf: leaf[0], groups[1])
                part, opt_state, square = one_part(part, first, opt_state, square)
                return (part, jax.tree.map(lambda leaf: leaf[None], opt_state)), square

            groups = ((table, first, rows), (parts, i, 1))
            (table, parts), square = replace_rows_of_several(groups, on_part, square)
            return table, parts, square

        table, parts, square = lax.fori_loop(0, count, at, (table, state.parts, jnp.float32(0)))
        if not rest:
            return table, TableState(parts, None), square
        first = jnp.int32(count * rows) + jnp.minimum(square, 0).astype(jnp.int32)  # known only to the run
        on_rest = lambda part, carry: (lambda p, s, q: (p, (s, q)))(*one_part(part, first, *carry))  # noqa: E731
        table, (last, square) = replace_rows(table, first, rest, on_rest, (state.rest, square))
        return table, TableState(parts, last), square


def _square_of_norm(gradient: PyTree):
    """As a dot product: XLA:CPU's reduction of a square to one number takes as long as half of Adam's update."""
    return sum(jnp.vdot(g, g) for g in jax.tree.leaves(gradient))
