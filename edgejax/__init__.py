"""edgejax: train and fine-tune language models inside the memory and time of a phone or a consumer GPU.

The names below are what most programs need; each is imported from its room when it is first used.
"""

from typing import TYPE_CHECKING, Any

from edgejax.core.guard import install_guard

__version__ = "0.1.0"

install_guard()  # sets an XLA flag before JAX starts; see edgejax/core/guard.py

if TYPE_CHECKING:
    from edgejax.core.errors import EdgejaxError as EdgejaxError
    from edgejax.data import load_text as load_text
    from edgejax.models import Decoder as Decoder
    from edgejax.models import LoraConfig as LoraConfig
    from edgejax.models import ModelConfig as ModelConfig
    from edgejax.models import generate as generate
    from edgejax.train import TrainSettings as TrainSettings
    from edgejax.train import evaluate as evaluate
    from edgejax.train import finetune as finetune
    from edgejax.weights.export import export as export
    from edgejax.weights.export_peft import load_peft as load_peft
    from edgejax.weights.load import load_model as load_model
    from edgejax.weights.load import open_model as open_model

_HOMES = {
    "Decoder": "edgejax.models",
    "EdgejaxError": "edgejax.core.errors",
    "LoraConfig": "edgejax.models",
    "ModelConfig": "edgejax.models",
    "TrainSettings": "edgejax.train",
    "evaluate": "edgejax.train",
    "export": "edgejax.weights.export",
    "finetune": "edgejax.train",
    "generate": "edgejax.models",
    "load_model": "edgejax.weights.load",
    "load_peft": "edgejax.weights.export_peft",
    "load_text": "edgejax.data",
    "open_model": "edgejax.weights.load",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'edgejax' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value  # next time without this function
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
