"""Reading a prompt and going on from it, one position at a time, with cached keys and values.

Both are the decoder's own functions around another attention: ``prefill`` is the training forward pass that also
keeps keys and values, ``decode_step`` asks one position of them. The cache is in the carry of the scan over layers,
where XLA updates it in place; as scanned input and output it would be copied at every token.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array, PyTree
from edgejax.kernels.attention import attention, decode_attention
from edgejax.kernels.linear_ce.chunks import vocab_starts
from edgejax.kernels.quant_matmul import quant_matmul
from edgejax.models.cache import KVCache, empty_cache, write
from edgejax.models.decoder import Decoder
from edgejax.models.layers import Block


def prefill(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    tokens: Int[Array, "B T"],
    length: Int[Array, ""],
    capacity: int,
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Read a prompt.

    Args:
      decoder: the model's functions (static under ``jit``).
      params: base parameters, plain or quantised.
      adapters: LoRA adapters or an empty dict.
      tokens: int32; positions from ``length`` on are padding, which no later position sees.
      length: int32 scalar, tokens of the prompt, at least 1; the same for all rows.
      capacity: positions of the cache to make, at least T (static under ``jit``).

    Returns:
      The cache, and the float32 logits of the token that follows the prompt.
    """
    batch, padded = tokens.shape
    positions = jnp.broadcast_to(jnp.arange(padded, dtype=jnp.int32), tokens.shape)

    def attend(q, k, v, cache, layer, sliding):
        cache = write(cache, layer, 0, k, v)
        return attention(q, k, v, **_attention_settings(decoder, sliding)), cache

    cache = empty_cache(decoder.config, batch, capacity)
    h, cache = _through_layers(decoder, params, adapters, tokens, positions, cache, attend)
    last = lax.dynamic_index_in_dim(h, length - 1, axis=1, keepdims=False)
    return cache, head_logits(decoder, params, last)


def decode_step(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    cache: KVCache,
    tokens: Int[Array, " B"],
    position: Int[Array, ""],
) -> tuple[KVCache, Float[Array, "B V"]]:
    """Read one token a row, at ``position`` (int32 scalar, below the cache's capacity).

    Returns:
      The cache with that position filled, and the float32 logits of the next token.
    """

    def attend(q, k, v, cache, layer, sliding):
        cache = write(cache, layer, position, k, v)
        keys, values = (lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)
        settings = _attention_settings(decoder, sliding)
        return decode_attention(q[:, 0], keys, values, position, **settings)[:, None], cache

    positions = jnp.broadcast_to(position, (tokens.shape[0], 1))
    h, cache = _through_layers(decoder, params, adapters, tokens[:, None], positions, cache, attend)
    return cache, head_logits(decoder, params, h[:, 0])


def head_logits(decoder: Decoder, params: PyTree, h: Float[Array, "B D"]) -> Float[Array, "B V"]:
    """Logits of single positions, float32; the head is widened a chunk of the vocabulary at a time."""
    normed, weight = decoder.final_norm(params, h), decoder.head_weight(params)
    vocab_size = weight.shape[0]
    chunk, starts = vocab_starts(weight)

    def one_chunk(logits, start):
        first = jnp.minimum(start, vocab_size - chunk)  # the last chunk reaches back where the table ends
        rows = jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, first, chunk), weight)
        return lax.dynamic_update_slice_in_dim(logits, quant_matmul(normed, rows), first, axis=1), None

    empty = jnp.zeros((h.shape[0], vocab_size), jnp.float32)
    return lax.scan(one_chunk, empty, starts)[0]


def _through_layers(decoder, params, adapters, tokens, positions, cache, attend):
    """Output of the last layer ``[B, T, D]`` and the cache; ``attend`` is what a layer does between its halves."""
    module = Block(decoder.config, decoder.lora)
    rope = decoder.rope(positions)

    def one_layer(carry, layer):
        h, cache = carry
        index, block_params, block_adapters, sliding = layer
        variables = {"params": block_params, "lora": block_adapters}
        q, k, v = module.apply(variables, h, rope, sliding, method=Block.project)
        attended, cache = attend(q, k, v, cache, index, sliding)
        return (module.apply(variables, h, attended, method=Block.finish), cache), None

    layers = (
        jnp.arange(decoder.config.n_layers, dtype=jnp.int32),
        params["blocks"],
        (adapters or {}).get("blocks", {}),
        decoder.sliding_flags(),
    )
    (h, cache), _ = jax.lax.scan(one_layer, (decoder.embed(params, tokens), cache), layers)
    return h, cache


def _attention_settings(decoder: Decoder, sliding: Bool[Array, ""] | None) -> dict:
    config = decoder.config
    window = config.sliding_window if any(config.sliding_layers) else None
    return {"scale": config.query_scale, "window": window, "use_window": sliding}
