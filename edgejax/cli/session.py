"""What commands do before their own work: open the model, its tokenizer and an adapter."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from edgejax.cli.options import adapter_folder
from edgejax.core.arrays import PyTree
from edgejax.core.errors import WeightsError

if TYPE_CHECKING:
    from edgejax.data import Tokenizer
    from edgejax.models import LoraConfig
    from edgejax.weights import LoadedModel, OpenedModel
    from edgejax.weights.leaves import Base


class Opened(NamedTuple):
    """A model and, where one was named, an adapter for it; ``adapters`` is ``{}`` and ``lora`` None without."""

    model: "LoadedModel"
    adapters: PyTree
    lora: "LoraConfig | None"


def open_model(name: str, base: "Base", adapter: Path | None = None, *, on_host: bool = False) -> Opened:
    """Loads what ``--model``, ``--base`` and ``--adapter`` name; ``on_host`` leaves numpy arrays.

    An adapter fits any model of the same shapes; that it was trained on other weights is said on standard error.

    Raises:
      WeightsError, ConfigError: as ``load_model`` and ``load_peft`` do.
    """
    from edgejax.weights.export_peft import load_peft
    from edgejax.weights.load import load_model

    model = load_model(name, base=base, on_host=on_host)
    for note in model.notes:
        print(f"note: {note}", file=sys.stderr)
    if adapter is None:
        return Opened(model, {}, None)
    folder = adapter_folder(adapter)
    adapters, lora = load_peft(folder, model.config)
    _tell_of_another_base(folder.parent, model)
    return Opened(model, adapters, lora)


def _tell_of_another_base(run: Path, model: "LoadedModel") -> None:
    try:
        base = json.loads((run / "config.json").read_text(encoding="utf-8"))["model"]
        name, sha256 = base["name"], base["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # no run's folder: what the adapter was trained on is not known
    if sha256 != model.source.sha256:
        print(
            f"note: the adapter in {run} was trained on {name} (SHA-256 {sha256[:12]}), this is {model.source.name} "
            f"({model.source.sha256[:12]}); with other weights it does something else",
            file=sys.stderr,
        )


def need_tokenizer(model: "LoadedModel | OpenedModel") -> "Tokenizer":
    """The model's tokenizer.

    Raises:
      WeightsError: the model came without one.
    """
    if model.tokenizer is None:
        raise WeightsError(
            f"{model.source.path} holds no tokenizer, and text cannot be read or written without one; put the model's "
            "tokenizer.json beside it, or name a file that has it"
        )
    return model.tokenizer


def source_of(paths: list[str]) -> str | list[str]:
    """What ``--data`` was given, as ``load_text`` takes it: the name of a corpus, or paths."""
    return paths[0] if len(paths) == 1 else paths
