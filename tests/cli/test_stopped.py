"""What comes from outside while the program runs: signals, streams that go away, disks that are full or read-only."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.tiny_model import write_tiny_model, write_tiny_text
from weight_files import gguf_tensors, tiny, write_gguf

from edgejax.cli import finetune as finetune_command
from edgejax.cli.main import main

SMALL = ["--seq", "32", "--steps", "2", "--rank", "2", "--sample-tokens", "8", "--eval-rows", "4", "--quiet"]
PROGRAM = "from edgejax.cli.main import entry_point\nentry_point()"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model and a text of a few documents."""
    folder = tmp_path_factory.mktemp("stopped")
    write_tiny_model(folder / "model")
    write_tiny_text(folder / "text.jsonl")
    return folder


def command_that(body: str) -> str:
    """A program whose ``models`` command does what ``body`` says."""
    lines = "\n".join(f"    {line}" for line in body.splitlines())
    return (
        "import os, signal, sys, time, types\n"
        f"def run(args):\n{lines}\n    return 0\n"
        "module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)\n"
        f"sys.modules['edgejax.cli.models'] = module\nsys.argv[1:1] = ['models']\n{PROGRAM}"
    )


def python(code: str, *arguments: str, shell: str = "", **options) -> subprocess.CompletedProcess:
    """Runs ``code``; ``shell`` is a redirection, as ``>&-``."""
    command = [sys.executable, "-c", code, *arguments]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


# Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_training(number, folder, tmp_path):
    """While the data is read: from a pipe, so that the moment is known."""
    pipe = tmp_path / "text.txt"
    os.mkfifo(pipe)
    arguments = [
        "finetune",
        "--model",
        str(folder / "model"),
        "--data",
        str(pipe),
        "--out",
        str(tmp_path / "run"),
    ]
    command = [sys.executable, "-c", PROGRAM, *arguments]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child,
        open(pipe, "w"),  # returns when the child opens it to read
    ):
        # From opening to reading: a signal just before a read that blocks is seen only after it.
        time.sleep(1)
        child.send_signal(number)
        out, err = child.communicate(timeout=300)
    assert (child.returncode, out) == (128 + number, "")
    assert err.startswith("edgejax finetune: interrupted")
    assert "Traceback" not in err
    assert os.listdir(tmp_path) == ["text.txt"]


@pytest.mark.quick
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_module_is_imported(name, tmp_path):
    """Where an exception may be swallowed or become another one."""
    (tmp_path / "slow_module.py").write_text(
        f"import os, signal, time\ntry:\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(20)\n"
        "except BaseException:\n    pass\n"
    )
    done = python(command_that(f"sys.path.insert(0, {str(tmp_path)!r})\nimport slow_module"))
    assert (done.returncode, done.stdout) == (128 + getattr(signal, name), "")
    assert done.stderr == "edgejax: interrupted\n"


@pytest.mark.quick
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_signal_while_a_file_is_written_leaves_nothing(name, tmp_path):
    done = python(
        command_that(
            "from edgejax.weights.atomic import new_file\n"
            f"with new_file({str(tmp_path / 'out')!r}) as part:\n"
            f"    part.write_text('half')\n    os.kill(os.getpid(), signal.{name})\n    time.sleep(20)"
        )
    )
    by = "" if name == "SIGINT" else " by SIGTERM"
    assert (done.returncode, done.stderr) == (
        128 + getattr(signal, name),
        f"edgejax models: interrupted{by}\n",
    )
    assert os.listdir(tmp_path) == []


@pytest.mark.quick
def test_a_signal_that_a_parent_ignores_stays_ignored():
    code = command_that("os.kill(os.getpid(), signal.SIGINT)\nprint('whole')")
    command = ["sh", "-c", "trap '' INT; exec \"$@\"", "sh", sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "whole\n", "")


@pytest.mark.quick
@pytest.mark.parametrize("stop", [KeyboardInterrupt(), KeyboardInterrupt(signal.SIGTERM)])
def test_a_signal_after_training_says_how_to_go_on(stop, capsys, monkeypatch, tmp_path):
    def run(options, lora, out):
        raise stop

    monkeypatch.setattr(finetune_command, "_finetune", run)
    number = stop.args[0] if stop.args else signal.SIGINT
    assert main(["finetune", "--out", str(tmp_path)]) == 128 + number
    assert "To go on" not in capsys.readouterr().err  # nothing is there yet
    (tmp_path / "config.json").write_text("{}")
    assert main(["finetune", "--out", str(tmp_path)]) == 128 + number
    assert f"To go on: edgejax finetune --resume --out {tmp_path}" in capsys.readouterr().err


# Streams


@pytest.mark.quick
@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&- <&-"])
def test_closed_streams_do_not_get_into_files(closed, tmp_path):
    """The number of a closed stream would be the next file's, and what C code prints would end up in there."""
    out = tmp_path / "out"
    done = python(
        command_that(
            f"file = open({str(out)!r}, 'w')\nos.write(1, b'from C')\nos.write(2, b'from C')\n"
            "print('shown')\nprint('shown', file=sys.stderr)\nfile.write('mine')\nfile.close()"
        ),
        shell=closed,
    )
    assert done.returncode == 0
    assert out.read_text() == "mine"


@pytest.mark.quick
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_output_that_cannot_be_written():
    done = python(command_that("print('x')"), shell=">/dev/full")
    assert (done.returncode, done.stderr.splitlines()[1:]) == (2, [])
    assert done.stderr.startswith("edgejax models: input or output: No space left on device")
    assert python(command_that("raise OSError(5, 'broken', 'a/path')"), shell="2>/dev/full").returncode == 2


@pytest.mark.quick
def test_letters_that_the_terminal_lacks():
    done = python(command_that("print('caf\\xe9')"), env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\xe9\n", "")


def test_a_prompt_from_a_stream_that_is_no_text(folder):
    arguments = ["generate", "--model", str(folder / "model"), "--prompt", "-"]
    done = python(PROGRAM, *arguments, shell="<&-")
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input is closed; give the text with --prompt TEXT" in done.stderr
    (folder / "bytes").write_bytes(b"\xff\xfe")
    strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
    done = python(PROGRAM, *arguments, shell=f"<{folder / 'bytes'}", env=strict)
    assert (done.returncode, done.stdout) == (2, "")
    assert "standard input is not UTF-8" in done.stderr


# Disks


@contextlib.contextmanager
def mounted(place: Path, size: str):
    """A file system of that size in memory; skips where none may be mounted."""
    place.mkdir()
    try:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True, check=False
        )
    except OSError as error:
        pytest.skip(f"needs mount: {error}")
    if done.returncode:
        pytest.skip("needs the right to mount a file system (root in a container may lack it)")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.fixture
def adapter(folder, tmp_path):
    """An adapter in PEFT's format, untrained."""
    import jax

    from edgejax.models import LoraConfig, init_lora
    from edgejax.weights import load_model
    from edgejax.weights.export_peft import export_peft

    config, lora = load_model(folder / "model").config, LoraConfig(rank=8)
    return export_peft(
        init_lora(config, lora, jax.random.key(0)), lora, config, tmp_path / "adapter", base_name="tiny"
    )


def exports(folder, adapter, out: Path) -> list[list[str]]:
    """A command for each format."""
    gguf = folder / "model.gguf"
    if not gguf.exists():
        write_gguf(gguf, tiny("llama"), gguf_tensors(tiny("llama")))
    ours, lora = ["--model", str(folder / "model")], ["--adapter", str(adapter)]
    return [
        ["export", *ours, *lora, "--format", "peft", "--out", str(out / "peft")],
        ["export", *ours, *lora, "--format", "lora-gguf", "--out", str(out / "lora.gguf")],
        ["export", *ours, "--format", "merged-safetensors", "--out", str(out / "model")],
        ["export", "--model", str(gguf), "--format", "merged-gguf-f16", "--out", str(out / "model.gguf")],
    ]


def finetune(folder, out: Path) -> list[str]:
    data = ["--model", str(folder / "model"), "--data", str(folder / "text.jsonl")]
    return ["finetune", *data, *SMALL, "--out", str(out)]


def test_a_disk_without_space(folder, adapter, tmp_path, capsys):
    with mounted(tmp_path / "disk", "16k") as disk:
        for command in exports(folder, adapter, disk):
            assert main(command) == 2
            assert "no space left while writing" in capsys.readouterr().err
            assert os.listdir(disk) == []
        assert main(finetune(folder, disk / "run")) == 2
        assert "2 kept checkpoints and the one being written need" in capsys.readouterr().err


def test_a_disk_that_fills_during_the_run(folder, tmp_path):
    """One message without a word of Orbax's; the checkpoints before stay, and with space again the run goes on."""
    with mounted(tmp_path / "disk", "4m") as disk:
        out, filler = disk / "run", disk / "filler"
        often = ["--steps", "2000", "--checkpoint-every", "5"]
        command = [sys.executable, "-c", PROGRAM, *finetune(folder, out), *often]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as child:
            while child.poll() is None:
                if any(path.name.isdigit() for path in (out / "checkpoints").glob("*")):
                    with contextlib.suppress(OSError), open(filler, "ab", buffering=0) as file:
                        file.write(bytes(2**16))
                time.sleep(0.002)
            err = child.stderr.read()
        assert child.returncode == 2
        assert err.startswith("edgejax finetune: ")
        assert "No space left on device" in err
        assert len(err.splitlines()) == 1
        kept = [int(name) for name in os.listdir(out / "checkpoints") if name.isdigit()]
        assert max(kept) >= 5
        filler.unlink()
        rest = ["--checkpoint-every", "1000", "--quiet", "--out", str(out)]
        done = python(PROGRAM, "finetune", "--resume", *rest)
        assert (done.returncode, done.stderr) == (0, "")
        assert (out / "adapter" / "adapter_model.safetensors").exists()


def test_a_disk_that_is_read_only(folder, adapter, tmp_path, capsys):
    with mounted(tmp_path / "disk", "1m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        for command in [*exports(folder, adapter, disk), finetune(folder, disk / "run")]:
            assert main(command) == 2
            assert "Read-only file system" in capsys.readouterr().err
        assert os.listdir(disk) == []
