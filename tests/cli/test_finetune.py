"""``edgejax finetune`` from arguments to files, with a model of a few thousand parameters."""

import argparse
import json
import os
import signal
import subprocess
import sys

import pytest
from helpers.tiny_model import write_tiny_model, write_tiny_text

from edgejax.cli.finetune import check_options, lora_config, merge_options, record_of
from edgejax.cli.finetune_arguments import DEFAULTS, add_arguments
from edgejax.cli.main import build_parser, main
from edgejax.core.errors import ConfigError, RunError

SMALL = ["--seq", "32", "--steps", "4", "--rank", "2", "--sample-tokens", "8", "--eval-rows", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a text of a few documents."""
    folder = tmp_path_factory.mktemp("cli")
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text.jsonl")
    return folder


def finetune(folder, *more: str) -> int:
    return main(
        ["finetune", "--model", str(folder / "model"), "--data", str(folder / "text.jsonl"), *SMALL, *more]
    )


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of a run that has ended, and what it printed."""
    out = folder / "run"
    command = [sys.executable, "-m", "edgejax", "finetune", "--model", str(folder / "model")]
    command += [
        "--data",
        str(folder / "text.jsonl"),
        *SMALL,
        "--out",
        str(out),
        "--json",
        "--prompt",
        "<Document>",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out, done


def parse(*arguments: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args(arguments)


def test_a_run_leaves_everything_it_promises(finished):
    out, _ = finished
    assert {"adapter", "checkpoints", "config.json", "metrics.jsonl", "report.html", "result.json"} <= set(
        os.listdir(out)
    )
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(os.listdir(out / "adapter"))


def test_the_summary_says_what_the_result_says(finished):
    out, done = finished
    result = json.loads((out / "result.json").read_text())
    last = json.loads(done.stdout.splitlines()[-1])
    assert last["held_out_after"] == result["held_out_after"]
    assert last["run_dir"] == str(out)
    before, after = result["held_out_before"], result["held_out_after"]
    assert f"held-out loss        {before['loss']:.4f} -> {after['loss']:.4f}" in done.stdout
    assert f"{before['perplexity']:.3f} -> {after['perplexity']:.3f}" in done.stdout
    for word in (
        "weights",
        "adapters",
        "optimizer",
        "activations",
        "runtime",
        "tokens/s, measured on",
        str(out),
    ):
        assert word in done.stdout
    assert last["sample"]["prompt"] == "<Document>"
    assert after["loss"] != before["loss"]


def test_the_report_is_of_this_run(finished):
    out, _ = finished
    page = (out / "report.html").read_text()
    result = json.loads((out / "result.json").read_text())
    assert f"{result['held_out_after']['loss']:.3f}" in page
    assert "&lt;Document&gt;" in page
    assert "over 4 steps, 2 held-out evaluations" in page
    assert json.loads((out / "config.json").read_text())["model"]["sha256"] in page


def test_a_run_that_is_there_is_not_touched(finished, folder, capsys):
    out, _ = finished
    before = (out / "metrics.jsonl").read_bytes()
    assert finetune(folder, "--out", str(out), "--quiet") == 2
    assert "already holds a run" in capsys.readouterr().err
    assert (out / "metrics.jsonl").read_bytes() == before


def test_resume_takes_the_runs_own_arguments(finished, capsys, monkeypatch, tmp_path):
    out, done = finished
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", "--resume", "--out", str(out), "--quiet", "--json"]) == 0
    again = json.loads(capsys.readouterr().out)
    first = json.loads(done.stdout.splitlines()[-1])
    assert again["held_out_after"] == first["held_out_after"]
    assert again["sample"] == first["sample"]
    assert again["mode"] == "lora"


def test_resume_refuses_other_settings(finished, capsys):
    out, _ = finished
    assert main(["finetune", "--resume", "--out", str(out), "--learning-rate", "1", "--quiet"]) == 2
    assert "learning_rate was 0.0005, is 1.0" in capsys.readouterr().err


def test_full_training_leaves_a_model_others_read(folder, capsys):
    out = folder / "full"
    command = [
        "finetune",
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "text.jsonl"),
        "--mode",
        "full",
    ]
    command += ["--seq", "32", "--steps", "2", "--eval-rows", "4", "--sample-tokens", "0", "--quiet"]
    assert main([*command, "--out", str(out)]) == 0
    assert (
        main(
            [
                "eval",
                "--model",
                str(out / "model"),
                "--data",
                str(folder / "text.jsonl"),
                "--seq",
                "32",
                "--json",
            ]
        )
        == 0
    )
    trained = json.loads(capsys.readouterr().out)["loss"]
    assert (
        main(
            [
                "eval",
                "--model",
                str(folder / "model"),
                "--data",
                str(folder / "text.jsonl"),
                "--seq",
                "32",
                "--json",
            ]
        )
        == 0
    )
    assert trained < json.loads(capsys.readouterr().out)["loss"]


def test_eval_of_the_adapter_is_the_runs_own_figure(finished, folder, capsys):
    out, _ = finished
    command = [
        "eval",
        "--model",
        str(folder / "model"),
        "--data",
        str(folder / "text.jsonl"),
        "--seq",
        "32",
        "--json",
    ]
    assert main([*command, "--held-out", "0.1", "--adapter", str(out), "--max-rows", "4"]) == 0
    figures = json.loads(capsys.readouterr().out)
    expected = json.loads((out / "result.json").read_text())["held_out_after"]
    assert figures["n_tokens"] == expected["n_tokens"]
    assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-6)


def test_sigterm_saves_and_says_how_to_go_on(folder, tmp_path):
    out = tmp_path / "stopped"
    command = [sys.executable, "-m", "edgejax", "finetune", "--model", str(folder / "model")]
    command += ["--data", str(folder / "text.jsonl"), *SMALL, "--steps", "1000000", "--out", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        for line in child.stderr:
            if line.startswith("step 1/"):
                break
        child.send_signal(signal.SIGTERM)
        _, rest = child.communicate(timeout=300)
    assert child.returncode == 143, rest
    assert f"edgejax finetune --resume --out {out}" in rest
    assert any((out / "checkpoints").iterdir())


@pytest.mark.quick
def test_only_what_is_given_is_set():
    assert vars(parse()) == {}
    assert vars(parse("--rank", "4", "--data", "a", "b")) == {"rank": 4, "data": ["a", "b"]}


@pytest.mark.quick
def test_every_option_has_a_default_and_every_default_an_option():
    dests = {a.dest for a in parse_actions() if a.dest != "help"}
    assert dests == set(DEFAULTS)


def parse_actions():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser._actions


@pytest.mark.quick
def test_defaults_are_settings_that_hold(tmp_path):
    options = argparse.Namespace(**merge_options({}, tmp_path))
    check_options(options)
    lora = lora_config(options)
    assert (lora.rank, lora.alpha) == (8, 16.0)


@pytest.mark.quick
def test_given_beats_recorded_beats_default(tmp_path):
    options = argparse.Namespace(**merge_options({"rank": 4, "steps": 7, "keep": 3}, tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"command": record_of(options)}))
    merged = merge_options({"resume": True, "keep": 5}, tmp_path)
    assert (merged["rank"], merged["steps"], merged["keep"], merged["seed"]) == (4, 7, 5, 0)
    assert merge_options({"resume": True, "epochs": 2.0}, tmp_path)["steps"] is None


@pytest.mark.quick
def test_recorded_paths_hold_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    options = argparse.Namespace(**merge_options({"data": ["a.txt"]}, tmp_path))
    record = record_of(options)
    assert record["data"] == [str(tmp_path / "a.txt")]
    assert (record["model"], record["held_out"]) == ("smollm2-135m", ["0.1"])
    assert json.loads(json.dumps(record)) == record | {"optimizer_option": []}


@pytest.mark.quick
@pytest.mark.parametrize("config", [{}, {"command": 3}, {"command": {"no_such_option": 1}}])
def test_a_run_of_another_program_is_not_resumed(tmp_path, config):
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RunError, match="did not start"):
        merge_options({"resume": True}, tmp_path)


def test_what_ternary_codes_lose_is_said(folder, capsys, tmp_path):
    assert finetune(folder, "--base", "ternary", "--out", str(tmp_path / "run")) == 0
    assert "of the norm of its weights is lost in ternary codes" in capsys.readouterr().err
    command = ["eval", "--model", str(folder / "model"), "--data", str(folder / "text.jsonl"), "--seq", "32"]
    assert main([*command, "--base", "ternary", "--max-rows", "2"]) == 0
    assert "of the norm of its weights is lost in ternary codes" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--schedule", "nope"], "nope"),
        (["--mode", "full", "--rank", "4"], "leave out --rank"),
        (["--mode", "full", "--targets", "q_proj"], "leave out --targets"),
        (["--mode", "full", "--base", "ternary"], "--base ternary is of frozen ones"),
        (["--mode", "full", "--base", "int8"], "--base int8 is of frozen ones"),
        (["--epochs", "0"], "above 0"),
        (["--epochs", "nan"], "above 0"),
        (["--batch", "0"], "--batch 0"),
        (["--accumulate", "-1"], "--accumulate -1"),
        (["--rank", "0"], "rank must be at least 1"),
        (["--targets", "q_proj,nope"], "no linear layer named nope; there are: q_proj"),
        (["--resume"], "--resume needs --out"),
        (["--overwrite"], "--overwrite needs --out"),
        (["--resume", "--overwrite", "--out", "x"], "give one of them"),
        (["--model", "no/such/model"], "presets: smollm2-135m"),
    ],
)
def test_what_cannot_be_honoured_exits_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["finetune", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("edgejax finetune: ")
    assert captured.out == ""
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "missing.txt"], "missing.txt: there is no such file"),
        (["--optimizer", "adamq"], "no optimizer named 'adamq'"),
        (["--optimizer-option", "no_such=1"], "no_such"),
        (["--lr-schedule", "steep"], "no learning-rate schedule named 'steep'"),
        (["--remat", "some"], "unknown remat policy 'some'"),
        (["--seq", "4096"], "--allow-long-context"),
        (["--held-out", "1.5"], "held-out fraction 1.5"),
        (["--clip", "-1"], "clip"),
        (["--steps", "0"], "steps must be a whole number of at least 1"),
    ],
)
def test_what_is_found_later_exits_2_and_leaves_nothing(folder, arguments, message, capsys, tmp_path):
    out = tmp_path / "run"
    assert finetune(folder, *arguments, "--out", str(out), "--quiet") == 2
    assert message in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.quick
def test_readable_errors_name_the_flag_as_typed():
    with pytest.raises(ConfigError, match="--rslora"):
        check_options(argparse.Namespace(**{**DEFAULTS, "mode": "full", "rslora": True}))


@pytest.mark.quick
def test_the_parser_of_the_program_takes_the_same():
    args = build_parser(["finetune"]).parse_args(["finetune", "--clip", "none", "--warmup", "5"])
    assert (args.clip, args.warmup) == (None, 5)
