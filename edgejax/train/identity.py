"""What makes two runs the same run: the model, the data, and the settings that decide the trained bits."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

from edgejax.core.arrays import PyTree
from edgejax.core.errors import RunError
from edgejax.core.host import package_versions
from edgejax.data import PackedDataset
from edgejax.models import LoraConfig, ModelConfig
from edgejax.train.checkpoint import RunIdentity
from edgejax.train.settings import TrainSettings


class SourceLike(Protocol):
    """Where a model came from."""

    @property
    def name(self) -> str: ...
    @property
    def path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def base(self) -> str: ...


class ModelLike(Protocol):
    """A loaded model: its configuration, its parameters, and where they came from."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> PyTree: ...
    @property
    def source(self) -> SourceLike: ...
    @property
    def notes(self) -> tuple[str, ...]: ...


@runtime_checkable
class OpenedLike(Protocol):
    """A model whose weights were not read yet (``weights.OpenedModel``)."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def source(self) -> SourceLike: ...
    def abstract_params(self) -> PyTree: ...
    def load(self, *, on_host: bool = False) -> ModelLike: ...


def run_config(
    model: ModelLike | OpenedLike,
    train: PackedDataset,
    held_out: PackedDataset,
    settings: TrainSettings,
    lora: LoraConfig | None,
) -> dict[str, Any]:
    """What ``config.json`` says of a run, as JSON values."""
    source = model.source
    config = {
        "settings": settings.to_json(),
        "lora": None if lora is None else dataclasses.asdict(lora),
        "model": {
            **{name: getattr(source, name) for name in ("name", "path", "format", "sha256", "base")},
            "config": dataclasses.asdict(model.config),
        },
        "data": {
            name: {
                "fingerprint": d.fingerprint,
                "seq_length": d.seq_length,
                "rows": d.n_rows,
                "documents": d.n_documents,
            }
            for name, d in (("train", train), ("held_out", held_out))
        },
        "versions": package_versions(),
    }
    return json.loads(json.dumps(config))


def check_same_run(
    old: Mapping[str, Any], new: Mapping[str, Any], note: Callable[[str], None] = lambda text: None
) -> None:
    """Refuses to resume what is another run.

    Args:
      old: ``config.json`` of the run that is there.
      new: ``run_config`` of what was asked for.
      note: told when versions differ, with which the bits may differ.

    Raises:
      RunError: another model, other data, or other settings that decide the result, with both values.
    """
    try:
        pairs = [
            ("model", _model_fingerprint(old), _model_fingerprint(new)),
            ("training data", old["data"]["train"]["fingerprint"], new["data"]["train"]["fingerprint"]),
            ("held-out data", old["data"]["held_out"]["fingerprint"], new["data"]["held_out"]["fingerprint"]),
        ]
        then, now = _deciding(old), _deciding(new)
        old_versions = dict(old["versions"])
    except (KeyError, TypeError) as error:
        raise RunError(
            f"config.json of the run lacks {error}; it cannot be resumed, start a new run"
        ) from error
    for what, theirs, ours in pairs:
        if theirs != ours:
            raise RunError(
                f"the run was made with another {what}: fingerprint {theirs} then, {ours} now. Give the same {what}, or "
                "start a new run in another folder."
            )
    changed = [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in now
        if then.get(name) != now.get(name)
    ]
    if changed:
        raise RunError(
            f"the run was made with other settings: {'; '.join(changed)}. Resume with the same ones, or start a new run "
            "in another folder."
        )
    for name, version in new["versions"].items():
        if old_versions.get(name) != version:
            note(
                f"{name} was {old_versions.get(name)} and is {version}: the bits may differ from an unbroken run's"
            )


def run_identity(config: Mapping[str, Any]) -> RunIdentity:
    """The fingerprints that a run's checkpoints carry, from its ``run_config``."""
    deciding = json.dumps(_deciding(config), sort_keys=True)
    return RunIdentity(
        model=_model_fingerprint(config),
        data=config["data"]["train"]["fingerprint"],
        settings=hashlib.sha256(deciding.encode()).hexdigest(),
    )


def _model_fingerprint(config: Mapping[str, Any]) -> str:
    return f"{config['model']['sha256']} held as {config['model']['base']}"


def _deciding(config: Mapping[str, Any]) -> dict[str, Any]:
    return {**TrainSettings.from_json(config["settings"]).deciding(), "lora": config["lora"]}
