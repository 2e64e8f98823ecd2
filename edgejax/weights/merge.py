"""The tensors of a model as files hold them, one at a time: W, or W + scaling * B A where there is an adapter.

The wide copy of the model never exists: a leaf is widened to float32 a run of rows at a time, the adapter's part is
added in float32, and the rows are narrowed to the type of the file before the next run is read. The most that is
held beside the model is one tensor in the file's type and ``CHUNK_BYTES`` of float32.

This is the merge of Hu et al. 2021 (arXiv 2106.09685, section 4.1): no extra cost when the model runs.
"""

import dataclasses
from collections.abc import Callable, Iterator

import jax
import numpy as np
from jaxtyping import Float

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError, WeightsError
from edgejax.models.config import ModelConfig
from edgejax.models.lora import LoraConfig
from edgejax.quant import QuantizedArray
from edgejax.weights.form import wide
from edgejax.weights.names import LeafName, leaf_names

CHUNK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class MergedTensor:
    """One tensor of a model, of one layer where it is stacked.

    Attributes:
      leaf: its names, kind and shape.
      layer: which layer; 0 for leaves that are not stacked.
      base: numpy array or ``QuantizedArray`` of numpy arrays, ``leaf.shape``.
      lora_a, lora_b: f32 ``[R, I]`` and ``[O, R]``, or None where no adapter sits.
      scaling: what multiplies ``B A``.
    """

    leaf: LeafName
    layer: int
    base: np.ndarray | QuantizedArray
    lora_a: np.ndarray | None = None
    lora_b: np.ndarray | None = None
    scaling: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.leaf.shape

    def rows(self, order: np.ndarray | None = None) -> Iterator[Float[np.ndarray, "..."]]:
        """The values in float32, a run of rows at a time (a norm or bias: all at once).

        Args:
          order: rows to give, as ``values[order]``; None: all, as they are.
        """
        n_rows = self.shape[0]
        order = np.arange(n_rows) if order is None else order
        width = int(np.prod(self.shape[1:], dtype=np.int64))
        step = max(1, CHUNK_BYTES // (4 * width))
        for start in range(0, n_rows, step):
            yield self._some_rows(order[start : start + step])

    def _some_rows(self, index: np.ndarray) -> np.ndarray:
        values = _widen(self.base, index)
        if self.lora_a is not None and self.lora_b is not None:
            values = values + np.float32(self.scaling) * (self.lora_b[index] @ self.lora_a)
        return values

    def convert(
        self, narrow: Callable[[np.ndarray], np.ndarray], order: np.ndarray | None = None
    ) -> np.ndarray:
        """All rows through ``narrow`` (f32 ``[rows, ...]`` -> ``[rows, ...]`` of the file's type), joined.

        Raises:
          WeightsError: a value that is NaN or infinite, before or after narrowing.
        """
        out: np.ndarray | None = None
        start = 0
        for rows in self.rows(order):
            if not np.isfinite(rows).all():
                raise WeightsError(
                    f"{self.leaf.hf_name(self.layer)} holds NaN or infinity; nothing was written. Export a checkpoint "
                    "from before the loss went wrong"
                )
            with np.errstate(over="ignore"):  # checked below, with a message that helps
                piece = narrow(rows)
            if piece.dtype == np.float16 and not np.isfinite(piece).all():
                raise WeightsError(
                    f"{self.leaf.hf_name(self.layer)} reaches {np.abs(rows).max():.3g}, more than float16 can hold "
                    "(65504); nothing was written. Export it as bf16, f32 or Q8_0"
                )
            if out is None:
                out = np.empty((self.shape[0], *piece.shape[1:]), piece.dtype)
            out[start : start + len(piece)] = piece
            start += len(piece)
        assert out is not None  # a tensor has at least one row
        return out


def merged_tensors(
    config: ModelConfig, params: PyTree, adapters: PyTree | None = None, lora: LoraConfig | None = None
) -> Iterator[MergedTensor]:
    """Every tensor of a model, in the order of the name table, layers in turn.

    Args:
      config: what the model is.
      params: its parameter tree; leaves are arrays or ``QuantizedArray``.
      adapters: ``{"blocks": {name: {"lora_a": [L, R, I], "lora_b": [L, O, R]}}}``, or None.
      lora: goes with ``adapters``.

    Raises:
      ConfigError: adapters without ``lora`` or the other way round.
      WeightsError: a leaf that is missing or has another shape than ``config`` says.

    Example:
      >>> import numpy as np
      >>> config = ModelConfig(family="llama", vocab_size=8, d_model=4, n_layers=1, n_heads=2, n_kv_heads=2,
      ...                      head_dim=2, d_ff=4, max_position=16, tie_embeddings=True)
      >>> params = {}
      >>> for leaf in leaf_names(config):
      ...     node = params
      ...     for key in leaf.path[:-1]:
      ...         node = node.setdefault(key, {})
      ...     node[leaf.path[-1]] = np.ones(((1,) if leaf.stacked else ()) + leaf.shape, np.float32)
      >>> lora = LoraConfig(rank=1, alpha=2.0, targets=("q_proj",))
      >>> pair = {"lora_a": np.ones((1, 1, 4), np.float32), "lora_b": np.ones((1, 4, 1), np.float32)}
      >>> tensors = {t.leaf.hf_name(t.layer): t for t in merged_tensors(config, params, {"blocks": {"q_proj": pair}}, lora)}
      >>> float(next(tensors["model.layers.0.self_attn.q_proj.weight"].rows())[0, 0])  # 1 + 2 * 1 * 1
      3.0
    """
    check_adapters(config, adapters, lora)
    _check_params(config, params)
    top, blocks = _split(leaf_names(config))
    for leaf in top[:1]:
        yield MergedTensor(leaf, 0, _on_host(_at(params, leaf.path)))
    for layer in range(config.n_layers):
        for leaf in blocks:
            pair = None if adapters is None else adapters["blocks"].get(leaf.path[1])
            base = _layer(_at(params, leaf.path), layer)
            if pair is None or lora is None or leaf.kind != "linear":
                yield MergedTensor(leaf, layer, base)
            else:
                a, b = (np.asarray(_layer(pair[k], layer), np.float32) for k in ("lora_a", "lora_b"))
                yield MergedTensor(leaf, layer, base, a, b, lora.scaling)
    for leaf in top[1:]:
        yield MergedTensor(leaf, 0, _on_host(_at(params, leaf.path)))


def tensor_layout(config: ModelConfig) -> list[tuple[LeafName, int]]:
    """``(leaf, layer)`` of every tensor, in the order of ``merged_tensors``."""
    top, blocks = _split(leaf_names(config))
    stacked = [(leaf, layer) for layer in range(config.n_layers) for leaf in blocks]
    return [(top[0], 0), *stacked, *((leaf, 0) for leaf in top[1:])]


def check_adapters(config: ModelConfig, adapters: PyTree | None, lora: LoraConfig | None) -> None:
    """Raise unless the adapter tree is what ``lora`` describes on ``config``."""
    if (adapters is None) != (lora is None):
        raise ConfigError("adapters and lora go together: give both, or neither")
    if adapters is None or lora is None:
        return
    blocks = adapters.get("blocks", {})
    if set(blocks) != set(lora.targets):
        raise WeightsError(
            f"the adapters are for {sorted(blocks)}, the LoRA configuration says {sorted(lora.targets)}"
        )
    for name in lora.targets:
        n_out, n_in = config.linear_shapes()[name]
        wanted = {
            "lora_a": (config.n_layers, lora.rank, n_in),
            "lora_b": (config.n_layers, n_out, lora.rank),
        }
        for key, shape in wanted.items():
            found = tuple(np.shape(blocks[name][key])) if key in blocks[name] else None
            if found != shape:
                raise WeightsError(
                    f"adapter {name}.{key} has shape {found}, this model and rank need {shape}"
                )


def _check_params(config: ModelConfig, params: PyTree) -> None:
    for leaf in leaf_names(config):
        shape = (config.n_layers, *leaf.shape) if leaf.stacked else leaf.shape
        try:
            found = tuple(_at(params, leaf.path).shape)
        except KeyError:
            raise WeightsError(
                f"the parameters have no {'.'.join(leaf.path)}, which this model needs"
            ) from None
        if found != shape:
            raise WeightsError(f"{'.'.join(leaf.path)} has shape {found}, this model needs {shape}")


def _split(leaves: tuple[LeafName, ...]) -> tuple[list[LeafName], list[LeafName]]:
    return [leaf for leaf in leaves if not leaf.stacked], [leaf for leaf in leaves if leaf.stacked]


def _at(tree: PyTree, path: tuple[str, ...]):
    for key in path:
        tree = tree[key]
    return tree


def _on_host(leaf):
    return jax.tree.map(np.asarray, leaf)


def _layer(leaf, layer: int):
    """One layer of a stack, on the host; the layer is an operand, so a stack on a device compiles once."""

    def take(array):
        if isinstance(array, np.ndarray):
            return array[layer]
        return np.asarray(jax.lax.dynamic_index_in_dim(array, layer, 0, keepdims=False))

    return jax.tree.map(take, leaf)


def _widen(base: np.ndarray | QuantizedArray, index: np.ndarray) -> Float[np.ndarray, "..."]:
    """Rows ``index`` of a host array in float32."""
    return wide(jax.tree.map(lambda array: np.asarray(array)[index], base))
