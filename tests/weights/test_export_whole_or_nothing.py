"""New files and folders are there whole or not at all, and a merge never widens the model."""

import os
import tempfile
import tracemalloc

import pytest
from export_cases import CONFIGS, LORAS, byte_level_tokenizer, random_adapters, random_params

from edgejax.core.errors import RunError
from edgejax.core.trees import tree_bytes
from edgejax.models.config import LINEAR_NAMES, ModelConfig
from edgejax.quant import quantize_int4
from edgejax.weights import merge
from edgejax.weights.atomic import new_file, new_folder
from edgejax.weights.export_gguf import export_gguf
from edgejax.weights.export_lora_gguf import export_lora_gguf
from edgejax.weights.export_merged import export_merged
from edgejax.weights.export_peft import export_peft

pytestmark = pytest.mark.quick


def _fill_file(path):
    with new_file(path, overwrite=True) as part:
        part.write_text("new")
        assert not path.exists() or path.read_text() == "old"
        raise KeyboardInterrupt


def _fill_folder(path):
    with new_folder(path, marker="kind", overwrite=True) as part:
        (part / "kind").write_text("new")
        raise KeyboardInterrupt


def test_an_interrupted_write_leaves_what_was_there(tmp_path):
    file, folder = tmp_path / "file", tmp_path / "folder"
    for _ in range(2):  # first with nothing there, then with old content
        with pytest.raises(KeyboardInterrupt):
            _fill_file(file)
        with pytest.raises(KeyboardInterrupt):
            _fill_folder(folder)
        if not file.exists():
            assert list(tmp_path.iterdir()) == []
            file.write_text("old")
            folder.mkdir()
            (folder / "kind").write_text("old")
    assert file.read_text() == (folder / "kind").read_text() == "old"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_a_folder_whose_rename_fails_comes_back(tmp_path, monkeypatch):
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "kind").write_text("old")
    rename = type(folder).rename

    def fail_once(self, target):
        if self.name.endswith(".part"):
            raise OSError(5, os.strerror(5))
        return rename(self, target)

    monkeypatch.setattr(type(folder), "rename", fail_once)
    with (
        pytest.raises(RunError, match="cannot write"),
        new_folder(folder, marker="kind", overwrite=True) as part,
    ):
        (part / "kind").write_text("new")
    assert (folder / "kind").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_places_that_cannot_be_written_are_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="is a folder"), new_file(tmp_path):
        pass
    with pytest.raises(RunError, match="is a file"), new_folder(tmp_path / "file", marker="kind"):
        pass
    with pytest.raises(RunError, match="cannot write"), new_file(tmp_path / "file" / "below"):
        pass

    def read_only(**_):
        raise OSError(30, os.strerror(30), str(tmp_path))

    monkeypatch.setattr(tempfile, "mkstemp", read_only)
    with pytest.raises(RunError, match="Read-only file system"), new_file(tmp_path / "new"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def _write(kind: str, out) -> None:
    config, lora = CONFIGS["llama"], LORAS["all"]
    if kind == "peft":
        export_peft(random_adapters(config, lora), lora, config, out, base_name="b")
    elif kind == "lora-gguf":
        export_lora_gguf(random_adapters(config, lora), lora, config, out, base_name="b")
    elif kind == "merged":
        export_merged(random_params(config), config, out)
    else:
        export_gguf(random_params(config), config, out, name="m", tokenizer=byte_level_tokenizer())


@pytest.mark.parametrize("kind", ["peft", "lora-gguf", "merged", "gguf"])
def test_a_write_that_stops_anywhere_is_noticed_and_leaves_nothing(kind, tmp_path):
    """A limit on the size of files makes the kernel refuse the bytes after it, as a full disk does."""
    resource = pytest.importorskip("resource")
    whole = tmp_path / "whole"
    _write(kind, whole)
    n_bytes = max(p.stat().st_size for p in (whole, *whole.rglob("*")) if p.is_file())
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (*range(n_bytes // 7, n_bytes, n_bytes // 7), n_bytes - 32):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(RunError, match="no space left"):
                _write(kind, tmp_path / "m")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [p.name for p in tmp_path.iterdir()] == ["whole"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "plain").write_text("")
    with new_file(tmp_path / "ours") as part:
        part.write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_merging_never_widens_the_model(kind, tmp_path, monkeypatch):
    config = ModelConfig(
        family="llama",
        vocab_size=4096,
        d_model=256,
        n_layers=8,
        n_heads=4,
        n_kv_heads=4,
        head_dim=64,
        d_ff=768,
        max_position=128,
        tie_embeddings=True,
    )
    lora = LORAS["all"]
    params, adapters, tokenizer = random_params(config), random_adapters(config, lora), byte_level_tokenizer()
    wide_bytes = tree_bytes(params)
    for name in LINEAR_NAMES:
        params["blocks"][name]["kernel"] = quantize_int4(params["blocks"][name]["kernel"])
    monkeypatch.setattr(merge, "CHUNK_BYTES", 2**18)
    tracemalloc.start()
    try:
        if kind == "gguf":
            export_gguf(
                params, config, tmp_path / "m", name="m", tokenizer=tokenizer, adapters=adapters, lora=lora
            )
        else:
            export_merged(params, config, tmp_path / "m", adapters=adapters, lora=lora)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    table_bytes = config.vocab_size * config.d_model * (2 if kind == "safetensors" else 34 / 32)
    # The largest tensor in the file's type (and what writing it takes), and a few float32 runs of rows.
    assert table_bytes < peak < 2.2 * table_bytes + 16 * 2**18
    assert peak < wide_bytes / 3
