"""A GGUF file as the source of parameter leaves."""

from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Int

from edgejax.core.errors import WeightsError
from edgejax.models.config import ModelConfig
from edgejax.quant import QuantizedArray
from edgejax.weights.form import Form
from edgejax.weights.gguf_blocks import block_form, decode_rows
from edgejax.weights.gguf_config import ROPE_FREQS, gguf_config, unknown_keys
from edgejax.weights.gguf_file import GgufFile, GgufTensor, open_gguf
from edgejax.weights.names import LeafName, interleave_rows, leaf_names


class GgufSource:
    """Leaves of a GGUF file; see ``leaves.LeafSource``.

    Raises:
      WeightsError: from the constructor, for a damaged file, an unsupported architecture or setting, or tensors that
        the architecture has no place for.
    """

    format: Literal["gguf", "huggingface"] = "gguf"

    def __init__(self, path: str | Path):
        self.file: GgufFile = open_gguf(path)
        self.path = self.file.path
        self.config: ModelConfig = gguf_config(self.file)
        self.leaves = leaf_names(self.config)
        self._refuse_leftovers()
        unknown = unknown_keys(self.file)
        self.notes = [f"unknown settings were passed over: {', '.join(unknown)}"] if unknown else []

    def _tensor(self, leaf: LeafName, layer: int) -> GgufTensor:
        return self.file.tensor(leaf.gguf_name(layer))

    def shape(self, leaf: LeafName, layer: int) -> tuple[int, ...]:
        return self._tensor(leaf, layer).shape

    def form(self, leaf: LeafName, layer: int) -> Form:
        tensor = self._tensor(leaf, layer)
        return block_form(tensor.type, f"{self.path}: tensor {tensor.name!r}")

    def type_name(self, leaf: LeafName, layer: int) -> str:
        return self._tensor(leaf, layer).type.name

    def rows(self, leaf: LeafName, layer: int, start: int, stop: int) -> QuantizedArray | np.ndarray:
        self.form(leaf, layer)  # names the type where it is not supported
        tensor = self._tensor(leaf, layer)
        return decode_rows(tensor.type, self.file.read_rows(tensor, start, stop))

    def row_order(self, leaf: LeafName) -> Int[np.ndarray, "O"] | None:
        if not leaf.gguf_interleaved_heads:
            return None
        return interleave_rows(leaf.shape[0], leaf.gguf_interleaved_heads)

    def offset(self, leaf: LeafName) -> float:
        return 0.0  # GGUF norm scales are those that multiply

    def _refuse_leftovers(self) -> None:
        layers = range(self.config.n_layers)
        known = {
            leaf.gguf_name(layer) for leaf in self.leaves for layer in (layers if leaf.stacked else (0,))
        }
        extra = sorted(set(self.file.tensors) - known - {ROPE_FREQS})
        if extra:
            raise WeightsError(
                f"{self.path}: {len(extra)} tensors that a {self.config.family} model of {self.config.n_layers} layers "
                f"has no place for: {', '.join(extra[:5])}; leaving them out would change the model"
            )
