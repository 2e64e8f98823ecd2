"""Steps of a schedule on random batches, and how near two of them came."""

import jax
import jax.numpy as jnp
import numpy as np

from edgejax.core.trees import tree_paths
from edgejax.data import Batch
from edgejax.models import ModelConfig
from edgejax.train import TrainState, init_layerwise, init_state

LENGTH = 24


def batch(config: ModelConfig, seed: int, shape=(1, 2, LENGTH)) -> Batch:
    """Random tokens, two documents a row, every fifth token without loss."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, config.vocab_size, (*shape[:-1], shape[-1] + 1), dtype=np.int32)
    half = shape[-1] // 2
    segments = np.broadcast_to(1 + (np.arange(shape[-1]) >= half), shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(shape[-1]) % half, shape).astype(np.int32)
    return Batch(tokens[..., :-1], tokens[..., 1:], random.random(shape) < 0.8, segments, positions)


def start(trainable, optimizer, init):
    trainable = jax.tree.map(jnp.array, trainable)
    if init is init_state:
        return init_state(trainable, optimizer)
    return TrainState(jnp.zeros((), jnp.int32), trainable, init_layerwise(trainable, optimizer))


def after(step, state, frozen, batches):
    figures = []
    for one in batches:
        state, metrics = step(state, frozen, one)
        figures.append({name: float(value) for name, value in metrics.items()})
    return state, figures


def assert_close(ours, theirs, bound=1e-5):
    for name, leaf in tree_paths(theirs).items():
        wide = np.asarray(leaf, np.float64)
        gap = np.abs(np.asarray(tree_paths(ours)[name], np.float64) - wide).max() / np.abs(wide).max()
        assert gap < bound, (name, gap)
