"""The ``layerwise`` schedule: each layer is updated as soon as its gradient exists, in one compiled program.

    forward    h_0 = embed(tokens),  h_{l+1} = block(w_l, h_l),  keeping every h_l (``memory.residuals``)
    head       loss and dL/dh_L, without the head's gradient (``kernels.linear_ce.in_parts``)
    backward   for l = L-1 .. 0:  (dL/dw_l, dL/dh_l) by recomputing block(w_l, h_l);  w_l, s_l = update(...)
    tables     the embedding and the head, some thousand rows at a time: gradient, update

so that the gradient of one layer, or of one part of a table, is all that exists of the gradient tree (gradients
freed as they are used: LOMO, Lv et al. 2023, arXiv 2306.09782). The stacks of parameters and optimizer states are
carried by the backward loop and written in place.

With A micro-batches the boundaries of all of them wait, and each layer's gradient is summed over them in float32
before its update: A times the boundaries instead of a gradient tree. How gradients are clipped: ``updater``.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.core.in_place import replace_row
from edgejax.data.batch import Batch
from edgejax.memory.remat import check_kept
from edgejax.models import Decoder
from edgejax.train.layerwise_state import TABLES, LayerwiseState, TableState, other_leaves
from edgejax.train.passes import HeadResult, Passes, mean_factor, row_of
from edgejax.train.state import TrainState
from edgejax.train.updater import Updater
from edgejax.train.whole import Metrics, Mode, split_parameters

REMAT = ("full", "attention", "mlp")  # policies of one layer whose values a backward pass by hand takes back


def make_layerwise_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    mode: Mode,
    remat: str = "full",
    boundaries: str = "f32",
    clip_norm: float | None = None,
    clip_by: str = "previous",
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """Build the jitted step ``(state, frozen, batch) -> (state, metrics)``; the state is donated.

    It computes what ``make_train_step`` does, with an optimizer that treats each leaf by itself.

    Args:
      decoder: the model's functions.
      optimizer: an optax transformation without clipping by the global norm.
      mode: ``lora`` or ``full``, as in ``make_train_step``. Trained matrices may be ``quant.Bfloat16Array``.
      remat: what is kept beside the inputs of layers: ``full`` nothing, ``attention`` and ``mlp`` what ``memory.remat``
        says.
      boundaries: how both are kept: f32, bf16 or (inputs alone) int8.
      clip_norm: largest norm; None does not clip.
      clip_by: ``layer`` or ``previous`` (``updater``).

    Returns:
      The step. ``state.opt_state`` is what ``init_layerwise`` gives; metrics are those of ``make_train_step``, with
      ``grad_norm`` before clipping.

    Raises:
      ConfigError: an optimizer that needs the whole gradient, an unknown way to clip or to keep boundaries, another
        policy than those of ``REMAT``.
    """
    check_kept(remat, boundaries)
    if remat not in REMAT:
        raise ConfigError(
            f"the layerwise schedule recomputes each layer (remat {' or '.join(REMAT)}), not {remat!r}"
        )
    passes = Passes(decoder, mode, boundaries, remat=remat)
    updater = Updater(optimizer, clip_norm, clip_by)

    def step(state: TrainState, frozen: PyTree, batch: Batch):
        trainable, opt_state = state.trainable, state.opt_state
        params, adapters = split_parameters(mode, trainable, frozen)
        n_tokens, per_token = mean_factor(batch)
        (h, reference), boundaries = _forward(passes, params, adapters, batch)
        head = passes.head(params, h, batch, per_token)
        update = (updater, updater.factor_of_step(opt_state.grad_norm))
        stacks = (trainable["blocks"], opt_state.blocks)
        stacks, (dh, _, square) = _backward(
            passes, stacks, frozen, (head.dh, reference, jnp.float32(0)), boundaries, batch, update
        )
        new = {"blocks": stacks[0]}
        tables, others, part = _tables_and_norm(
            passes, trainable, opt_state, head, batch, dh, per_token, update
        )
        norm = jnp.sqrt(square + part)
        metrics = {"loss": head.loss_sum.sum() * per_token, "grad_norm": norm, "n_tokens": n_tokens}
        states = LayerwiseState(stacks[1], tables[1], others[1], norm)
        return TrainState(state.step + 1, new | tables[0] | others[0], states), metrics

    return jax.jit(step, donate_argnums=0)


def _forward(passes: Passes, params, adapters, batch: Batch):
    """``((h, reference), what is stored of layers [L, ...])``."""
    decoder = passes.decoder

    def one_layer(carry, layer):
        block, adapter, sliding, number = layer
        return passes.layer_forward(block, adapter, carry, batch, number, sliding)

    layers = (
        params["blocks"],
        adapters.get("blocks", {}),
        decoder.sliding_flags(),
        jnp.arange(decoder.config.n_layers),
    )
    return lax.scan(one_layer, passes.embed(params, batch), layers)


def _backward(passes: Passes, stacks, frozen, passed_on, boundaries, batch: Batch, update):
    """All layers from the last to the first: the two stacks updated, and what is passed on."""
    n_layers, flags = passes.decoder.config.n_layers, passes.decoder.sliding_flags()

    def one_layer(i, carry):
        stacks, passed_on = carry
        layer = n_layers - 1 - i
        block = row_of(frozen["blocks"], layer) if passes.mode == "lora" else None
        sliding = None if flags is None else jnp.asarray(flags)[layer]

        def on_row(row, passed_on):
            stored = row_of(boundaries, layer)
            return passes.layer_backward(*row, block, passed_on, stored, batch, layer, sliding, update)

        return replace_row(stacks, layer, on_row, passed_on)

    return lax.fori_loop(0, n_layers, one_layer, (stacks, passed_on))


def _tables_and_norm(
    passes: Passes,
    trainable,
    opt_state: LayerwiseState,
    head: HeadResult,
    batch: Batch,
    dh,
    per_token,
    update,
):
    """Updated tables and other leaves, each with their states, and the sum of squares of their gradients."""
    updater, factor = update
    new: PyTree = {}
    states: dict[str, TableState] = {}
    square = jnp.float32(0)
    for name, leaf in TABLES:
        if name in trainable:
            gradient = passes.table_gradient(name, head.passed, batch, dh, per_token)
            table, states[name], part = updater.table(
                trainable[name][leaf], opt_state.tables[name], (name, leaf), gradient, factor
            )
            new[name] = {leaf: table}
            square += part
    others, other_state = other_leaves(trainable), opt_state.other
    if other_state is not None:
        d_norm = jax.tree.map(lambda g: g.sum(axis=0), head.d_norm)
        others, other_state, part = updater.update(others, other_state, d_norm, 0, factor)
        square += part
    return (new, states), (others, other_state), square
