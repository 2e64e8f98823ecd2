"""A layer's MLP cut along its hidden units, ``y = sum_i W_down[:, i] (act(W_gate[i] x) * W_up[i] x)``."""

from collections.abc import Callable

import jax
from jax import lax

from edgejax.core.arrays import Array, PyTree
from edgejax.models.config import ModelConfig

PART_ELEMENTS = 2**19  # of a matrix in one part: 2 MiB when it is widened
BLOCK = 32  # hidden units that stay together: a block of quantised weights
ROWS, COLUMNS = ("gate_proj", "up_proj"), ("down_proj",)


def count_hidden_parts(config: ModelConfig) -> int:
    """The fewest equal parts of whole blocks in which a matrix has at most ``PART_ELEMENTS``; 1 if there are none.

    >>> config = ModelConfig(family="qwen2", vocab_size=32, d_model=896, n_layers=1, n_heads=14, n_kv_heads=2, head_dim=64,
    ...     d_ff=4864, max_position=16)
    >>> count_hidden_parts(config)
    19
    """
    if config.mlp_bias:  # it would be added once a part
        return 1
    wanted = -(-config.d_ff * config.d_model // PART_ELEMENTS)
    possible = (n for n in range(wanted, config.d_ff // BLOCK + 1) if config.d_ff % (n * BLOCK) == 0)
    return next(possible, 1)


def hidden_parts_of(
    block_params: PyTree, block_adapters: PyTree, n_parts: int
) -> Callable[[Array, PyTree], PyTree]:
    """Function ``(i, cut adapters of part i) -> variables {"params": ..., "lora": ...}`` of a part of the MLP.

    Rows of gate and up, and of their B, belong to a part, columns of down, and of its A. Weights are cut when they are
    asked for, so that no rearranged copy of packed ones exists.
    """

    def variables(i: Array, adapters: PyTree) -> PyTree:
        def cut(leaf: Array, axis: int) -> Array:
            size = leaf.shape[axis] // n_parts
            return lax.dynamic_slice_in_dim(leaf, i * size, size, axis)

        params = {name: jax.tree.map(lambda leaf: cut(leaf, 0), block_params[name]) for name in ROWS}
        params |= {name: jax.tree.map(lambda leaf: cut(leaf, 1), block_params[name]) for name in COLUMNS}
        whole = {name: block_adapters[name] for name in adapters}
        return {"params": params, "lora": {name: {**whole[name], **adapters[name]} for name in adapters}}

    return variables


def cut_adapters(block_adapters: PyTree, n_parts: int) -> PyTree:
    """The halves of the MLP's adapters that are cut, with a leading axis of parts."""
    cut: PyTree = {}
    for name in ROWS:
        if name in block_adapters:
            b = block_adapters[name]["lora_b"]
            cut[name] = {"lora_b": b.reshape(n_parts, -1, b.shape[1])}
    for name in COLUMNS:
        if name in block_adapters:
            a = block_adapters[name]["lora_a"]
            cut[name] = {"lora_a": a.reshape(a.shape[0], n_parts, -1).swapaxes(0, 1)}
    return cut
