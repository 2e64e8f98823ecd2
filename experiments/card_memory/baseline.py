"""The step that memory is compared with, and its bytes on a card: ``python baseline.py`` reads requests as a list of JSON.

A decoder as it is usually written: attention's scores and probabilities of all pairs of positions, all logits at once, what the
backward pass needs kept from the forward one, AdamW with float32 moments. Nothing is recomputed, nothing is quantised.
Weights, and all that is computed with them, are float32 or bfloat16; adapters and moments are float32, and with
``full`` the trained weights too.
"""

import json
import sys
from typing import Any

import jax
import jax.numpy as jnp
import optax

from edgejax.core.cache import forget_traces
from edgejax.measure.memory import xla_memory
from edgejax.models import LoraConfig, ModelConfig, init_lora
from edgejax.models.rope import rope_tables, rotate
from edgejax.models.shapes import find_shape
from edgejax.plan.candidate import abstract_model
from edgejax.plan.card_process import card_device
from edgejax.train.programs import abstract


def mean_loss(config: ModelConfig, lora: LoraConfig | None, params, adapters, tokens, targets, dtype):
    """Mean next-token loss of rows ``[B, T]``, each one document."""
    batch, length = tokens.shape
    cast = lambda weight: weight.astype(dtype)  # noqa: E731
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    rope = rope_tables(config, positions)
    behind = jnp.arange(length)[:, None] - jnp.arange(length)
    repeats = config.n_heads // config.n_kv_heads

    def product(
        x, weight
    ):  # not x @ weight.T: the scan would keep all transposed weights for the backward pass
        return jnp.einsum("bti,oi->bto", x, weight)

    def norm(x, scale):
        wide = x.astype(jnp.float32)
        mean_square = jnp.mean(wide * wide, axis=-1, keepdims=True)
        return cast(wide * jax.lax.rsqrt(mean_square + config.norm_eps) * scale)

    def layer(h, leaves):
        weights, adapter, sliding = leaves

        def linear(x, name):
            y = product(x, cast(weights[name]["kernel"]))
            if name in adapter:
                low = product(x, cast(adapter[name]["lora_a"]))
                y = y + lora.scaling * product(low, cast(adapter[name]["lora_b"]))
            return y + cast(weights[name]["bias"]) if "bias" in weights[name] else y

        x = norm(h, weights["attn_norm"]["scale"])
        q, k, v = (
            linear(x, name).reshape(batch, length, -1, config.head_dim)
            for name in ("q_proj", "k_proj", "v_proj")
        )
        if config.qk_norm:
            q, k = norm(q, weights["q_norm"]["scale"]), norm(k, weights["k_norm"]["scale"])
        cos, sin = rope.of_layer(sliding)
        q, k = cast(rotate(q, cos, sin)), cast(rotate(k, cos, sin))
        k, v = jnp.repeat(k, repeats, axis=2), jnp.repeat(v, repeats, axis=2)
        scores = jnp.einsum("bqhc,bkhc->bhqk", q, k) * config.query_scale
        window = jnp.where(sliding, config.sliding_window or length, length)
        seen = (behind >= 0) & (behind < window)
        scores = scores.astype(jnp.float32) + jnp.where(seen, 0.0, -jnp.inf)
        mixed = jnp.einsum("bhqk,bkhc->bqhc", cast(jax.nn.softmax(scores, axis=-1)), v)
        x = linear(mixed.reshape(batch, length, -1), "o_proj")
        h = h + (norm(x, weights["attn_post_norm"]["scale"]) if config.post_norms else x)
        x = norm(h, weights["mlp_norm"]["scale"])
        gate = linear(x, "gate_proj")
        act = jax.nn.silu(gate) if config.activation == "silu" else jax.nn.gelu(gate, approximate=True)
        x = linear(act * linear(x, "up_proj"), "down_proj")
        return h + (norm(x, weights["mlp_post_norm"]["scale"]) if config.post_norms else x), None

    flags = jnp.array(config.sliding_layers or (False,) * config.n_layers)
    h = cast(params["embed"]["table"])[tokens] * jnp.asarray(config.embed_scale, dtype)
    h, _ = jax.lax.scan(layer, h, (params["blocks"], adapters.get("blocks", {}), flags))
    head = params["embed"]["table"] if config.tie_embeddings else params["head"]["kernel"]
    logits = product(norm(h, params["final_norm"]["scale"]), cast(head)).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def make_step(config: ModelConfig, lora: LoraConfig | None, dtype) -> Any:
    """``(trainable, moments, frozen, tokens, targets) -> (trainable, moments, loss)``, the first two donated."""
    optimizer = optax.adamw(1e-4)

    def step(trainable, moments, frozen, tokens, targets):
        def loss(trainable):
            params, adapters = (trainable, {}) if lora is None else (frozen, trainable)
            return mean_loss(config, lora, params, adapters, tokens, targets, dtype)

        value, gradient = jax.value_and_grad(loss)(trainable)
        updates, moments = optimizer.update(gradient, moments, trainable)
        return optax.apply_updates(trainable, updates), moments, value

    return jax.jit(step, donate_argnums=(0, 1)), optimizer


def bytes_on_card(request: dict[str, Any]) -> int:
    """Arguments + outputs - alias + temp of the step, compiled for the request's card."""
    dtype = jnp.dtype(request["dtype"])
    is_full = request["mode"] == "full"
    config, params = abstract_model(request["model"], "f32" if is_full or dtype == jnp.float32 else "bf16")
    lora = None if is_full else LoraConfig(rank=request["rank"])
    step, optimizer = make_step(config, lora, dtype)
    trainable = params if lora is None else jax.eval_shape(lambda: init_lora(config, lora, jax.random.key(0)))
    rows = jax.ShapeDtypeStruct((request["batch"], request["seq"]), jnp.int32)
    arguments = (trainable, jax.eval_shape(optimizer.init, trainable), {} if is_full else params, rows, rows)
    place, device = card_device(request["card"])
    with jax.default_device(device):
        compiled = step.lower(*place(abstract(arguments))).compile()
    return xla_memory(compiled).peak_bytes


if __name__ == "__main__":
    for one in json.load(sys.stdin):
        find_shape(one["model"])
        print(json.dumps({"peak_bytes": bytes_on_card(one)}), flush=True)
        forget_traces()
