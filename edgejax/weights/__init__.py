"""Weights in and out: GGUF, safetensors, tokenizers, presets, adapters."""

from edgejax.weights.load import LoadedModel as LoadedModel
from edgejax.weights.load import ModelSource as ModelSource
from edgejax.weights.load import load_model as load_model
from edgejax.weights.presets import list_presets as list_presets
from edgejax.weights.presets import resolve as resolve
