"""Decoders of the llama, qwen2, qwen3 and gemma3 families, and their adapters."""

from edgejax.models.config import LINEAR_NAMES as LINEAR_NAMES
from edgejax.models.config import ModelConfig as ModelConfig
from edgejax.models.config import RopeScaling as RopeScaling
from edgejax.models.decoder import Decoder as Decoder
from edgejax.models.forward import hidden_states as hidden_states
from edgejax.models.forward import logits as logits
from edgejax.models.forward import loss as loss
from edgejax.models.generate import GenerationResult as GenerationResult
from edgejax.models.generate import generate as generate
from edgejax.models.lora import LoraConfig as LoraConfig
from edgejax.models.lora import init_lora as init_lora
