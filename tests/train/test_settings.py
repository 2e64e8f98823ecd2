"""Settings are checked when they are made, survive JSON, and know which of them decide the bits."""

import dataclasses
import json

import pytest

from edgejax.core.errors import ConfigError
from edgejax.train import TrainSettings

pytestmark = pytest.mark.quick


def test_json_round_trip():
    settings = TrainSettings(
        steps=7,
        optimizer="lion",
        optimizer_options={"b1": 0.8},
        warmup=2,
        weight_decay=0.1,
        clip_norm=None,
        eval_every=3,
    )
    assert TrainSettings.from_json(json.loads(json.dumps(settings.to_json()))) == settings


def test_settings_are_frozen_and_the_callers_options_copied():
    options = {"b2": 0.95}
    settings = TrainSettings(optimizer_options=options)
    options["b2"] = 0.5
    assert settings.optimizer_options == {"b2": 0.95}
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.steps = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 0}, "steps must be .* not 0"),
        ({"steps": 2.5}, "steps must be .* not 2.5"),
        ({"batch_size": True}, "batch_size"),
        ({"accumulate": -1}, "accumulate"),
        ({"keep_checkpoints": 0}, "keep_checkpoints"),
        ({"checkpoint_every": 0}, "checkpoint_every"),
        ({"eval_every": 0}, "eval_every"),
        ({"eval_rows": 0}, "eval_rows"),
        ({"optimizer": "nothing"}, "there are: .*adamw"),
        ({"optimizer_options": {"b9": 1}}, "no option 'b9'"),
        ({"optimizer_options": {"b1": object()}}, "JSON"),
        ({"optimizer": "sgd", "weight_decay": 0.1}, "no weight decay"),
        ({"optimizer": "sm3"}, "constant learning rate"),
        ({"learning_rate": 0.0}, "learning_rate .* not 0.0"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": "1e-3"}, "learning_rate"),
        ({"lr_schedule": "step"}, "there are: cosine"),
        ({"lr_schedule": "constant", "final_rate_fraction": 0.1}, "final_rate_fraction"),
        ({"final_rate_fraction": 2.0}, "between 0 and 1"),
        ({"warmup": 100}, "warm-up steps leave none"),
        ({"clip_norm": 0.0}, "clip_norm"),
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"seed": -1}, "seed"),
        ({"steps": 2**31}, "below 2\\*\\*31, not 2147483648"),
        ({"clip_norm": float("inf")}, "clip_norm .* not inf"),
        ({"weight_decay": float("inf")}, "weight_decay .* not inf"),
        ({"optimizer_options": {"eps": float("inf")}}, "JSON"),
        ({"remat": "some"}, "there are: none"),
        ({"boundaries": "int4"}, "unknown boundaries 'int4'; there are: f32, bf16, int8"),
        ({"boundaries": "int8", "remat": "none"}, "do not go with remat 'none'"),
        ({"boundaries": "int8", "remat": "sqrt"}, "do not go with remat 'sqrt'"),
        ({"mlp_tile": 0}, "mlp_tile must be .* not 0"),
    ],
)
def test_bad_values(changes, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**changes)


def test_optimizer_without_schedule_works_with_a_constant_rate():
    assert TrainSettings(optimizer="sm3", lr_schedule="constant", warmup=0).is_constant


def test_unknown_field_is_named():
    with pytest.raises(ConfigError, match="no training setting named stepz; there are: steps"):
        TrainSettings.from_json({"stepz": 3})


def test_fingerprint_is_of_what_decides_the_bits():
    settings = TrainSettings()
    same = ("log_every", "eval_every", "eval_rows", "checkpoint_every", "keep_checkpoints")
    for name in same:
        assert dataclasses.replace(settings, **{name: 3}).fingerprint() == settings.fingerprint(), name
    streamed = TrainSettings(schedule="streamed")
    assert dataclasses.replace(streamed, spill_to="elsewhere").fingerprint() == streamed.fingerprint()
    assert dataclasses.replace(settings, mesh="data=1").fingerprint() == settings.fingerprint()
    changes = {
        "steps": 99, "batch_size": 3, "accumulate": 3, "optimizer": "lion", "optimizer_options": {"b2": 0.9},
        "learning_rate": 0.1, "lr_schedule": "linear", "warmup": 3, "final_rate_fraction": 0.3, "weight_decay": 0.3,
        "clip_norm": 3.0, "schedule": "layerwise", "remat": "none", "boundaries": "bf16", "mlp_tile": 64,
        "bfloat16": True, "small_code": True, "seed": 3,
    }  # fmt: skip
    assert set(changes) | set(same) | {"mesh", "spill_to", "clip_by"} == {
        f.name for f in dataclasses.fields(settings)
    }
    for name, value in changes.items():
        assert dataclasses.replace(settings, **{name: value}).fingerprint() != settings.fingerprint(), name
    layerwise = TrainSettings(schedule="layerwise")
    assert dataclasses.replace(layerwise, clip_by="layer").fingerprint() != layerwise.fingerprint()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"schedule": "layerwse"}, "there are: whole, layerwise, streamed"),
        ({"schedule": "layerwise", "remat": "none"}, "recomputes each layer"),
        (
            {"schedule": "layerwise", "clip_by": "global"},
            "needs the whole gradient; it can by: layer, previous",
        ),
        ({"clip_by": "layer"}, "clips by its global norm"),
        ({"schedule": "streamed", "bfloat16": True}, "use layerwise or whole"),
        ({"spill_to": "here"}, "only streamed can spill"),
        (
            {"schedule": "layerwise", "optimizer": "adamw8bit", "optimizer_options": {"bits": 3}},
            "no option 'bits'",
        ),
    ],
)
def test_choices_that_do_not_go_together_are_refused_with_the_way_out(values, message):
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**values)
