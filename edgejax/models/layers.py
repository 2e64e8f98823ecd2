"""The Flax modules of one decoder layer.

Variables live in two collections: ``params`` (the base, frozen or trained) and ``lora`` (adapters). A module
sees one layer; stacking, scanning and storing are the schedule's business.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Bool, Float

from edgejax.core.arrays import Array
from edgejax.kernels.quant_matmul import lora_matmul, quant_matmul
from edgejax.models.config import ModelConfig
from edgejax.models.lora import LoraConfig
from edgejax.models.rope import RopeTables, rotate
from edgejax.quant import is_quantized

INIT_STD = 0.02


class Linear(nn.Module):
    """``y = W x + b``, plus ``scaling * B (A x)`` where the ``lora`` collection holds this layer.

    Beside an adapter, and in any dtype but float32, the kernel is frozen: it stays as it is stored and has no
    gradient. A float32 kernel without an adapter is differentiated as usual (full-parameter training).
    """

    n_out: int
    use_bias: bool = False
    lora_scaling: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "... I"]) -> Float[Array, "... O"]:
        kernel = self.variable("params", "kernel", self._init_kernel, x.shape[-1]).value
        if self.has_variable("lora", "lora_a"):
            lora_a: Array = self.get_variable("lora", "lora_a")
            lora_b: Array = self.get_variable("lora", "lora_b")
            y = lora_matmul(x, kernel, lora_a, lora_b, self.lora_scaling)
        elif is_quantized(kernel) or kernel.dtype != jnp.float32:
            y = quant_matmul(x, kernel)
        else:
            y = x @ kernel.T
        if self.use_bias:
            y = y + self.variable("params", "bias", jnp.zeros, (self.n_out,)).value
        return y

    def _init_kernel(self, n_in: int):
        return INIT_STD * jax.random.normal(self.make_rng("params"), (self.n_out, n_in), jnp.float32)


class RMSNorm(nn.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        scale = self.variable("params", "scale", jnp.ones, (x.shape[-1],)).value
        return _normalize(x, scale, self.eps)


def _recomputed(function):
    """Elementwise work is always made again in the backward pass: keeping it costs more time than making it."""
    return jax.checkpoint(function, prevent_cse=False, static_argnums=(2,))


@_recomputed
def _normalize(x, scale, eps: float):
    mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
    return x * jax.lax.rsqrt(mean_square + eps) * scale


@_recomputed
def _gated(gate, up, activation: str):
    act = jax.nn.silu(gate) if activation == "silu" else jax.nn.gelu(gate, approximate=True)
    return act * up


@jax.custom_vjp
def recalled(value: Float[Array, "..."], kept: Float[Array, "..."]) -> Float[Array, "..."]:
    """``kept``, with a derivative in ``value``: what makes ``value`` is then needed by nothing else."""
    return kept


recalled.defvjp(lambda value, kept: (kept, None), lambda _, d: (d, None))


class Block(nn.Module):
    """One decoder layer, in two halves around attention so that training and cached decoding share it."""

    config: ModelConfig
    lora: LoraConfig | None = None

    def setup(self):
        config, biases = self.config, self.config.linear_biases()
        scaling = self.lora.scaling if self.lora else 1.0
        for name, (n_out, _) in config.linear_shapes().items():
            setattr(self, name, Linear(n_out, biases[name], scaling))
        for name in config.norm_widths():
            setattr(self, name, RMSNorm(config.norm_eps))

    def project(
        self, h: Float[Array, "B T D"], rope: RopeTables, sliding: Bool[Array, ""] | None
    ) -> tuple[Float[Array, "B T H C"], Float[Array, "B T K C"], Float[Array, "B T K C"]]:
        """Queries, keys and values, rotated to their positions."""
        config = self.config
        x = self.attn_norm(h)
        q, k, v = (
            layer(x).reshape(*x.shape[:-1], heads, config.head_dim)
            for layer, heads in (
                (self.q_proj, config.n_heads),
                (self.k_proj, config.n_kv_heads),
                (self.v_proj, config.n_kv_heads),
            )
        )
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        cos, sin = rope.of_layer(sliding)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        return checkpoint_name(q, "query"), checkpoint_name(k, "key"), checkpoint_name(v, "value")

    def finish(self, h: Float[Array, "B T D"], attended: Float[Array, "B T H C"]) -> Float[Array, "B T D"]:
        """The layer's output from its input and what attention gave."""
        return self.mlp(self.add_attended(h, attended))

    def add_attended(
        self, h: Float[Array, "B T D"], attended: Float[Array, "B T H C"]
    ) -> Float[Array, "B T D"]:
        """The layer's input plus what attention gave: the input of ``mlp``."""
        x = self.o_proj(attended.reshape(*h.shape[:-1], -1))
        h = h + (self.attn_post_norm(x) if self.config.post_norms else x)
        return self.keep("mlp_input", h)

    def keep(self, name: str, value: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """``value``, which a remat policy may keep by its name.

        A schedule with a backward pass of its own asks for it by making the collection ``kept`` mutable, and gives it
        back there in that collection; what made it has its derivative then, and runs again only where that needs it.
        """
        value = checkpoint_name(value, name)
        if self.is_mutable_collection("kept"):
            self.put_variable("kept", name, value)
        elif self.has_variable("kept", name):
            value = recalled(value, self.get_variable("kept", name))
        return value

    def mlp(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """``h`` plus the gated MLP of its norm; each position by itself."""
        return self.add_mlp(h, self.gated_mlp(self.mlp_norm(h)))

    def norm_of_mlp(self, h: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """What the gated MLP is given."""
        return self.mlp_norm(h)

    def gated_mlp(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """``W_down (act(W_gate x) * W_up x)``: a sum over hidden units."""
        gate = checkpoint_name(self.gate_proj(x), "gate")
        up = checkpoint_name(self.up_proj(x), "up")
        return self.down_proj(_gated(gate, up, self.config.activation))

    def add_mlp(self, h: Float[Array, "B T D"], x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The layer's output from the input and the output of its MLP."""
        return h + (self.mlp_post_norm(x) if self.config.post_norms else x)
