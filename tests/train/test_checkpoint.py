"""Checkpoints: the same bits back, damage noticed, other runs refused, the old ones removed."""

import json
import os
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from edgejax.core.errors import RunError
from edgejax.train import (
    Checkpoints,
    RunIdentity,
    TrainState,
    init_state,
    make_optimizer,
    nonfinite_leaves,
    tree_sha256,
)
from edgejax.train import checkpoint as checkpoint_module

pytestmark = [
    pytest.mark.quick,
    # Reads of damaged files that Orbax had started together with the failing one are dropped by it unawaited.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

IDENTITY = RunIdentity(model="m" * 8, data="d" * 8, settings="s" * 8)


def state(seed: int = 0) -> TrainState:
    random = np.random.default_rng(seed)
    trainable = {
        "f32": jnp.asarray(random.standard_normal((3, 5)), jnp.float32),
        "bf16": jnp.asarray(random.standard_normal((4, 2)), jnp.bfloat16),
        "f16": jnp.asarray(random.standard_normal(7), jnp.float16),
    }
    optimizer_state = (
        {"int8": jnp.asarray(random.integers(-128, 128, (2, 9)), jnp.int8), "empty": jnp.zeros((0, 3))},
        {
            "int4": jnp.asarray(random.integers(-8, 8, 6), jnp.int4),
            "uint32": jnp.asarray([2**32 - 1], jnp.uint32),
        },
    )
    return TrainState(jnp.int32(seed), trainable, optimizer_state)


def open_in(folder, keep=2, identity=IDENTITY):
    notes: list[str] = []
    checkpoints = Checkpoints(folder / "checkpoints", identity=identity, keep=keep, note=notes.append)
    return checkpoints, notes


def zeros():
    return jax.tree.map(jnp.zeros_like, state())


def saved(folder, steps=(1, 2), keep=2):
    checkpoints, _ = open_in(folder, keep)
    for step in steps:
        checkpoints.save(step, state(step), data_position=10 * step)
    checkpoints.close()


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_bit_exact_for_every_dtype(tmp_path):
    saved(tmp_path)
    checkpoints, notes = open_in(tmp_path)
    step, restored, record = checkpoints.restore(zeros())
    assert (step, record["data_position"], record["step"]) == (2, 20, 2)
    assert set(record["versions"]) >= {"python", "jax", "orbax-checkpoint"}
    assert_same_bits(restored, state(2))
    assert notes == []


def test_special_values_keep_their_bits(tmp_path):
    bits = np.array([0x80000000, 0x00000001, 0x7F7FFFFF], np.uint32)
    checkpoints, _ = open_in(tmp_path)
    checkpoints.save(1, {"x": jnp.asarray(bits.view(np.float32))}, data_position=0)
    _, restored, _ = checkpoints.restore({"x": jnp.zeros(3)})
    np.testing.assert_array_equal(np.asarray(restored["x"]).view(np.uint32), bits)


def test_restored_state_can_be_donated(tmp_path):
    saved(tmp_path)
    _, restored, _ = open_in(tmp_path)[0].restore(zeros())
    leaf = restored.trainable["f32"]
    pointer = leaf.unsafe_buffer_pointer()
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + jnp.ones((), x.dtype), s), donate_argnums=0)
    after = step(restored)
    assert leaf.is_deleted()
    assert after.trainable["f32"].unsafe_buffer_pointer() == pointer


def test_state_of_real_optimizers(tmp_path):
    for number, name in enumerate(["adamw", "adafactor", "lion", "sgd"]):
        optimizer = make_optimizer(name, 1e-3)
        before = init_state({"w": jnp.ones((130, 129)), "scale": jnp.ones(3)}, optimizer)
        checkpoints, _ = open_in(tmp_path / str(number))
        checkpoints.save(1, before, data_position=0)
        assert_same_bits(checkpoints.restore(jax.tree.map(jnp.zeros_like, before))[1], before)


def test_only_so_many_are_kept_and_nothing_else_stays(tmp_path):
    saved(tmp_path, steps=(1, 2, 3, 4, 5), keep=3)
    checkpoints, _ = open_in(tmp_path, keep=3)
    assert checkpoints.steps() == [3, 4, 5]
    assert sorted(entry.name for entry in (tmp_path / "checkpoints").iterdir()) == ["3", "4", "5"]


def test_nothing_to_restore(tmp_path):
    checkpoints, _ = open_in(tmp_path)
    assert checkpoints.restore(zeros()) is None
    assert not (tmp_path / "checkpoints").exists()


def test_orbax_is_imported_only_when_needed(tmp_path):
    script = (
        "import sys, pathlib, edgejax.train as t\n"
        "c = t.Checkpoints(pathlib.Path(sys.argv[1]), identity=t.RunIdentity(model='', data='', settings=''))\n"
        "assert c.restore({}) is None and c.steps() == []\n"
        "print('orbax' in sys.modules)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )  # fmt: skip
    assert result.stdout == "False\n"


def data_files(folder, step):
    """The files of a checkpoint that hold its arrays."""
    files = [
        p
        for p in (folder / "checkpoints" / str(step) / "state").rglob("*")
        if p.is_file() and p.parent.name == "d"
    ]
    assert files
    return files


@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damaged_newest_falls_back_to_the_one_before(tmp_path, damage):
    saved(tmp_path, steps=(1, 2))
    for file in data_files(tmp_path, 2):
        content = bytearray(file.read_bytes())
        if damage == "flip":
            content[len(content) // 2] ^= 0x10
            file.write_bytes(content)
        elif damage == "cut":
            file.write_bytes(content[: len(content) // 2])
        else:
            file.unlink()
    checkpoints, notes = open_in(tmp_path)
    step, restored, _ = checkpoints.restore(zeros())
    assert step == 1
    assert_same_bits(restored, state(1))
    assert len(notes) == 1
    assert "step 2" in notes[0]
    assert "going on from step 1" in notes[0]
    # The damaged one is kept aside, and its step can be saved again.
    assert len(list((tmp_path / "checkpoints_damaged").iterdir())) == 1
    checkpoints.save(2, state(2), data_position=20)
    assert_same_bits(open_in(tmp_path)[0].restore(zeros())[1], state(2))


def test_arrays_that_orbax_reads_without_complaint_but_are_others(tmp_path):
    """What the hash is for: files that decode well and do not hold what was saved."""
    saved(tmp_path, steps=(1, 2))
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(folder / "1" / "state", folder / "2" / "state")
    checkpoints, notes = open_in(tmp_path)
    assert checkpoints.restore(zeros())[0] == 1
    assert "do not match their SHA-256" in notes[0]


def test_any_flipped_byte_gives_the_right_bits_or_a_refusal(tmp_path):
    """One byte in each file of the newest checkpoint: what comes back is always a state that was saved."""
    saved(tmp_path, steps=(1, 2))
    files = sorted(p for p in (tmp_path / "checkpoints" / "2").rglob("*") if p.is_file() and p.stat().st_size)
    assert len(files) >= 6
    for file in files:
        original = file.read_bytes()
        content = bytearray(original)
        content[len(content) * 2 // 3] ^= 0x04
        file.write_bytes(content)
        checkpoints, _ = open_in(tmp_path)
        step, restored, record = checkpoints.restore(zeros())
        checkpoints.close()
        assert_same_bits(restored, state(step))
        assert record["data_position"] == 10 * step
        aside = list((tmp_path / "checkpoints_damaged").glob("*"))
        if aside:  # put it back for the next file
            os.replace(aside[0], tmp_path / "checkpoints" / "2")
        file.write_bytes(original)


def test_altered_record_is_noticed(tmp_path):
    saved(tmp_path, steps=(1, 2))
    file = tmp_path / "checkpoints" / "2" / "record" / "metadata"
    record = json.loads(file.read_text())
    record["data_position"] = 999
    file.write_text(json.dumps(record))
    checkpoints, notes = open_in(tmp_path)
    assert checkpoints.restore(zeros())[0] == 1
    assert "record" in notes[0]


def test_none_whole_is_an_error_that_says_why(tmp_path):
    saved(tmp_path, steps=(1, 2))
    for step in (1, 2):
        for file in data_files(tmp_path, step):
            file.write_bytes(b"nothing")
    checkpoints, _ = open_in(tmp_path)
    with pytest.raises(RunError, match=r"no checkpoint in .* can be used: step 2: .*; step 1: .*overwrite"):
        checkpoints.restore(zeros())
    assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize("what", ["model", "data", "settings"])
def test_checkpoint_of_another_run_is_refused_naming_both(tmp_path, what):
    saved(tmp_path, steps=(1,))
    other = RunIdentity(**{"model": "m" * 8, "data": "d" * 8, "settings": "s" * 8, what: "other"})
    checkpoints, _ = open_in(tmp_path, identity=other)
    with pytest.raises(RunError, match=f"other {what} .fingerprint {what[0] * 8}.*fingerprint other"):
        checkpoints.restore(zeros())
    assert checkpoints.steps() == [1]


def test_a_checkpoint_whose_state_means_something_else_is_refused(tmp_path, monkeypatch):
    checkpoints, _ = open_in(tmp_path)
    monkeypatch.setattr(checkpoint_module, "FORMAT", "edgejax-checkpoint-1")
    checkpoints.save(1, state(), data_position=1)
    checkpoints.close()
    monkeypatch.undo()
    again, _ = open_in(tmp_path)
    with pytest.raises(RunError, match=r"format edgejax-checkpoint-1.*reads edgejax-checkpoint-2.*new run"):
        again.restore(zeros())
    assert again.steps() == [1]


def test_checkpoint_of_other_shapes_or_dtypes_is_refused(tmp_path):
    saved(tmp_path, steps=(1,))
    good = zeros()
    for leaf in (jnp.zeros((3, 6)), jnp.zeros((3, 5), jnp.bfloat16)):
        checkpoints, _ = open_in(tmp_path)
        with pytest.raises(RunError, match="no checkpoint"):
            checkpoints.restore(good._replace(trainable={**good.trainable, "f32": leaf}))


def test_disk_that_fills_keeps_the_last_good_one(tmp_path, monkeypatch):
    saved(tmp_path, steps=(1,))
    checkpoints, _ = open_in(tmp_path)
    checkpoints.restore(zeros())
    manager = type(checkpoints._open())

    def full(self, *args, **kwargs):
        raise OSError(28, os.strerror(28))

    with monkeypatch.context() as patch:
        patch.setattr(manager, "save", full)
        with pytest.raises(RunError, match=r"step 2 could not be written.*No space left.*step 1 stays"):
            checkpoints.save(2, state(2), data_position=20)
    assert_same_bits(checkpoints.restore(zeros())[1], state(1))
    checkpoints.save(2, state(2), data_position=20)  # and goes on when there is room again
    assert checkpoints.steps() == [1, 2]


def test_a_leaf_at_a_time_is_written(tmp_path, monkeypatch):
    limits = []
    usual = ocp.StandardCheckpointHandler

    def handler(*, save_concurrent_gb, **kwargs):
        limits.append(save_concurrent_gb * 1e9)
        return usual(save_concurrent_gb=save_concurrent_gb, **kwargs)

    monkeypatch.setattr(ocp, "StandardCheckpointHandler", handler)
    saved(tmp_path, steps=(1, 2))
    checkpoints, _ = open_in(tmp_path)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(state())]
    assert [round(limit) for limit in limits] == [max(sizes) + 1]  # of all leaves Orbax would copy the sum
    assert sum(sizes) > max(sizes) + 1
    assert_same_bits(checkpoints.restore(zeros())[1], state(2))


def test_place_that_cannot_be_written(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunError, match="could not be written"):
        open_in(tmp_path)[0].save(1, state(), data_position=0)


def test_space_is_asked_for_before_training(tmp_path, monkeypatch):
    checkpoints, _ = open_in(tmp_path)
    checkpoints.check_space(state())
    monkeypatch.setattr(checkpoint_module, "disk_free_bytes", lambda path: 100)
    with pytest.raises(RunError, match=r"has 100 B free, but 2 kept checkpoints"):
        checkpoints.check_space(state())


def test_hash_depends_on_every_bit_name_shape_and_dtype():
    base = {"a": np.arange(4, dtype=np.float32), "b": np.zeros(2, np.int8)}
    variants = [
        base,
        {**base, "a": np.array([0, 1, 2, np.nextafter(np.float32(3), np.float32(4))], np.float32)},
        {**base, "a": base["a"].reshape(2, 2)},
        {**base, "a": base["a"].view(np.int32)},
        {"a": base["a"], "c": base["b"]},
    ]
    assert len({tree_sha256(tree) for tree in variants}) == len(variants)
    assert tree_sha256(base) == tree_sha256({"b": base["b"], "a": jnp.asarray(base["a"])})


@pytest.mark.parametrize("value", [jnp.nan, jnp.inf, -jnp.inf])
def test_leaves_that_are_not_finite_are_named(value):
    tree = {"good": jnp.ones(3), "bad": {"x": jnp.array([1.0, value], jnp.bfloat16)}, "count": jnp.int32(3)}
    assert nonfinite_leaves(tree) == ["bad.x"]
    assert nonfinite_leaves({"count": jnp.int32(3)}) == []
