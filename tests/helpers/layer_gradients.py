"""Gradients of whole models, compared layer by layer: for the tests of what a step keeps in memory."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from export_cases import CONFIGS, LORAS, random_adapters, random_params

from edgejax.data import Batch
from edgejax.measure.memory import xla_memory
from edgejax.models import Decoder, ModelConfig, loss

DEEP = ModelConfig(
    family="llama", vocab_size=256, d_model=64, n_layers=9, n_heads=4, n_kv_heads=2, head_dim=16, d_ff=160,
    max_position=512, tie_embeddings=True,
)  # fmt: skip
MODES = ("adapters", "all parameters")
# Every family, with at least five layers, so that groups of layers do not come out even.
FAMILIES = {name: dataclasses.replace(c, n_layers=max(c.n_layers, 5)) for name, c in CONFIGS.items()}


class Outcome(NamedTuple):
    """What a compiled step gave and what it takes."""

    loss: float
    gradients: Any
    temp_bytes: int


@functools.cache
def outcome(
    config: ModelConfig,
    length: int,
    rows: int,
    mode: str,
    mlp_tile: int | None = None,
    in_parts: bool = False,
    **kept,
) -> Outcome:
    """Loss and gradients of a calm model; computed once for all tests that compare with them."""
    compiled, arguments = value_and_gradient(
        config, batch_of(config, length, rows), mode, mlp_tile=mlp_tile, in_parts=in_parts, **kept
    )
    loss, gradients = jax.device_get(compiled(*arguments))
    return Outcome(float(loss), gradients, xla_memory(compiled).temp_bytes)


def batch_of(config: ModelConfig, length: int, rows: int = 1) -> Batch:
    """Rows of two documents and a little padding."""
    random = np.random.default_rng(0)
    first = length // 3
    segments = np.repeat([1, 2, 0], [first, length - first - 3, 3])[None].astype(np.int32)
    positions = np.concatenate([np.arange(first), np.arange(length - first)])[None].astype(np.int32)
    tokens, targets = random.integers(0, config.vocab_size, (2, rows, length)).astype(np.int32)
    counted = (segments > 0) & (random.random((rows, length)) < 0.8)
    repeated = (np.repeat(x, rows, axis=0) for x in (segments, positions))
    return jax.tree.map(jnp.asarray, Batch(tokens, targets, counted, *repeated))


def calm_params(config: ModelConfig) -> dict[str, Any]:
    """Parameters whose residual stream grows slowly, as in trained models: matrices small, embeddings not."""
    params = random_params(config)
    params["embed"]["table"] *= 5
    for name, leaves in params["blocks"].items():
        params["blocks"][name] = {k: 0.3 * v if name.endswith("proj") else v for k, v in leaves.items()}
    return params


def value_and_gradient(
    config: ModelConfig, batch: Batch, mode: str, *, params=None, mlp_tile=None, in_parts=False, **kept
):
    """The compiled ``(trained, frozen) -> (loss sum, gradients)`` and the trees to call it with."""
    params = jax.tree.map(jnp.asarray, calm_params(config) if params is None else params)
    lora = LORAS["all"] if mode == "adapters" else None
    adapters = jax.tree.map(lambda x: jnp.asarray(0.3 * x), random_adapters(config, LORAS["all"]))

    def loss_sum(trained, frozen):
        base, added = (frozen, trained) if lora else (trained, {})
        decoder = Decoder(config, lora, mlp_tile, in_parts)
        return loss(decoder, base, added, batch, frozen_head=lora is not None, **kept)[0]

    arguments = (adapters, params) if lora else (params, {})
    return jax.jit(jax.value_and_grad(loss_sum)).lower(*arguments).compile(), arguments


def by_layer(gradients) -> np.ndarray:
    """Everything a layer's parameters or adapters get, float64 ``[L, ...]``."""
    leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients["blocks"])]
    return np.concatenate([leaf.reshape(leaf.shape[0], -1) for leaf in leaves], axis=1)


def cosines(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Between rows."""
    norms = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    assert (norms > 0).all()
    return (ours * theirs).sum(axis=1) / norms


def assert_same(ours, theirs, tolerance: float) -> None:
    """Each leaf within ``tolerance`` of the other's norm."""
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(b) > 0, jax.tree_util.keystr(path)
        assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b), jax.tree_util.keystr(path)
