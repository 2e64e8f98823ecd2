"""The whole decoder as one function: layers under ``scan``, then loss or logits."""

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from edgejax.core.arrays import Array, ArrayLike, PyTree
from edgejax.data.batch import Batch
from edgejax.memory.remat import rematerialize
from edgejax.models.decoder import Decoder
from edgejax.quant import dequantize


def hidden_states(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    tokens: Int[ArrayLike, "B T"],
    positions: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
    *,
    remat: str = "none",
) -> Float[Array, "B T D"]:
    """Output of the last layer, before the final norm."""
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    rope = decoder.rope(positions)

    def one_layer(h, layer):
        block_params, block_adapters, sliding = layer
        return decoder.block(block_params, block_adapters, h, rope, segment_ids, sliding), None

    layers = (params["blocks"], (adapters or {}).get("blocks", {}), decoder.sliding_flags())
    h, _ = jax.lax.scan(rematerialize(one_layer, remat), decoder.embed(params, tokens), layers)
    return h


def loss(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    batch: Batch,
    *,
    frozen_head: bool = True,
    remat: str = "none",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of next-token losses of a batch and the number of counted tokens.

    Args:
      decoder: the model's functions.
      params: base parameters, plain or quantised.
      adapters: LoRA adapters or an empty dict.
      batch: packed rows.
      frozen_head: False where the head (or the tied embedding) is trained.
      remat: what a layer keeps for the backward pass: see ``memory.remat``.
    """
    h = hidden_states(
        decoder, params, adapters, batch.tokens, batch.positions, batch.segment_ids, remat=remat
    )
    return decoder.head_loss(params, h, batch, frozen=frozen_head)


def logits(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    tokens: Int[ArrayLike, "B T"],
    positions: Int[ArrayLike, "B T"] | None = None,
    segment_ids: Int[ArrayLike, "B T"] | None = None,
) -> Float[Array, "B T V"]:
    """All logits, float32: for checks and small inputs; training never makes them."""
    h = hidden_states(decoder, params, adapters, tokens, positions, segment_ids)
    return decoder.final_norm(params, h) @ dequantize(decoder.head_weight(params)).T
