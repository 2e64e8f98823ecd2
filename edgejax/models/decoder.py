"""A decoder as three pure functions: embed, block, head. Every schedule is made of these and nothing else."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array, ArrayLike, PyTree
from edgejax.data.batch import Batch
from edgejax.kernels.attention import attention, attention_keeping, attention_recalled
from edgejax.losses import next_token_loss
from edgejax.memory.remat import ATTENTION
from edgejax.memory.tiles import check_tile, over_positions, sum_over_parts
from edgejax.models.config import ModelConfig
from edgejax.models.hidden_parts import count_hidden_parts, cut_adapters, hidden_parts_of
from edgejax.models.layers import INIT_STD, Block, RMSNorm
from edgejax.models.lora import LoraConfig
from edgejax.models.rope import RopeTables, rope_tables
from edgejax.quant import Weight, take_rows


@dataclasses.dataclass(frozen=True)
class Decoder:
    """The functions of one model. Parameters are passed in; the object holds only static settings.

    Parameter tree (L = layers, first axis of every leaf below ``blocks``)::

        {"embed": {"table": [V, D]},
         "blocks": {"q_proj": {"kernel": [L, O, I]}, ..., "attn_norm": {"scale": [L, D]}, ...},
         "final_norm": {"scale": [D]},
         "head": {"kernel": [V, D]}}          # absent where the head is the embedding table

    Adapters: ``{"blocks": {"q_proj": {"lora_a": [L, R, I], "lora_b": [L, O, R]}, ...}}``.

    With ``mlp_tile`` the MLP's wide values ``[B, t, F]`` exist for that many positions of a row at once, forward and
    backward, and are made again for the backward pass; those that a remat policy names are kept as it says (``none``
    keeps two of all positions). With ``in_parts`` the MLP is summed over parts of its hidden units, of which one exists at
    a time.

    Raises:
      ConfigError: ``mlp_tile`` below 1.
    """

    config: ModelConfig
    lora: LoraConfig | None = None
    mlp_tile: int | None = None  # positions of a row; None: all at once
    in_parts: bool = False

    def __post_init__(self):
        check_tile(self.mlp_tile)

    def init(self, key: Array) -> PyTree:
        """Random float32 parameters (normal, std 0.02; norms one, biases zero)."""
        config = self.config
        k_embed, k_blocks, k_head = jax.random.split(key, 3)
        rope = rope_tables(config, jnp.zeros((1, 1), jnp.int32))
        h = jnp.zeros((1, 1, config.d_model))

        def init_block(block_key):
            return Block(config).init(block_key, h, rope, jnp.array(False), method=_one_block)["params"]

        table = (config.vocab_size, config.d_model)
        params = {
            "embed": {"table": INIT_STD * jax.random.normal(k_embed, table)},
            "blocks": jax.vmap(init_block)(jax.random.split(k_blocks, config.n_layers)),
            "final_norm": {"scale": jnp.ones(config.d_model)},
        }
        if not config.tie_embeddings:
            params["head"] = {"kernel": INIT_STD * jax.random.normal(k_head, table)}
        return params

    def embed(self, params: PyTree, tokens: Int[ArrayLike, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings, float32."""
        h = take_rows(params["embed"]["table"], tokens)
        return h if self.config.embed_scale == 1.0 else h * jnp.float32(self.config.embed_scale)

    def rope(self, positions: Int[ArrayLike, "B T"]) -> RopeTables:
        """Rotary tables of a batch, shared by all its layers."""
        return rope_tables(self.config, positions)

    def block(
        self,
        block_params: PyTree,
        block_adapters: PyTree,
        h: Float[Array, "B T D"],
        rope: RopeTables,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        sliding: Bool[Array, ""] | None = None,
        kept: dict[str, Array] | None = None,
    ) -> Float[Array, "B T D"]:
        """One layer: ``block_params`` and ``block_adapters`` are one slice of the stacks.

        With ``kept``, from ``block_keeping``, what is in there has its derivative but is not computed again.
        """
        variables = {"params": block_params, "lora": block_adapters}
        attend_variables = variables | {"kept": kept or {}}
        h = cast(
            Array,
            Block(self.config, self.lora).apply(
                attend_variables, h, rope, sliding, segment_ids, method=_attend
            ),
        )
        return self._mlp(variables, h)

    def block_keeping(
        self,
        block_params: PyTree,
        block_adapters: PyTree,
        h: Float[Array, "B T D"],
        rope: RopeTables,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        sliding: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        """``block``, and ``attention_out``, ``attention_lse`` and ``mlp_input`` as they were made; not differentiable."""
        variables = {"params": block_params, "lora": block_adapters}
        layer = Block(self.config, self.lora)
        h, made = layer.apply(variables, h, rope, sliding, segment_ids, method=_attend, mutable=["kept"])
        return self._mlp(variables, h), made["kept"]

    def _mlp(self, variables: dict[str, PyTree], h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        layer = Block(self.config, self.lora)
        block_params, block_adapters = variables["params"], variables["lora"]
        n_parts = count_hidden_parts(self.config) if self.in_parts else 1

        def mlp(h: Array) -> Array:
            if n_parts == 1:
                return cast(Array, layer.apply(variables, h, method=Block.mlp))
            x = cast(Array, layer.apply(variables, h, method=Block.norm_of_mlp))
            part_of = hidden_parts_of(block_params, block_adapters, n_parts)

            def gated_part(part: tuple[Array, PyTree], x: Array) -> Array:
                return cast(Array, layer.apply(part_of(*part), x, method=Block.gated_mlp))

            x = sum_over_parts(gated_part, (jnp.arange(n_parts), cut_adapters(block_adapters, n_parts)), x)
            return cast(Array, layer.apply(variables, h, x, method=Block.add_mlp))

        return over_positions(mlp, h, self.mlp_tile)

    def sliding_flags(self) -> Bool[np.ndarray, " L"] | None:
        """Per layer, whether it is a sliding one; None where the model has none."""
        return np.array(self.config.sliding_layers) if any(self.config.sliding_layers) else None

    def final_norm(self, params: PyTree, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The norm before the head."""
        return cast(Array, RMSNorm(self.config.norm_eps).apply({"params": params["final_norm"]}, h))

    def head_weight(self, params: PyTree) -> Weight:
        """``[V, D]``: the head, or the embedding table where they are tied."""
        return params["embed"]["table"] if self.config.tie_embeddings else params["head"]["kernel"]

    def head_loss(
        self, params: PyTree, h: Float[Array, "B T D"], batch: Batch, *, frozen: bool
    ) -> tuple[Float[Array, ""], Int[Array, ""]]:
        """Loss sum and number of counted tokens from the last layer's output."""
        return next_token_loss(
            self.final_norm(params, h), self.head_weight(params), batch, frozen_head=frozen
        )


def _one_block(module: Block, h, rope, sliding):
    return module.mlp(_attend(module, h, rope, sliding))


def _attend(module: Block, h, rope, sliding, segment_ids=None):
    q, k, v = module.project(h, rope, sliding)
    config = module.config
    how: Any = {
        "scale": config.query_scale,
        "window": config.sliding_window if any(config.sliding_layers) else None,
        "use_window": sliding,
    }
    if module.is_mutable_collection("kept"):
        attended, lse = attention_keeping(q, k, v, segment_ids, **how)
        module.put_variable("kept", "attention_out", attended)
        module.put_variable("kept", "attention_lse", lse)
    elif module.has_variable("kept", "attention_out"):
        kept: Any = [module.get_variable("kept", name) for name in ATTENTION]
        attended = attention_recalled(q, k, v, *kept, segment_ids, **how)
    else:
        attended = attention(q, k, v, segment_ids, **how)
    return module.add_attended(h, attended)
