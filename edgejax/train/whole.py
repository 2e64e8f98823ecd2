"""The ``whole`` schedule: one compiled program from a step's micro-batches to the updated state."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import optax

from edgejax.core.arrays import PyTree
from edgejax.data.batch import Batch
from edgejax.models import Decoder, loss
from edgejax.train.held import held_like, plain, wide
from edgejax.train.state import TrainState

Mode = Literal["lora", "full"]
Metrics = dict[str, jax.Array]


def make_train_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    mode: Mode,
    remat: str = "full",
    boundaries: str = "f32",
) -> Callable[[TrainState, PyTree, Batch], tuple[TrainState, Metrics]]:
    """Build the jitted step ``(state, frozen, batch) -> (state, metrics)``; the state is donated.

    The loss is the mean over all counted tokens of the step, so a step of A micro-batches equals one of A times
    the rows. Gradients exist for ``state.trainable`` only and are summed over micro-batches in float32.

    Args:
      decoder: the model's functions.
      optimizer: any optax transformation over the trainable tree.
      mode: ``lora``: ``trainable`` are the adapters and ``frozen`` the base parameters; ``full``: ``trainable``
        are all parameters (as ``held`` gives them; they are differentiated as one float32 tree) and ``frozen`` is
        ``{}``.
      remat: what a layer keeps for its backward pass (``memory.remat``).
      boundaries: how the inputs of layers wait for it (``memory.residuals``).

    Returns:
      The step. Its ``batch`` has leaves ``[A, B, T]``; its metrics are ``loss`` (float32, mean over counted
      tokens), ``grad_norm`` (float32, global, before clipping) and ``n_tokens`` (int32, counted tokens).
    """

    def micro_loss(trainable, frozen, micro: Batch):
        params, adapters = split_parameters(mode, trainable, frozen)
        return loss(
            decoder, params, adapters, micro, frozen_head=mode == "lora", remat=remat, boundaries=boundaries
        )

    def step(state: TrainState, frozen: PyTree, batch: Batch):
        sums = sum_gradients(micro_loss, wide(state.trainable), frozen, batch)
        return apply_gradients(optimizer, state, *sums)

    return jax.jit(step, donate_argnums=0)


def sum_gradients(
    micro_loss: Callable, weights: PyTree, frozen: PyTree, batch: Batch
) -> tuple[PyTree, jax.Array, jax.Array]:
    """Gradients in ``weights`` (float32), loss and counted tokens, each summed over the micro-batches of ``batch``.

    Args:
      micro_loss: ``(weights, frozen, batch [B, T]) -> (loss sum, counted tokens)``.
      weights: what is differentiated, float32.
      frozen: what is not.
      batch: leaves ``[A, B, T]``.
    """
    gradient_of = jax.value_and_grad(micro_loss, has_aux=True)

    def add_micro(carry, micro: Batch):
        gradients, loss_sum, n_tokens = carry
        (micro_sum, micro_tokens), micro_gradients = gradient_of(weights, frozen, micro)
        gradients = jax.tree.map(jnp.add, gradients, micro_gradients)
        return (gradients, loss_sum + micro_sum, n_tokens + micro_tokens), None

    if batch.tokens.shape[0] == 1:
        only = jax.tree.map(lambda leaf: leaf[0], batch)
        (loss_sum, n_tokens), gradients = gradient_of(weights, frozen, only)
        return gradients, loss_sum, n_tokens
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), weights)
    return jax.lax.scan(add_micro, (zeros, jnp.float32(0), jnp.int32(0)), batch)[0]


def apply_gradients(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    gradients: PyTree,
    loss_sum: jax.Array,
    n_tokens: jax.Array,
) -> tuple[TrainState, Metrics]:
    """The state after an update by the mean gradient, and the step's figures, from ``sum_gradients``' sums."""
    per_token = 1.0 / jnp.maximum(n_tokens, 1).astype(jnp.float32)
    gradients = jax.tree.map(lambda g: g * per_token, gradients)
    params = plain(state.trainable)
    updates, opt_state = optimizer.update(gradients, state.opt_state, params)
    trainable = held_like(optax.apply_updates(params, updates), state.trainable)
    metrics = {
        "loss": loss_sum * per_token,
        "grad_norm": optax.tree.norm(gradients),
        "n_tokens": n_tokens,
    }
    return TrainState(state.step + 1, trainable, opt_state), metrics


def make_eval_step(decoder: Decoder, *, mode: Mode) -> Callable:
    """Build the jitted ``(trainable, frozen, batch [B, T]) -> (loss sum, counted tokens)``."""

    @jax.jit
    def evaluate(trainable: PyTree, frozen: PyTree, batch: Batch):
        params, adapters = split_parameters(mode, trainable, frozen)
        return loss(decoder, params, adapters, batch)

    return evaluate


def split_parameters(mode: Mode, trainable: PyTree, frozen: PyTree) -> tuple[PyTree, PyTree]:
    """(base parameters, adapters) from what is trained and what is not."""
    return (frozen, trainable) if mode == "lora" else (trainable, {})
