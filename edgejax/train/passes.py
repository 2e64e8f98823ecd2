"""One layer forward, one layer backward, the head between them: what the layerwise and the streamed schedule share.

Arrays lead with the A micro-batches of a step. Going forward, each layer's input is stored (``memory.residuals``); going
backward, it is restored, the layer is computed again and differentiated, and the gradient, summed over the
micro-batches in float32, is used for the update at once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from edgejax.core.arrays import Array, PyTree
from edgejax.data.batch import Batch
from edgejax.kernels.linear_ce.in_parts import HeadPass, first_pass, weight_gradient
from edgejax.memory.residuals import batch_key, boundary_named, layer_key
from edgejax.models import Decoder
from edgejax.models.kept import KeptValues
from edgejax.train.flat_adapters import FlatAdapters
from edgejax.train.held import wide
from edgejax.train.whole import Mode


class HeadResult(NamedTuple):
    """What the head gives the backward pass; all leaves lead with A.

    Attributes:
      loss_sum: float32 ``[A]``.
      dh: float32 ``[A, B, T, D]``, gradient of the mean loss in the last layer's output.
      d_norm: its gradient in the final norm's leaves; an empty dict where that is frozen.
      passed: for the gradient of the head; None where that is frozen.
    """

    loss_sum: Float[Array, " A"]
    dh: Float[Array, "A B T D"]
    d_norm: PyTree
    passed: HeadPass | None


class Passes:
    """Pure functions of one decoder; the object holds static settings.

    Args:
      decoder: the model's functions.
      mode: ``full``: blocks, tables and norm are trained; ``lora``: adapters are, and blocks stay packed.
      boundaries: how inputs of layers are stored: f32, bf16 or int8.
      remat: what is stored with them: ``full`` nothing, ``attention`` and ``mlp`` what ``memory.remat`` says.
      flat: how a layer's adapters lie in one vector, if they are held so.
    """

    def __init__(
        self,
        decoder: Decoder,
        mode: Mode,
        boundaries: str,
        flat: FlatAdapters | None = None,
        *,
        remat: str = "full",
    ):
        self.decoder, self.mode, self.flat = decoder, mode, flat
        self.boundary, self.kept = boundary_named(boundaries), KeptValues.of(remat, boundaries)

    def embed(self, params: PyTree, batch: Batch) -> tuple[Float[Array, "A B T D"], PyTree]:
        """The first layer's input, and the reference before the first boundary."""
        h = jax.vmap(lambda tokens: self.decoder.embed(params, tokens))(jnp.asarray(batch.tokens))
        return h, jax.vmap(lambda one: _arrays(self.boundary.start(one.shape)))(h)

    def layer_forward(self, block, adapter, carry, batch: Batch, layer, sliding):
        """``(h, reference)`` after a layer, and what is stored of it; ``block`` and ``adapter`` are that layer's leaves."""
        adapter = adapter if self.flat is None else self.flat.layer(adapter)
        block = wide(block) if self.mode == "full" else block

        def one_micro(operands):
            (h, reference), micro = operands
            key = layer_key(batch_key(micro.tokens), layer)
            stored, reference = self.boundary.store(h, reference, key)
            how = (self.decoder.rope(micro.positions), micro.segment_ids, sliding)
            h, values = self.kept.run(self.decoder, block, adapter, h, *how)
            return (h, reference), (stored, values)

        return over_micro_batches(one_micro, (carry, batch))

    def head(self, params: PyTree, h: Float[Array, "A B T D"], batch: Batch, per_token) -> HeadResult:
        """The loss, and its gradient down to the last layer's output."""
        decoder, trains = self.decoder, self.mode == "full"

        def one_micro(operands):
            h, micro = operands
            norm = params["final_norm"]
            if trains:
                normed, pull = jax.vjp(lambda norm, h: decoder.final_norm({"final_norm": norm}, h), norm, h)
            else:
                normed, pull = jax.vjp(lambda h: decoder.final_norm(params, h), h)
            loss_sum, d_normed, passed = first_pass(
                normed.reshape(-1, normed.shape[-1]),
                decoder.head_weight(params),
                micro.targets.reshape(-1),
                micro.loss_mask.reshape(-1),
            )
            *d_norm, dh = pull((d_normed * per_token).reshape(normed.shape))
            return HeadResult(
                loss_sum, dh, {"final_norm": d_norm[0]} if trains else {}, passed if trains else None
            )

        return over_micro_batches(one_micro, (h, batch))

    def layer_backward(
        self, trained, opt_state, block, passed_on, stored, batch: Batch, layer, sliding, update
    ):
        """A layer's leaves updated.

        Args:
          trained: the layer's trained leaves, as they are held.
          opt_state: the optimizer's state of this layer.
          block: its frozen leaves (``lora``), or None.
          passed_on: ``(dh, reference, square)``: gradient in its output, reference of its boundary, sum of squares of
            the gradients so far.
          stored: what ``layer_forward`` stored of it.
          batch: the step's.
          layer: its number.
          sliding: its flag, or None.
          update: ``(updater, factor)``.

        Returns:
          ``((trained, opt_state), passed_on)`` for the layer before.
        """
        dh, reference, square = passed_on
        weights = wide(trained) if self.mode == "full" else trained
        weights = weights if self.flat is None else self.flat.layer(weights)

        def one_micro(operands):
            dh, reference, (stored, values), micro = operands
            h, reference = self.boundary.restore(stored, reference, layer_key(batch_key(micro.tokens), layer))
            how = (self.decoder.rope(micro.positions), micro.segment_ids, sliding, self.kept.restore(values))

            def run(weights, h):
                base, adapter = (weights, {}) if self.mode == "full" else (block, weights)
                return self.decoder.block(base, adapter, h, *how)

            gradient, dh = jax.vjp(run, weights, h)[1](dh)
            return gradient, (dh, reference)

        gradient, (dh, reference) = _summing_first(one_micro, (dh, reference, stored, batch))
        gradient = gradient if self.flat is None else self.flat.vector(gradient)
        updater, factor = update
        new, opt_state, part = updater.update(
            {"blocks": trained}, opt_state, {"blocks": gradient}, layer, factor
        )
        return (new["blocks"], opt_state), (dh, reference, square + part)

    def table_gradient(self, name: str, passed: HeadPass | None, batch: Batch, dh, per_token):
        """Function ``(float32 rows [c, D] of the table, first row) -> their gradient``."""
        is_head = name == "head" or self.decoder.config.tie_embeddings
        tokens = batch.tokens.reshape(-1)
        d_embedded = dh.reshape(-1, dh.shape[-1]) * jnp.float32(self.decoder.config.embed_scale)

        def gradient(rows, first):
            total = jnp.zeros(rows.shape, jnp.float32)
            if is_head:
                add = lambda total, one: (total + weight_gradient(one, rows, first), None)  # noqa: E731
                total = lax.scan(add, total, passed)[0] * per_token
            if name == "embed":
                at = tokens - first
                inside = (at >= 0) & (at < rows.shape[0])
                total = total.at[jnp.where(inside, at, rows.shape[0])].add(d_embedded, mode="drop")
            return total

        return gradient


def over_micro_batches(function, operands):
    """Results of every micro-batch, stacked; without a loop where there is one."""
    if _length(operands) == 1:
        return _stacked(function(_first(operands)))
    return lax.map(function, operands)


def _summing_first(function, operands):
    """As ``over_micro_batches`` for a function of two results, of which the first is summed instead."""
    if _length(operands) == 1:
        total, rest = function(_first(operands))
        return total, _stacked(rest)
    zeros = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(function, _first(operands))[0]
    )

    def add(total, operands):
        part, rest = function(operands)
        return jax.tree.map(jnp.add, total, part), rest

    return lax.scan(add, zeros, operands)


def mean_factor(batch: Batch):
    """(counted tokens of a step, one over them)."""
    n_tokens = jnp.sum(jnp.asarray(batch.loss_mask), dtype=jnp.int32)
    return n_tokens, 1.0 / jnp.maximum(n_tokens, 1).astype(jnp.float32)


def row_of(stack: PyTree, index) -> PyTree:
    """One layer's slice of a stack."""
    return jax.tree.map(lambda leaf: lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack)


def _length(tree) -> int:
    return jax.tree.leaves(tree)[0].shape[0]


def _first(tree):
    return jax.tree.map(lambda leaf: leaf[0], tree)


def _stacked(tree):
    return jax.tree.map(lambda leaf: leaf[None], tree)


def _arrays(tree):
    return jax.tree.map(jnp.asarray, tree)
