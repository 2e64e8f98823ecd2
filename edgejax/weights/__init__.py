"""Weights in and out: GGUF, safetensors, tokenizers, presets, adapters."""

from edgejax.weights.export import EXPORT_FORMATS as EXPORT_FORMATS
from edgejax.weights.export_lora_gguf import load_lora_gguf as load_lora_gguf
from edgejax.weights.export_peft import load_peft as load_peft
from edgejax.weights.load import LoadedModel as LoadedModel
from edgejax.weights.load import ModelSource as ModelSource
from edgejax.weights.load import OpenedModel as OpenedModel
from edgejax.weights.load import load_model as load_model
from edgejax.weights.load import open_model as open_model
from edgejax.weights.packed_file import PackedFile as PackedFile
from edgejax.weights.packed_file import open_packed as open_packed
from edgejax.weights.packed_layout import Origin as Origin
from edgejax.weights.packed_write import write_packed as write_packed
from edgejax.weights.presets import list_presets as list_presets
from edgejax.weights.presets import resolve as resolve
