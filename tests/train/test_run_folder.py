"""A run's folder: never overwritten without being asked, never shared, and refused while it can still be."""

import errno
import json
import os

import pytest

from edgejax.core.errors import ConfigError, RunError
from edgejax.train import RunFolder, is_run_folder, read_config, run_folder, write_json

pytestmark = pytest.mark.quick


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "run"


def make_run(path, **config):
    with RunFolder(path, config=config) as folder:
        folder.begin()
        (path / "metrics.jsonl").write_text("{}\n")
        (path / "checkpoints" / "3").mkdir(parents=True)


def test_new_run(path):
    make_run(path, steps=3)
    assert is_run_folder(path)
    assert read_config(path)["steps"] == 3
    assert not list(path.glob("*.tmp")) + list(path.glob(".write-probe"))


def test_existing_run_is_left_alone_and_both_ways_on_are_named(path):
    make_run(path, steps=3)
    before = sorted(path.rglob("*"))
    with pytest.raises(RunError, match=r"resume.*overwrite"):
        RunFolder(path, config={"steps": 4})
    assert sorted(path.rglob("*")) == before
    assert read_config(path)["steps"] == 3


def test_resume_gives_the_config_of_then(path):
    make_run(path, steps=3)
    with RunFolder(path, config={"steps": 4}, resume=True) as folder:
        folder.begin()
        assert folder.config["steps"] == 3
    assert read_config(path)["steps"] == 3
    assert (path / "checkpoints" / "3").exists()


def test_overwrite_removes_what_was_there(path):
    make_run(path, steps=3)
    before = sorted(path.rglob("*"))
    with pytest.raises(ConfigError, match="refused"), RunFolder(path, config={"steps": 4}, overwrite=True):
        raise ConfigError("refused before it began")
    assert sorted(path.rglob("*")) == before
    assert read_config(path)["steps"] == 3
    with RunFolder(path, config={"steps": 4}, overwrite=True) as folder:
        folder.begin()
    assert read_config(path)["steps"] == 4
    assert not (path / "metrics.jsonl").exists()
    assert not (path / "checkpoints").exists()


def test_overwrite_and_resume_of_nothing(path):
    with pytest.raises(RunError, match="no run to resume"):
        RunFolder(path, config={}, resume=True)
    assert not path.exists()
    with RunFolder(path, config={}, overwrite=True) as folder:
        folder.begin()
        assert is_run_folder(path)


def test_a_run_that_never_began_leaves_no_folder(path):
    with pytest.raises(ConfigError, match="refused"), RunFolder(path, config={}):
        raise ConfigError("refused")
    assert not path.exists()
    path.mkdir()  # one that was there stays
    with RunFolder(path, config={}):
        pass
    assert path.exists()
    assert not is_run_folder(path)


@pytest.mark.parametrize(("there", "overwrite"), [(False, False), (False, True), (True, True)])
def test_what_came_into_the_folder_meanwhile_is_not_removed(path, there, overwrite):
    if there:
        make_run(path)
    with RunFolder(path, config={}, overwrite=overwrite) as folder:
        (path / "notes").write_text("mine")
        folder.begin()
    assert (path / "notes").read_text() == "mine"
    assert not (path / "metrics.jsonl").exists()


def test_a_disk_that_is_full_when_the_run_begins(path, monkeypatch):
    with RunFolder(path, config={}) as folder:

        def fail(descriptor):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fail)
        with pytest.raises(RunError, match="Nothing was trained"):
            folder.begin()


@pytest.mark.parametrize("content", ["thesis.tex", "config.json"])
@pytest.mark.parametrize("how", ["overwrite", "resume"])
def test_folder_that_is_no_run_is_never_touched(path, content, how):
    path.mkdir(parents=True)
    (path / content).write_text('{"mine": 1}')
    with pytest.raises(RunError, match="no run of edgejax"):
        RunFolder(path, config={}, **{how: True})
    assert [entry.name for entry in path.iterdir()] == [content]
    assert (path / content).read_text() == '{"mine": 1}'


def test_overwrite_does_not_follow_links(path, tmp_path):
    make_run(path)
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("x")
    (path / "link").symlink_to(tmp_path / "precious")
    with RunFolder(path, config={}, overwrite=True) as folder:
        folder.begin()
    assert not (path / "link").exists()
    assert (tmp_path / "precious" / "file").read_text() == "x"


def test_both_options_exclude_each_other(path):
    with pytest.raises(ConfigError, match="exclude each other"):
        RunFolder(path, config={}, resume=True, overwrite=True)


def test_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "run").write_text("x")
    with pytest.raises(RunError, match="is a file"):
        RunFolder(tmp_path / "run", config={})
    with pytest.raises(RunError, match="cannot be written: Not a directory"):
        RunFolder(tmp_path / "run" / "below", config={})


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a file system where nothing can be made")
def test_folder_that_cannot_be_made():
    with pytest.raises(RunError, match="cannot be written"):
        RunFolder("/proc/edgejax-run", config={})


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT])
def test_full_or_read_only_disk_is_found_before_training(path, monkeypatch, number):
    def fail(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(RunError, match=f"{os.strerror(number)}. Nothing was trained"):
        RunFolder(path, config={})
    assert not path.exists()


def test_leftovers_of_a_crash_before_the_config_are_no_obstacle(path):
    path.mkdir(parents=True)
    (path / "config.json.tmp").write_text('{"edgej')
    (path / ".lock").write_text("")
    with RunFolder(path, config={}) as folder:
        folder.begin()
        assert is_run_folder(path)


def test_damaged_config(path):
    make_run(path)
    (path / "config.json").write_text('{"edgejax_run": 1')
    with pytest.raises(RunError, match="no run of edgejax"):
        RunFolder(path, config={}, resume=True)
    with pytest.raises(RunError, match="damaged"):
        read_config(path)


def test_folder_belongs_to_one_process_at_a_time(path):
    make_run(path)
    # flock belongs to the open file, so a second opening stands for a second process.
    with RunFolder(path, config={}, resume=True), pytest.raises(RunError, match="another process"):
        RunFolder(path, config={}, resume=True)
    with RunFolder(path, config={}, overwrite=True), pytest.raises(RunError, match="another process"):
        RunFolder(path, config={}, overwrite=True)
    assert is_run_folder(path)


def test_a_run_that_another_process_made_meanwhile_is_left_alone(path, monkeypatch):
    real = run_folder._hold

    def hold(folder):  # the other one is done between our look into the folder and our lock
        monkeypatch.setattr(run_folder, "_hold", real)
        make_run(folder, steps=3)
        return real(folder)

    monkeypatch.setattr(run_folder, "_hold", hold)
    with pytest.raises(RunError, match="another process has just made a run"):
        RunFolder(path, config={"steps": 4})
    assert read_config(path)["steps"] == 3


def test_a_name_that_checkpoints_could_not_be_written_under(tmp_path):
    with pytest.raises(RunError, match=r"run\\udcff' is not UTF-8"):
        RunFolder(tmp_path / "run\udcff", config={})
    assert list(tmp_path.iterdir()) == []


def test_written_json_is_the_old_or_the_new_one(tmp_path, monkeypatch):
    file = tmp_path / "result.json"
    write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(file, {"a": float("nan")})
    assert json.loads(file.read_text()) == {"a": 1}
