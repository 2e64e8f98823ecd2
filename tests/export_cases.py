"""Tiny models of every family, their parameters and adapters, for the tests of what edgejax writes."""

import numpy as np

from edgejax.models.config import LINEAR_NAMES, ModelConfig, RopeScaling
from edgejax.models.lora import LoraConfig
from edgejax.weights.names import leaf_names

_COMMON = {
    "vocab_size": 96,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 64,
    "max_position": 128,
}

CONFIGS = {
    "llama": ModelConfig(family="llama", n_layers=2, tie_embeddings=True, rope_theta=100_000.0, **_COMMON),
    "llama3-biases": ModelConfig(
        family="llama",
        n_layers=2,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position=32),
        **_COMMON,
    ),
    "qwen2": ModelConfig(
        family="qwen2", n_layers=2, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6, **_COMMON
    ),
    "qwen3": ModelConfig(
        family="qwen3", n_layers=2, qk_norm=True, norm_eps=1e-6, **(_COMMON | {"head_dim": 16})
    ),
    "gemma3": ModelConfig(
        family="gemma3",
        n_layers=7,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        rope_theta_sliding=10_000.0,
        sliding_window=4,
        sliding_layers=tuple((i + 1) % 6 != 0 for i in range(7)),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embed_scale=32**0.5,
        tie_embeddings=True,
        **_COMMON,
    ),
}


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Float32 parameters, every leaf different from what an initialiser would leave (norms are not one)."""
    rng = np.random.default_rng(seed)
    params: dict = {}
    for leaf in leaf_names(config):
        shape = (config.n_layers, *leaf.shape) if leaf.stacked else leaf.shape
        values = 0.2 * rng.standard_normal(shape, np.float32) + (leaf.kind == "norm")
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = values.astype(np.float32)
    return params


def random_adapters(config: ModelConfig, lora: LoraConfig, seed: int = 1) -> dict:
    """Adapters as after training: neither side zero."""
    rng = np.random.default_rng(seed)
    shapes = config.linear_shapes()
    return {
        "blocks": {
            name: {
                "lora_a": 0.3
                * rng.standard_normal((config.n_layers, lora.rank, shapes[name][1]), np.float32),
                "lora_b": 0.3
                * rng.standard_normal((config.n_layers, shapes[name][0], lora.rank), np.float32),
            }
            for name in lora.targets
        }
    }


LORAS = {
    "all": LoraConfig(rank=4, alpha=6.0, targets=LINEAR_NAMES),
    "attention-rslora": LoraConfig(rank=4, alpha=3.0, rslora=True, targets=("q_proj", "k_proj", "v_proj")),
}
