"""A Hugging Face folder (config.json and safetensors) as the source of parameter leaves."""

from pathlib import Path
from typing import Literal

import numpy as np

from edgejax.core.errors import WeightsError
from edgejax.weights.form import Form, float_form
from edgejax.weights.hf_config import hf_config
from edgejax.weights.names import LeafName, leaf_names
from edgejax.weights.safetensors_file import SafeTensor, open_folder

_TEXT_PREFIXES = ("", "language_model.", "model.language_model.")  # of gemma3 beside a vision tower
_NOT_TEXT = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")
_BUFFERS = ("rotary_emb.inv_freq", "masked_bias", "attn.bias")  # old files; computed, not learned


class HfSource:
    """Leaves of a Hugging Face folder; see ``leaves.LeafSource``.

    Raises:
      WeightsError: from the constructor, for a missing or damaged file, an unsupported architecture or setting, or
        tensors that the architecture has no place for.
    """

    format: Literal["gguf", "huggingface"] = "huggingface"

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self.notes: list[str] = []
        if not (self.path / "config.json").is_file():
            raise WeightsError(
                f"{self.path}: no config.json; give a Hugging Face model folder or a .gguf file"
            )
        self.config = hf_config(self.path, self.notes)
        self.leaves = leaf_names(self.config)
        self.tensors, self.weight_files = open_folder(self.path)
        self._names = self._find_names()

    def _find_names(self) -> dict[str, str]:
        """Canonical tensor name -> the file's, whose text part may lie under a prefix."""
        canonical = {}
        for name in self.tensors:
            for prefix in reversed(_TEXT_PREFIXES):
                if name.startswith(prefix):
                    rest = name[len(prefix) :]
                    head_or_model = rest.startswith(("model.", "lm_head."))
                    canonical[rest if head_or_model else f"model.{rest}"] = name
                    break
        layers = range(self.config.n_layers)
        known = {leaf.hf_name(i) for leaf in self.leaves for i in (layers if leaf.stacked else (0,))}
        if self.config.tie_embeddings:
            known.add("lm_head.weight")
        extra = sorted(
            name
            for short, name in canonical.items()
            if short not in known and not name.startswith(_NOT_TEXT) and not name.endswith(_BUFFERS)
        )
        if extra:
            raise WeightsError(
                f"{self.path}: {len(extra)} tensors that a {self.config.family} model of {self.config.n_layers} layers "
                f"has no place for: {', '.join(extra[:5])}; leaving them out would change the model"
            )
        return canonical

    def _tensor(self, leaf: LeafName, layer: int) -> SafeTensor:
        name = leaf.hf_name(layer)
        try:
            return self.tensors[self._names[name]]
        except KeyError:
            raise WeightsError(
                f"{self.path}: tensor {name!r} is missing ({len(self.tensors)} tensors in {len(self.weight_files)} "
                "files); the download is incomplete"
            ) from None

    def shape(self, leaf: LeafName, layer: int) -> tuple[int, ...]:
        return self._tensor(leaf, layer).shape

    def form(self, leaf: LeafName, layer: int) -> Form:
        return float_form(self._tensor(leaf, layer).dtype)

    def type_name(self, leaf: LeafName, layer: int) -> str:
        return self._tensor(leaf, layer).dtype_name

    def rows(self, leaf: LeafName, layer: int, start: int, stop: int) -> np.ndarray:
        return self._tensor(leaf, layer).rows(start, stop)

    def row_order(self, leaf: LeafName) -> None:
        return None

    def offset(self, leaf: LeafName) -> float:
        return leaf.hf_offset
