"""The experiment's settings, from ``config.toml``."""

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

from edgejax.models import ModelConfig

CONFIG = Path(__file__).parent / "config.toml"
TABLES = ("question", "data", "model", "training", "grid")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimizer:
    """One row of the answer."""

    label: str
    name: str  # in edgejax.train.optimizers
    claim: bool = False  # judged by the rule; otherwise reported as it falls
    seeded: bool = False  # takes a `seed`
    bfloat16: bool = False  # weights in bfloat16 with stochastic rounding


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The tables of ``config.toml``."""

    quick: bool
    question: dict[str, Any]
    data: dict[str, Any]
    model: dict[str, Any]
    training: dict[str, Any]
    grid: dict[str, Any]
    optimizers: tuple[Optimizer, ...]

    def model_config(self) -> ModelConfig:
        """The decoder that is trained."""
        return ModelConfig(
            family="llama",
            vocab_size=self.data["vocab_size"],
            max_position=self.data["sequence_length"],
            **self.model,
        )

    def with_claim(self) -> list[Optimizer]:
        """The reference and those that are judged against it."""
        return [o for o in self.optimizers if o.claim or o.label == self.question["reference"]]

    def without_claim(self) -> list[Optimizer]:
        """Those that are reported as they fall."""
        judged = self.with_claim()
        return [o for o in self.optimizers if o not in judged]

    def final_seeds(self, optimizer: Optimizer) -> list[int]:
        """Seeds of an optimizer's final runs."""
        seeds = self.training["seeds"]
        return seeds if optimizer in self.with_claim() else seeds[: self.training["n_seeds_without_claim"]]

    def to_json(self) -> dict[str, Any]:
        """As JSON values, which ``from_json`` reads back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Settings":
        """What ``to_json`` gave."""
        return cls(**{**value, "optimizers": tuple(Optimizer(**o) for o in value["optimizers"])})


def load_settings(*, quick: bool, path: Path = CONFIG) -> Settings:
    """Settings of the full experiment, or with the changes of the ``quick`` table."""
    config = tomllib.loads(path.read_text(encoding="utf-8"))
    changes = config["quick"] if quick else {}
    tables = {name: config[name] | changes.get(name, {}) for name in TABLES}
    shared = set(tables["grid"]["seeds"]) & set(tables["training"]["seeds"])
    if shared:
        raise SystemExit(f"{path}: seeds {sorted(shared)} both choose learning rates and judge by them")
    optimizers = [Optimizer(**o) for o in config["optimizers"]]
    labels = changes.get("labels", [o.label for o in optimizers])
    return Settings(quick=quick, optimizers=tuple(o for o in optimizers if o.label in labels), **tables)


def settle(work: Path, settings: Settings) -> None:
    """Write the settings into a work folder, or refuse one that was begun with others.

    Optimizers may be added to those of a folder; nothing else may change, the margin least of all.
    """
    path = work / "settings.json"
    if path.exists():
        begun = Settings.from_json(json.loads(path.read_text(encoding="utf-8")))
        lost = [o.label for o in begun.optimizers if o not in settings.optimizers]
        changed = [name for name in ("quick", *TABLES) if getattr(begun, name) != getattr(settings, name)]
        if changed or lost:
            what = ", ".join([*changed, *lost])
            raise SystemExit(
                f"{work} was begun with other settings ({what}); give another folder with --work"
            )
    work.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings.to_json(), indent=1) + "\n", encoding="utf-8")
