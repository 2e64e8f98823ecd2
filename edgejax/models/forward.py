"""The whole decoder as one function: layers under ``scan``, then loss or logits."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Float, Int

from edgejax.core.arrays import Array, ArrayLike, PyTree
from edgejax.data.batch import Batch
from edgejax.memory.layer_stack import Keeping, group_of, run_layers
from edgejax.memory.remat import check_kept, rematerialize
from edgejax.memory.residuals import Boundary, batch_key, boundary_named
from edgejax.models.decoder import Decoder
from edgejax.models.kept import KeptValues
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
    boundaries: str | Boundary = "f32",
) -> Float[Array, "B T D"]:
    """Output of the last layer, before the final norm; ``remat`` and ``boundaries`` as in ``loss``."""
    check_kept(remat, boundaries)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
    shared = (decoder.rope(positions), segment_ids)
    layers = (params["blocks"], (adapters or {}).get("blocks", {}), decoder.sliding_flags())
    h = decoder.embed(params, tokens)

    def one_layer(h, layer, shared, kept=None):
        block_params, block_adapters, sliding = layer
        return decoder.block(block_params, block_adapters, h, *shared, sliding, kept)

    if remat == "sqrt" or boundaries != "f32":
        values = KeptValues.of(remat, boundaries)
        keeping = Keeping(
            lambda h, layer, shared: values.run(decoder, *layer[:2], h, *shared, layer[2]),
            lambda h, layer, shared, stored: one_layer(h, layer, shared, values.restore(stored)),
        )
        how: Any = {
            "boundary": boundary_named(boundaries),
            "group": group_of(remat, decoder.config.n_layers),
            "keeping": keeping if values.names else None,
        }
        return run_layers(one_layer, h, layers, shared, key=batch_key(tokens), **how)
    kept = rematerialize(lambda h, layer: (one_layer(h, layer, shared), None), remat)
    return jax.lax.scan(kept, h, layers)[0]


def loss(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    batch: Batch,
    *,
    frozen_head: bool = True,
    remat: str = "none",
    boundaries: str | Boundary = "f32",
) -> tuple[Float[Array, ""], Int[Array, ""]]:
    """Sum of next-token losses of a batch and the number of counted tokens.

    Args:
      decoder: the model's functions.
      params: base parameters, plain or quantised.
      adapters: LoRA adapters or an empty dict.
      batch: packed rows.
      frozen_head: False where the head (or the tied embedding) is trained.
      remat: what a layer keeps for the backward pass: see ``memory.remat``.
      boundaries: how the inputs of layers wait for it: see ``memory.residuals``.

    Raises:
      ConfigError: an unknown policy or storage, or two that do not go together.
    """
    rows = (batch.tokens, batch.positions, batch.segment_ids)
    h = hidden_states(decoder, params, adapters, *rows, remat=remat, boundaries=boundaries)
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
