"""What a layer keeps beside its input for a backward pass that is written by hand."""

from typing import Any, NamedTuple

import numpy as np

from edgejax.core.arrays import Array, PyTree
from edgejax.kernels.attention.tiles import padded_length
from edgejax.memory.remat import KEPT_VALUES
from edgejax.memory.residuals import Boundary, boundary_named
from edgejax.models.config import ModelConfig
from edgejax.models.decoder import Decoder

NO_KEY = np.zeros((), np.uint32)  # they are rounded to the nearest
EXACT = ("attention_lse",)  # an error in it is a factor of all probabilities of its row


class KeptValues(NamedTuple):
    """The values that a remat policy names, as wide as the inputs of layers are stored.

    Attributes:
      names: as in ``memory.remat``; without any, a layer is made again from its input alone.
      storage: how they wait, but for those that stay exact.
    """

    names: tuple[str, ...]
    storage: Boundary

    @classmethod
    def of(cls, remat: str, boundaries: str | Boundary) -> "KeptValues":
        """Of a policy that goes with these boundaries (``memory.check_kept``)."""
        names = (
            () if remat == "sqrt" else KEPT_VALUES[remat]
        )  # sqrt: inputs of layers alone, and fewer of them
        return cls(names, boundary_named("bf16" if boundaries == "bf16" else "f32"))

    def run(
        self, decoder: Decoder, block: PyTree, adapter: PyTree, h: Array, *how: Any
    ) -> tuple[Array, PyTree]:
        """A layer's output and its stored values; arguments as ``Decoder.block`` takes them, not differentiated."""
        if not self.names:
            return decoder.block(block, adapter, h, *how), {}
        h, made = decoder.block_keeping(block, adapter, h, *how)
        return h, {name: self._storage(name).store(made[name], (), NO_KEY)[0] for name in self.names}

    def restore(self, stored: PyTree) -> dict[str, Array]:
        """What ``Decoder.block`` takes as ``kept``."""
        return {name: self._storage(name).restore(value, (), NO_KEY)[0] for name, value in stored.items()}

    def _storage(self, name: str) -> Boundary:
        return boundary_named("f32") if name in EXACT else self.storage

    def stored_bytes(self, config: ModelConfig, rows: int, length: int) -> int:
        """Bytes of what one layer stores for ``[rows, length]`` tokens.

        >>> config = ModelConfig(family="llama", vocab_size=8, d_model=4, n_layers=3, n_heads=2, n_kv_heads=1,
        ...                      head_dim=2, d_ff=4, max_position=16)
        >>> KeptValues.of("mlp", "bf16").stored_bytes(config, 1, 16), KeptValues.of("full", "f32").stored_bytes(config, 1, 16)
        (384, 0)
        """
        queries, keys = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
        widths = {
            "query": queries, "key": keys, "value": keys, "attention_out": queries, "attention_lse": config.n_heads,
            "mlp_input": config.d_model, "gate": config.d_ff, "up": config.d_ff,
        }  # fmt: skip
        return sum(
            self._storage(name).stored_bytes(
                (rows, padded_length(length)[1] if name in EXACT else length, widths[name])
            )
            for name in self.names
        )
