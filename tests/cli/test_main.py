"""The program's frame: fast help, exit codes, one message for an error."""

import os
import subprocess
import sys
import types

import pytest

import edgejax
from edgejax.cli import main as program
from edgejax.core.errors import ConfigError, Interrupted, NonFiniteLossError

pytestmark = pytest.mark.quick


def run_python(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("arguments", [["--help"], *([name, "--help"] for name in program.COMMANDS)])
def test_help_works_without_jax(arguments):
    code = (
        "import sys\nfrom edgejax.cli.main import main\n"
        f"code = main({arguments!r})\n"
        "heavy = sorted({'jax', 'flax', 'optax', 'orbax', 'torch', 'gguf', 'tokenizers'} & set(sys.modules))\n"
        "sys.exit(code or (str(heavy) if heavy else 0))"
    )
    done = run_python("-c", code)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: edgejax")


def test_help_takes_less_time_than_jax_would():
    def cpu_s(*args: str) -> float:
        before = os.times()
        assert run_python(*args).returncode == 0
        after = os.times()
        return after.children_user + after.children_system - before.children_user - before.children_system

    # Three tries, the best counts: another process may be busy. Python itself is not ours to speed up.
    ours = min(cpu_s("-m", "edgejax", "--help") - cpu_s("-c", "") for _ in range(3))
    assert ours < 0.3


def test_version_and_module_name():
    done = run_python("-m", "edgejax", "--version")
    assert (done.returncode, done.stdout) == (0, f"edgejax {edgejax.__version__}\n")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["no-such-command"],
        ["generate", "--no-such-flag"],
        ["finetune", "--rank", "eight"],
        ["finetune", "--steps", "3", "--epochs", "1"],
        ["finetune", "--base", "int3"],
        ["finetune", "--optimizer-option", "b2"],
        ["generate", "--max-tok", "3"],  # no abbreviations: they would change meaning when options are added
    ],
)
def test_wrong_usage_exits_2(arguments, capsys):
    assert program.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "usage: edgejax" in captured.err


@pytest.fixture
def command(monkeypatch):
    """Puts a command in place of ``models`` that raises (or returns) what it is given."""

    def put(outcome):
        def run(args):
            if isinstance(outcome, BaseException):
                raise outcome
            return outcome

        module = types.SimpleNamespace(add_arguments=lambda parser: None, run=run)
        monkeypatch.setitem(sys.modules, "edgejax.cli.models", module)

    return put


@pytest.mark.parametrize(
    ("outcome", "code", "message"),
    [
        (0, 0, ""),
        (1, 1, ""),
        (ConfigError("rank 0 is too small; use 1 or more"), 2, "rank 0 is too small; use 1 or more\n"),
        (NonFiniteLossError("step 7"), 3, "step 7\n"),
        (Interrupted("saved at step 7", 15), 143, "saved at step 7\n"),
        (Interrupted("saved at step 7", 2), 130, "saved at step 7\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (KeyboardInterrupt(15), 143, "interrupted by SIGTERM\n"),
        (
            PermissionError(13, "Permission denied", "/srv/x"),
            2,
            "/srv/x: Permission denied; check the path, its permissions and the free space\n",
        ),
        (
            MemoryError("Unable to allocate 7 TiB"),
            2,
            "not enough memory: Unable to allocate 7 TiB; use fewer or shorter rows, a lower rank, fewer tokens, a "
            "smaller model, or --base int4\n",
        ),
        (
            RuntimeError("INTERNAL: Out of memory allocating 9 bytes.\nmore"),
            2,
            "not enough memory: INTERNAL: Out of memory allocating 9 bytes.; use fewer or shorter rows, a lower rank, "
            "fewer tokens, a smaller model, or --base int4\n",
        ),
    ],
)
def test_outcomes_become_exit_codes(command, outcome, code, message, capsys):
    command(outcome)
    assert program.main(["models"]) == code
    captured = capsys.readouterr()
    assert captured.err == (f"edgejax models: {message}" if message else "")
    assert captured.out == ""


@pytest.mark.parametrize("fault", [ZeroDivisionError, RuntimeError])
def test_a_fault_of_ours_keeps_its_traceback(command, fault):
    command(fault("a fault"))
    with pytest.raises(fault):
        program.main(["models"])


def test_a_reader_that_goes_away_is_no_error():
    """``edgejax models | head -c 1`` ends quietly."""
    code = (
        "import sys, types\n"
        "module = types.SimpleNamespace(add_arguments=lambda p: None, run=lambda a: print('x' * 1000000) or 0)\n"
        "sys.modules['edgejax.cli.models'] = module\n"
        "from edgejax.cli.main import main\nsys.exit(main(['models']))"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as child:
        child.stdout.read(1)
        child.stdout.close()
        assert child.stderr.read() == b""
        assert child.wait() == 141


@pytest.mark.parametrize(
    ("command", "environment", "expected"),
    [
        ("finetune --seq 8", {"SET": "1"}, True),
        ("finetune --seq 8", None, False),  # it is set already, or would change nothing
        ("finetune --memory 1GB", {"SET": "1"}, False),  # where each byte counts
        ("finetune --dry-run", {"SET": "1"}, False),
        ("generate --seq 8", {"SET": "1"}, False),
    ],
)
def test_training_restarts_itself_for_huge_pages(command, environment, expected, monkeypatch):
    words = command.split()
    calls = []
    monkeypatch.setattr(program, "huge_pages_environment", lambda current: environment)
    monkeypatch.setattr(program.os, "execve", lambda *call: calls.append(call))
    monkeypatch.setattr(sys, "argv", ["edgejax", *words])
    monkeypatch.setattr(sys, "orig_argv", ["python3", "-m", "edgejax", *words])
    program._restart_with_huge_pages()
    whole = [sys.executable, "-m", "edgejax", *words]
    assert calls == ([(sys.executable, whole, environment)] if expected else [])


def test_a_restart_that_the_system_refuses_is_no_error(monkeypatch):
    def refuse(*call):
        raise PermissionError("no")

    monkeypatch.setattr(program, "huge_pages_environment", lambda current: {"SET": "1"})
    monkeypatch.setattr(program.os, "execve", refuse)
    monkeypatch.setattr(sys, "argv", ["edgejax", "finetune"])
    program._restart_with_huge_pages()


def test_a_restarted_program_runs_as_it_was_called():
    done = run_python("-m", "edgejax", "finetune", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: edgejax finetune")
