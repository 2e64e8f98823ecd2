"""A step over a mesh is the step of one device, in parts: the numbers, the bytes of a device, and what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers.tiny_run import LORA, make_model, make_rows, make_settings

from edgejax.core.errors import ConfigError
from edgejax.optim import adamw
from edgejax.train import (
    SilentProgress,
    TrainSettings,
    finetune,
    init_state,
    make_mesh,
    mesh_receipt,
    parse_mesh,
)
from edgejax.train.mesh import MeshShape, check_mesh
from edgejax.train.placement import REPEATED, shard_axes

TESTS = Path(__file__).resolve().parents[1]
BOUND = 2e-6  # of a leaf's largest element after three steps; float32 rounds by 6e-8, 3e-7 was seen


def drive(n_devices: int, *arguments: str) -> str:
    path = os.pathsep.join(filter(None, [str(TESTS), os.environ.get("PYTHONPATH")]))
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={n_devices}"
    result = subprocess.run(
        [sys.executable, "-m", "helpers.mesh_driver", *arguments], capture_output=True, text=True, timeout=900,
        env={**os.environ, "PYTHONPATH": path, "XLA_FLAGS": flags},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    return json.loads(drive(8, "numbers", str(tmp_path_factory.mktemp("numbers"))).splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("mesh", ["data=8", "data=4,shard=2", "shard=8"])
def test_eight_devices_are_one_with_eight_micro_batches(numbers, mesh):
    ours, theirs = numbers["f32"][mesh], numbers["f32"]["alone"]
    assert ours["gap"] < BOUND
    for name in ("loss", "grad_norm", "n_tokens"):
        assert ours[name] == pytest.approx(theirs[name], rel=1e-6)


@pytest.mark.slow
def test_what_layers_keep_in_bf16_is_that_of_one_device(numbers):
    """An ulp between the two may be a step of bf16 in a value that waits."""
    ours, theirs = numbers["kept"]["data=4,shard=2"], numbers["kept"]["alone"]
    assert ours["gap"] < 1e-3
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert theirs["loss"] == pytest.approx(numbers["f32"]["alone"]["loss"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mesh"),
    [("adamw4bit", "data=4,shard=2"), ("adamw4bit", "shard=8"), ("bfloat16", "data=2,shard=4")],
)
def test_narrow_moments_and_weights_round_as_on_one_device(numbers, variant, mesh):
    """Random bits depend on an element's place in the whole leaf: only where a sum lies on the edge of two codes, and
    float32 rounds it otherwise, may an element get the other one (a 15th of its block's largest moment, or 2^-8)."""
    ours, theirs = numbers[variant][mesh], numbers[variant]["alone"]
    assert ours["apart"] < 1e-3
    assert ours["gap"] < (1e-3 if variant == "adamw4bit" else 2**-7)
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "mesh", "shards"),
    [
        ("f32", "data=8", 1),
        ("f32", "data=4,shard=2", 2),
        ("f32", "shard=8", 8),
        ("adamw4bit", "data=4,shard=2", 2),
        ("adamw4bit", "shard=8", 8),
        ("bfloat16", "data=2,shard=4", 4),
    ],
)
def test_bytes_of_a_device_fall_by_the_number_of_shards(numbers, variant, mesh, shards):
    figures = numbers[variant][mesh]
    repeated = sum(figures["repeated"].values())
    counters = 8  # two numbers of 4 bytes, or three
    expected = (figures["whole_bytes"] - repeated) / shards + repeated
    held = figures["bytes_per_device"]
    assert len(held) == 8
    assert len(set(held)) == 1
    assert expected <= held[0] <= expected + counters + 4
    assert figures["receipt_bytes"] == held[0]
    # XLA's own count for one device: the state, the batch, and that the state is updated in place
    assert held[0] <= figures["argument_bytes"] <= held[0] + 4096
    assert figures["alias_bytes"] >= held[0]


@pytest.mark.slow
def test_the_receipt_says_what_was_not_split_and_why(numbers):
    text = numbers["adamw4bit"]["shard=8"]["receipt"]
    assert "a vector, too small to be worth sending" in text
    assert "4 units of 1,024 elements do not divide by 8" in text  # the key projection's [2, 32, 64]
    assert numbers["f32"]["data=8"]["repeated"] == {}
    vectors = numbers["f32"]["shard=8"]["repeated"]
    assert all(name.endswith("scale") for name in vectors)


@pytest.mark.slow
def test_temporary_memory_falls_too(numbers):
    """Gradients exist in parts only; what is left is one layer's weights and the rows' values."""
    temp = {mesh: figures["temp_bytes"] for mesh, figures in numbers["f32"].items()}
    assert temp["shard=8"] < temp["data=4,shard=2"] < temp["data=8"]


def test_matrices_are_split_along_their_largest_axis_that_divides():
    shape = lambda *axes: jax.ShapeDtypeStruct(axes, np.float32)  # noqa: E731
    tree = {
        "blocks": {"a": shape(4, 6, 8), "b": shape(4, 9, 6), "c": shape(4, 9, 7), "scale": shape(4, 8)},
        "embed": {"table": shape(10, 4)},
        "final_norm": {"scale": shape(8)},
    }
    assert shard_axes(tree, 2) == {
        "blocks": {"a": 2, "b": 2, "c": REPEATED, "scale": REPEATED},
        "embed": {"table": 0},
        "final_norm": {"scale": REPEATED},
    }
    assert set(jax.tree.leaves(shard_axes(tree, 1))) == {REPEATED}


def test_quantised_moments_are_split_along_their_units():
    params = {"blocks": {"kernel": jax.ShapeDtypeStruct((2, 64, 64), np.float32)}}
    state = jax.eval_shape(
        lambda: init_state(jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), params), adamw(1e-3, bits=4))
    )
    axes = shard_axes(state.opt_state, 4)
    assert axes[0].mu["blocks"]["kernel"].codes == axes[0].mu["blocks"]["kernel"].scale == 0
    assert shard_axes(state.opt_state, 16)[0].mu["blocks"]["kernel"].codes == REPEATED


def test_a_mesh_of_one_device_changes_no_bit(tmp_path):
    def run(name, **changes):
        settings = make_settings(steps=4, eval_every=None, **changes)
        return finetune(
            make_model(), make_rows(), make_rows(1, 5), settings, lora=LORA, out_dir=tmp_path / name,
            progress=SilentProgress(),
        )  # fmt: skip

    ours, theirs = run("mesh", mesh="data=1,shard=1"), run("alone")
    gaps = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), ours.trainable, theirs.trainable)
    assert max(jax.tree.leaves(gaps)) < 1e-6
    assert ours.held_out_after.loss == pytest.approx(theirs.held_out_after.loss, rel=1e-6)


@pytest.mark.parametrize(
    ("text", "shape"),
    [("data=4,shard=2", (4, 2)), ("shard=8", (1, 8)), (" shard = 2 , data=3 ", (3, 2)), ("data=1", (1, 1))],
)
def test_what_a_mesh_is_written_as(text, shape):
    assert parse_mesh(text) == MeshShape(*shape)
    assert parse_mesh(str(parse_mesh(text))) == MeshShape(*shape)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows=2", r"part 'rows=2'.*data=4,shard=2.*axes data and shard"),
        ("data", r"part 'data'"),
        ("", r"part ''"),
        ("data=2,", r"part ''"),
        ("data=0", r"0 along data.*at least 1"),
        ("shard=-2", r"-2 along shard.*at least 1"),
        ("shard=two", r"two along shard"),
        ("shard=2.5", r"2\.5 along shard"),
        ("data=", r"nothing along data"),
        ("data=2,data=4", r"names the axis data twice"),
    ],
)
def test_meshes_that_are_none(text, message):
    with pytest.raises(ConfigError, match=message):
        parse_mesh(text)
    with pytest.raises(ConfigError, match=message):
        TrainSettings(mesh=text, batch_size=8)


def test_rows_that_devices_cannot_share():
    with pytest.raises(
        ConfigError, match=r"12 rows .* by the 8 devices of the mesh data=4,shard=2.*take 8 or 16"
    ):
        TrainSettings(mesh="data=4,shard=2", batch_size=12)
    with pytest.raises(ConfigError, match=r"1 rows .*take 2 rows"):
        TrainSettings(mesh="shard=2")
    check_mesh(MeshShape(4, 2), batch_size=16, schedule="whole")


@pytest.mark.parametrize("schedule", ["layerwise", "streamed"])
def test_schedules_of_one_device(schedule):
    with pytest.raises(
        ConfigError, match=rf"the schedule {schedule} runs on one device.*Over a mesh can: whole"
    ):
        TrainSettings(mesh="data=2", batch_size=2, schedule=schedule)


def test_more_devices_than_there_are(tmp_path):
    n_devices = len(jax.devices())
    with pytest.raises(
        ConfigError, match=rf"has {2 * n_devices} devices.*{n_devices} or a divisor.*device_count=8"
    ):
        make_mesh(MeshShape(data=2 * n_devices))
    settings = make_settings(mesh=f"shard={2 * n_devices}", batch_size=2 * n_devices)
    with pytest.raises(ConfigError, match="simulate more devices: XLA_FLAGS"):
        finetune(make_model(), make_rows(), make_rows(1, 5), settings, lora=LORA, out_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_mesh_is_no_part_of_what_a_run_is():
    assert (
        TrainSettings(mesh="data=2", batch_size=2).fingerprint() == TrainSettings(batch_size=2).fingerprint()
    )


def test_a_receipt_counts_shapes_as_it_counts_arrays():
    mesh = make_mesh(MeshShape())
    tree = {"blocks": {"kernel": np.zeros((2, 4, 4), np.float32)}}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    assert mesh_receipt(tree, mesh) == mesh_receipt(shapes, mesh)
    assert mesh_receipt(tree, mesh).device_bytes == 128
