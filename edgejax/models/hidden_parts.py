"""A layer's MLP cut along its hidden units, ``y = sum_i W_down[:, i] (act(W_gate[i] x) * W_up[i] x)``."""

import jax

from edgejax.core.arrays import Array, PyTree
from edgejax.models.config import ModelConfig

PART_ELEMENTS = 2**20  # of a matrix in one part: 4 MiB when it is widened
BLOCK = 32  # hidden units that stay together: a block of quantised weights
ROWS, COLUMNS = ("gate_proj", "up_proj"), ("down_proj",)


def count_hidden_parts(config: ModelConfig) -> int:
    """The fewest equal parts of whole blocks in which a matrix has at most ``PART_ELEMENTS``; 1 if there are none.

    >>> config = ModelConfig(family="qwen2", vocab_size=32, d_model=896, n_layers=1, n_heads=14, n_kv_heads=2, head_dim=64,
    ...     d_ff=4864, max_position=16)
    >>> count_hidden_parts(config)
    8
    """
    if config.mlp_bias:  # it would be added once a part
        return 1
    wanted = -(-config.d_ff * config.d_model // PART_ELEMENTS)
    possible = (n for n in range(wanted, config.d_ff // BLOCK + 1) if config.d_ff % (n * BLOCK) == 0)
    return next(possible, 1)


def cut_hidden_units(block_params: PyTree, block_adapters: PyTree, n_parts: int) -> PyTree:
    """The variables of the three matrices ``{"params": ..., "lora": ...}``, each leaf with a leading axis of parts.

    Rows of gate and up, and of their B, are cut, columns of down, and of its A; the other halves of the adapters are
    repeated.
    """

    def rows(leaf: Array) -> Array:
        return leaf.reshape(n_parts, -1, *leaf.shape[1:])

    def columns(leaf: Array) -> Array:
        return leaf.reshape(leaf.shape[0], n_parts, -1).swapaxes(0, 1)

    def repeated(leaf: Array) -> Array:
        return jax.numpy.broadcast_to(leaf, (n_parts, *leaf.shape))

    params, lora = {}, {}
    for names, cut, cut_adapter in ((ROWS, rows, "lora_b"), (COLUMNS, columns, "lora_a")):
        for name in names:
            params[name] = jax.tree.map(cut, block_params[name])
            if name in block_adapters:
                lora[name] = {
                    half: cut(leaf) if half == cut_adapter else repeated(leaf)
                    for half, leaf in block_adapters[name].items()
                }
    return {"params": params, "lora": lora}
