"""``edgejax pack`` on the command line, with tiny models."""

import json
import os
import re

import jax
import numpy as np
import pytest
from helpers.tiny_model import write_tiny_model, write_tiny_text

from edgejax.cli.main import main
from edgejax.core.units import format_bytes
from edgejax.models.shapes import SHAPES
from edgejax.weights import load_model, open_packed
from edgejax.weights.params import load_params
from edgejax.weights.random import RandomSource

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("pack") / "model")


def pack(*arguments) -> int:
    return main(["pack", *map(str, arguments)])


def same(a, b) -> bool:
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(x, y) and x.dtype == y.dtype
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_a_packed_model_is_named_in_place_of_its_source(folder, tmp_path, capsys):
    out = tmp_path / "m.ejx"
    assert pack("--model", folder, "--base", "int4", "--out", out) == 0
    printed = capsys.readouterr()
    file = open_packed(out)
    layer = file.sections["layer.0"]
    sizes = f"{format_bytes(file.n_bytes)}, 2 layers of {format_bytes(layer.stop - layer.start)}"
    assert printed.out == f"{out}: {file.config.n_params():,} parameters in {sizes}, SHA-256 {file.sha256}\n"
    assert printed.err == ""
    assert (file.origin.name, file.origin.format, file.origin.base) == ("model", "huggingface", "int4")
    assert file.origin.sha256 == load_model(folder, on_host=True).source.sha256
    said = []
    for model in (["--model", str(folder), "--base", "int4"], ["--model", str(out)]):
        assert main(["generate", *model, "--prompt", "Hi", "--max-tokens", "5", "--json"]) == 0
        said.append(json.loads(capsys.readouterr().out)["tokens"])
    assert said[0] == said[1]


def test_a_packed_model_can_be_trained_and_exported(folder, tmp_path, capsys):
    out, run = tmp_path / "m.ejx", tmp_path / "run"
    write_tiny_text(tmp_path / "text.jsonl")
    assert pack("--model", folder, "--base", "int8", "--out", out) == 0
    small = [
        "--seq",
        "32",
        "--steps",
        "2",
        "--rank",
        "2",
        "--sample-tokens",
        "4",
        "--eval-rows",
        "2",
        "--quiet",
    ]
    data = ["--data", str(tmp_path / "text.jsonl"), "--out", str(run)]
    assert main(["finetune", "--model", str(out), *data, *small]) == 0
    merged = ["--format", "merged-safetensors", "--out", str(tmp_path / "merged")]
    assert main(["export", "--model", str(out), "--adapter", str(run), *merged]) == 0
    assert load_model(tmp_path / "merged", on_host=True).config == open_packed(out).config


def test_random_weights_of_a_shape(tmp_path, capsys):
    out = tmp_path / "m.ejx"
    assert pack("--random-weights", "--model", "tiny", "--seed", "3", "--base", "int8", "--out", out) == 0
    file = open_packed(out)
    assert file.config == SHAPES["tiny"]
    assert (file.origin.name, file.origin.format, file.origin.sha256) == ("tiny, seed 3", "random", "")
    assert same(file.load(), load_params(RandomSource(SHAPES["tiny"], 3), "int8", []))


def test_without_a_tokenizer(folder, tmp_path, capsys):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        (bare / name).write_bytes((folder / name).read_bytes())
    assert pack("--model", bare, "--out", tmp_path / "m.ejx") == 2
    assert "no tokenizer.json" in capsys.readouterr().err
    assert pack("--model", bare, "--no-tokenizer", "--out", tmp_path / "m.ejx") == 0
    assert "tokenizer" not in open_packed(tmp_path / "m.ejx").sections
    assert main(["generate", "--model", str(tmp_path / "m.ejx"), "--prompt", "Hi"]) == 2
    assert "no tokenizer was packed" in capsys.readouterr().err


def test_notes_are_told_and_kept(tmp_path, capsys):
    from weight_files import hf_settings, hf_tensors, tiny, write_hf

    config = tiny("llama", d_ff=72)
    model = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    assert pack("--model", model, "--base", "int4", "--out", tmp_path / "m.ejx") == 0
    assert capsys.readouterr().err.startswith("note: blocks.down_proj.kernel: rows of 72 do not divide")
    assert len(open_packed(tmp_path / "m.ejx").notes) == 1


def test_a_file_that_is_there_stays(folder, tmp_path, capsys):
    out = tmp_path / "m.ejx"
    out.write_text("precious")
    assert pack("--model", folder, "--out", out) == 2
    assert "exists and is not overwritten" in capsys.readouterr().err
    assert out.read_text() == "precious"
    assert pack("--model", folder, "--out", out, "--overwrite") == 0
    assert pack("--model", out, "--out", out, "--overwrite") == 2
    assert "is the model itself" in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["m.ejx"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no-such-model"], "neither an existing path nor a preset"),
        (["--model", "no-such-shape", "--random-weights"], "no shape named 'no-such-shape'.*tiny"),
        (["--model", "tiny", "--seed", "1"], "--seed is of random weights"),
        (["--model", "tiny", "--random-weights", "--seed", "-1"], "--seed -1"),
    ],
)
def test_wrong_usage_writes_nothing(arguments, message, tmp_path, capsys):
    assert pack(*arguments, "--out", tmp_path / "m.ejx") == 2
    assert re.search(message, capsys.readouterr().err)
    assert os.listdir(tmp_path) == []
