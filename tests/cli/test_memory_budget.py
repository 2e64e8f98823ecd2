"""``finetune --memory`` and ``--dry-run``: what is tried, in which order, what is chosen, and that a run is as it was said."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.tiny_model import write_tiny_model, write_tiny_text

from edgejax.cli import memory_budget, other_process
from edgejax.cli.finetune import merge_options
from edgejax.cli.main import main
from edgejax.cli.memory_budget import choose_within, least_bytes, settings_to_try
from edgejax.cli.other_process import TooLarge, packed_file, run_edgejax
from edgejax.core.errors import ConfigError

MB = 10**6
SMALL = ["--seq", "32", "--steps", "4", "--eval-rows", "4"]
TREES = 300


def peak_mb(options) -> int:
    """A made-up process: trees, and what a micro-step's rows keep."""
    if options["schedule"] == "streamed":
        return 200 + {"bf16": 20, "int8": 10}[options["boundaries"]] - 5 * (options["optimizer"] != "adamw")
    kept = {"none": 500, "mlp": 200, "full": 150}[options["remat"]] - 50 * (options["boundaries"] == "int8")
    return TREES + kept * options["batch"]


@pytest.fixture
def asked(monkeypatch):
    """The dry runs that were asked for, each answered by ``peak_mb``."""
    seen = []

    def dry_run_of(options, limit_bytes=None):
        seen.append(options)
        running = peak_mb(options) * MB
        found = {
            "running_bytes": running, "needed_bytes": round(1.03 * running), "peak_bytes": running,
            "compiling_bytes": 250 * MB, "floor_bytes": TREES * MB, "sources_bytes": {"layer inputs": 100 * MB},
        }  # fmt: skip
        return found, options["seed"] != 13

    monkeypatch.setattr(memory_budget, "dry_run_of", dry_run_of)
    monkeypatch.setattr(
        memory_budget, "packed_file", lambda model, base, limit: (f"{model}-{base}.ejx", False)
    )
    return seen


def choose(memory: str, **given):
    options = argparse.Namespace(**merge_options({"memory": memory, **given}, Path("nowhere")))
    return choose_within(options, given)


def names(options) -> tuple:
    return options.remat, options.boundaries, options.schedule


@pytest.mark.quick
def test_the_fastest_that_fits_is_chosen(asked, capsys):
    assert names(choose("2GB")) == ("none", "f32", "whole")
    assert len(asked) == 1  # nothing slower is compiled
    assert names(choose("520MB")) == ("mlp", "bf16", "whole")
    assert names(choose("500MB")) == ("full", "f32", "whole")  # 500 of 500 leave no 3%
    assert names(choose("420MB")) == ("full", "int8", "whole")
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("-> ")
    assert said[-1].endswith("--remat full --boundaries int8 --small-code")


@pytest.mark.quick
def test_what_cannot_fit_is_not_compiled(asked):
    found = choose("250MB")
    assert names(found) == ("full", "bf16", "streamed")
    assert (found.model, found.base) == ("smollm2-135m-auto.ejx", "auto")
    assert [(o["remat"], o["schedule"]) for o in asked] == [("none", "whole"), ("full", "streamed")]


@pytest.mark.quick
def test_small_code_where_compiling_would_not_fit():
    assert {o["small_code"] for o in settings_to_try({}, 10**9)} == {False}
    assert {o["small_code"] for o in settings_to_try({"schedule": "whole"}, 6 * 10**8)} == {True}
    assert {o["small_code"] for o in settings_to_try({"small_code": True}, 10**10)} == {True}
    full = {(o["schedule"], o["small_code"]) for o in settings_to_try({"mode": "full"}, 8 * 10**8)}
    assert full == {("whole", False), ("layerwise", True)}  # whose steps take more to compile


@pytest.mark.quick
def test_rows_of_a_step_stay_and_are_split(asked):
    found = choose("1GB", batch=4, accumulate=2, remat="full")
    assert (found.batch, found.accumulate) == (4, 2)
    found = choose("820MB", batch=4, accumulate=2, remat="full")
    assert (found.batch, found.accumulate) == (1, 8)
    assert found.batch * found.accumulate == 8


@pytest.mark.quick
def test_what_was_given_stays(asked):
    assert names(choose("2GB", remat="full", boundaries="int8")) == ("full", "int8", "whole")
    assert {o["schedule"] for o in settings_to_try({"schedule": "streamed"}, 10**9)} == {"streamed"}
    assert {o["schedule"] for o in settings_to_try({"sample_tokens": 8}, 10**9)} == {
        "whole"
    }  # streamed makes none
    assert {o["schedule"] for o in settings_to_try({"sample_tokens": 0}, 10**9)} == {"whole", "streamed"}
    assert [o["optimizer"] for o in settings_to_try({"mode": "full", "base": "bf16"}, 10**9)] == [
        "adamw8bit", "adamw4bit", "adamw4bit",
    ]  # fmt: skip


@pytest.mark.quick
def test_nothing_fits_and_the_nearest_are_named(asked):
    with pytest.raises(ConfigError, match=r"no setting stays below 190\.7 MiB") as caught:
        choose("200MB")
    assert (
        "spare) 201.4 MiB with --remat full --boundaries int8 --schedule streamed --optimizer adamw8bit"
        in str(caught.value)
    )
    assert "alone are 286.1 MiB" in str(caught.value)


@pytest.mark.quick
def test_programs_that_cannot_be_kept_are_an_error(asked):
    with pytest.raises(ConfigError, match="compiled programs cannot be kept"):
        choose("2GB", seed=13)


@pytest.mark.quick
@pytest.mark.parametrize("option", [["--memory", "1GB"], ["--dry-run"]])
def test_many_processes_are_refused_before_they_are_waited_for(option, capsys):
    words = ["--coordinator", "127.0.0.1:1", "--processes", "2", "--process-index", "1"]
    assert main(["finetune", *words, *option]) == 2
    assert f"{option[0]} is of a run of one process" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("memory", "given", "message"),
    [
        ("600", {}, "'600' has no unit; write 600MB"),
        ("much", {}, "'much' is not an amount of memory"),
        ("1GB", {"mesh": "data=2"}, "leave out --mesh"),
        ("1GB", {"dry_run": True}, "leave out --dry-run"),
        ("1GB", {"remat": "attention"}, "goes with what was given: --remat$"),
    ],
)
def test_refusals(asked, memory, given, message):
    with pytest.raises(ConfigError, match=message):
        choose(memory, **given)
    assert not asked


@pytest.mark.quick
def test_an_error_of_one_setting_is_passed_over_and_one_of_all_is_not_repeated(monkeypatch, asked):
    answers = memory_budget.dry_run_of

    def one_is_too_large_to_compile(options, limit_bytes=None):
        if options["remat"] == "none":
            raise ConfigError("it cannot be compiled")
        return answers(options)

    monkeypatch.setattr(memory_budget, "dry_run_of", one_is_too_large_to_compile)
    assert names(choose("2GB")) == ("mlp", "bf16", "whole")

    def too_large_but_streamed(options, limit_bytes=None):
        tries.append(options["schedule"])
        if options["schedule"] == "whole":
            raise TooLarge("compiling it takes more than 1")
        return answers(options)

    tries = []
    monkeypatch.setattr(memory_budget, "dry_run_of", too_large_but_streamed)
    assert names(choose("2GB")) == ("full", "bf16", "streamed")
    assert tries == ["whole", "streamed"]  # other whole steps are compiled alike

    tries = []

    def on_a_card(options, limit_bytes=None):
        tries.append(options)
        raise ConfigError(f"{memory_budget.OF_THE_CPU}, and this one does on a card")

    monkeypatch.setattr(memory_budget, "dry_run_of", on_a_card)
    with pytest.raises(ConfigError, match="on a card"):
        choose("2GB")
    assert len(tries) == 1  # nothing is packed for the streamed schedule

    tries = []

    def never(options, limit_bytes=None):
        tries.append(options)
        raise ConfigError("no such model")

    monkeypatch.setattr(memory_budget, "dry_run_of", never)
    with pytest.raises(ConfigError, match="no such model"):
        choose("2GB")
    assert len(tries) == 4  # twice for each schedule, which may have errors of its own


@pytest.mark.quick
def test_the_least_is_never_more_than_a_setting_takes():
    found = {"running_bytes": 500, "floor_bytes": 300, "sources_bytes": {"layer inputs": 100}}
    one = {"schedule": "whole", "remat": "full", "boundaries": "f32", "batch": 1}
    assert least_bytes(one | {"boundaries": "int8"}, one, found) == 400
    assert least_bytes(one | {"batch": 4}, one, found) == 300
    assert least_bytes(one | {"optimizer": "adamw4bit"}, one | {"optimizer": "adamw"}, found) == 0


@pytest.mark.quick
def test_another_process_says_what_went_wrong():
    with pytest.raises(ConfigError, match=r"^'600' has no unit; write 600MB or 600GB$"):
        run_edgejax(["plan", "--device", "600"])
    with pytest.raises(TooLarge, match=r"^the check takes more than 10.0 MiB$"):
        run_edgejax(["doctor"], limit_bytes=10 * 2**20)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budget")
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text.jsonl")
    return folder


def edgejax(folder, *words: str) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"), "EDGEJAX_CACHE": str(folder / "cache"),
    }  # fmt: skip
    command = [sys.executable, "-m", "edgejax", "finetune", "--model", str(folder / "model")]
    command += ["--data", str(folder / "text.jsonl"), *SMALL, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=folder)


LAYERWISE = ["--mode", "full", "--base", "bf16", "--schedule", "layerwise", "--optimizer", "adamw4bit"]


@pytest.mark.parametrize("more", [["--rank", "2"], LAYERWISE], ids=["lora", "full"])
def test_a_dry_run_leaves_programs_for_the_run_and_nothing_else(folder, more):
    before = set(os.listdir(folder))
    done = edgejax(folder, *more, "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    assert set(os.listdir(folder)) - before <= {"xla"}
    answer = json.loads(done.stdout)
    assert answer["keeps_programs"]
    footprint = answer["footprint"]
    assert footprint["running_bytes"] == sum(footprint["sources_bytes"].values())
    assert footprint["peak_bytes"] == max(footprint["running_bytes"], footprint["compiling_bytes"])
    kept = {path.name for path in (folder / "xla").glob("*-cache")}
    assert any("step" in name for name in kept)
    done = edgejax(folder, *more, "--out", f"run-{len(more)}", "--quiet")
    assert done.returncode == 0, done.stderr
    new = [path for path in (folder / "xla").glob("*-cache") if path.name not in kept]
    largest = max((path.stat().st_size for path in new), default=0)
    assert largest < 20_000, sorted(path.name for path in new)  # single operations; a step is ten times that
    text = edgejax(folder, *more, "--dry-run").stdout
    assert "Python, JAX and data" in text
    assert "compiling its programs took" in text


def test_a_run_stays_within_the_memory_that_it_was_given(folder):
    done = edgejax(folder, "--memory", "600MB", "--out", "within")
    assert done.returncode == 0, done.stderr
    config = json.loads((folder / "within" / "config.json").read_text())
    assert config["settings"]["remat"] == "none"
    assert config["settings"]["small_code"] is True
    assert "memory" not in config["command"]
    result = json.loads((folder / "within" / "result.json").read_text())
    assert result["memory"]["peak_rss_bytes"] < 600 * MB
    done = edgejax(folder, "--memory", "20MB", "--out", "nowhere")
    assert done.returncode == 2
    assert "compiling takes more than 19.1 MiB" in done.stderr
    done = edgejax(folder, "--memory", "600MB", "--out", "within")
    assert done.returncode == 2
    assert "within is not empty" in done.stderr
    assert "compil" not in done.stderr
    assert not (folder / "nowhere").exists()


def test_a_streamed_run_is_packed_once(folder, monkeypatch):
    given = ("--memory", "700MB", "--schedule", "streamed", "--boundaries", "int8")
    for out in ("first", "second"):
        done = edgejax(folder, *given, "--out", out)
        assert done.returncode == 0, done.stderr
        assert ("packed " in done.stderr) == (out == "first")
    packed = list((folder / "cache" / "packed").glob("*.ejx"))
    assert len(packed) == 1
    config = json.loads((folder / "second" / "config.json").read_text())
    assert config["model"]["path"] == str(packed[0])
    monkeypatch.setenv("EDGEJAX_CACHE", str(folder / "cache"))
    assert packed_file(str(folder / "model"), "auto") == (str(packed[0]), False)
    assert packed_file("some.ejx", "auto") == ("some.ejx", False)
    os.utime(folder / "model" / "config.json")  # it may be another model now
    monkeypatch.setattr(other_process, "run_edgejax", lambda words, limit: "")
    assert packed_file(str(folder / "model"), "auto")[0] != str(packed[0])


def test_a_shape_can_be_tried_without_its_weights(capsys):
    words = [
        "finetune",
        "--dry-run",
        "--json",
        "--model",
        "shape:tiny",
        "--seq",
        "32",
        "--sample-tokens",
        "0",
    ]
    assert main([*words, "--base", "int8"]) == 0
    assert json.loads(capsys.readouterr().out)["footprint"]["floor_bytes"] > 0
    assert main([*words, "--epochs", "2"]) == 2
    assert "--epochs counts rows" in capsys.readouterr().err
    assert main([*words, "--mesh", "data=2"]) == 2
    assert "leave out --mesh" in capsys.readouterr().err
    assert main([*words[:4], "shape:tinny"]) == 2
    assert "the nearest: tiny" in capsys.readouterr().err
