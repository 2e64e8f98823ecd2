"""Runs that are killed again and again: forks a tiny run, sends it a signal at a random moment, resumes it.

    python -m helpers.crash_driver kill FOLDER N_KILLS SEED     SIGKILL at random moments until done
    python -m helpers.crash_driver signals FOLDER               SIGINT, SIGTERM, and the second signal
    python -m helpers.crash_driver optimizers FOLDER NAME ...   SIGKILL in a run of all parameters with each of them

Everything is imported once and no back end is started before forking, so that a run begins in a moment. Prints one
JSON object.
"""

import contextlib
import functools
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import orbax.checkpoint  # noqa: F401  imported once for all children

import edgejax  # noqa: F401  first: the numerics guard
from edgejax.core.errors import EdgejaxError
from edgejax.train import SilentProgress, finetune, is_run_folder, read_metrics, tree_sha256
from helpers.tiny_run import CONFIG, LORA, WIDER, make_model, make_rows, make_settings

STEPS = 360
PAUSE_S = 0.01  # a step of the tiny model takes a millisecond: too short to be hit


def child(
    folder: Path, hook: Callable = lambda figures: time.sleep(PAUSE_S), lora=LORA, config=CONFIG, **changes
) -> int:
    """Forks a process that runs to the end and leaves the hash of what it trained; returns its id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with contextlib.suppress(BaseException), open(folder.with_suffix(".log"), "a") as log:
        os.dup2(log.fileno(), 2)
        try:
            # An evaluation at the end only, and a checkpoint every third step: half of the time is spent saving.
            settings = make_settings(**{"steps": STEPS, "checkpoint_every": 3, "eval_every": None, **changes})
            result = finetune(
                make_model(config=config), make_rows(), make_rows(1, 5), settings, lora=lora, out_dir=folder,
                resume=is_run_folder(folder), progress=SilentProgress(), hooks=[hook],
            )  # fmt: skip
            (folder / "trained.txt").write_text(tree_sha256(result.trainable))
            code = 0
        except EdgejaxError as error:
            (folder.parent / "error.txt").write_text(str(error))
            code = error.exit_code
        except BaseException as error:
            print(repr(error), file=log)
    os._exit(code)


def wait(pid: int) -> int:
    """Exit code of a child, as a shell would say it."""
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return status if status >= 0 else 128 - status


def has_trained(folder: Path, step: int) -> bool:
    """Whether the log of a run has that step."""
    with contextlib.suppress(OSError, EdgejaxError):
        return any(r["kind"] == "train" and r["step"] >= step for r in read_metrics(folder / "metrics.jsonl"))
    return False


def wait_until(pid: int, folder: Path, condition: Callable[[], bool]) -> None:
    """Waits for something a living run does."""
    while not condition():
        assert os.waitpid(pid, os.WNOHANG) == (0, 0), folder.with_suffix(".log").read_text()
        time.sleep(0.005)


def newest_checkpoint(folder: Path) -> int:
    checkpoints = folder / "checkpoints"
    return max((int(p.name) for p in checkpoints.glob("*") if p.name.isdigit()), default=0)


def kill_again_and_again(root: Path, n_kills: int, seed: int) -> dict:
    whole, broken, stepped = root / "whole", root / "broken", root / "stepped"
    started = time.monotonic()
    pid = child(whole, hook=lambda figures: None, checkpoint_every=STEPS)
    wait_until(pid, whole, functools.partial(has_trained, whole, 1))
    startup_s = time.monotonic() - started
    assert wait(pid) == 0, whole.with_suffix(".log").read_text()
    chance = random.Random(seed)

    def hook(figures) -> None:
        stepped.touch()
        time.sleep(PAUSE_S)

    def is_time(kind: int, before: int, patience: float) -> bool:
        if kind == 0:  # while it starts
            return stepped.exists() or time.monotonic() > patience
        if kind == 2:  # soon after a step: often while the next checkpoint is written
            return stepped.exists()
        return newest_checkpoint(broken) > before  # soon after a checkpoint: while an old one is removed

    kills: list[dict] = []
    while len(kills) < n_kills:
        stepped.unlink(missing_ok=True)
        before, kind = newest_checkpoint(broken), len(kills) % 4
        pid = child(broken, hook=hook)
        wait_until(
            pid,
            broken,
            functools.partial(is_time, kind, before, time.monotonic() + chance.uniform(0, startup_s)),
        )
        if kind:
            time.sleep(chance.uniform(0, 0.3))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == 128 + signal.SIGKILL, broken.with_suffix(".log").read_text()
        unfinished = len(list(broken.glob("checkpoints/*tmp*")))
        kills.append({"kind": kind, "step": newest_checkpoint(broken), "unfinished": unfinished})
    code = wait(child(broken, hook=lambda figures: None, checkpoint_every=STEPS))
    assert code == 0, broken.with_suffix(".log").read_text()
    return {"kills": kills, "startup_s": startup_s}


def signals(root: Path) -> dict:
    whole = root / "whole"
    assert wait(child(whole, hook=lambda figures: None, checkpoint_every=STEPS)) == 0
    codes = {}
    for number in (signal.SIGINT, signal.SIGTERM):
        folder = root / number.name
        pid = child(folder, checkpoint_every=STEPS)
        wait_until(pid, folder, functools.partial(has_trained, folder, 5))
        os.kill(pid, number)
        codes[number.name] = {"code": wait(pid), "error": (root / "error.txt").read_text()}
        codes[number.name]["saved"] = newest_checkpoint(folder)
        codes[number.name]["resumed"] = wait(child(folder, hook=lambda figures: None, checkpoint_every=STEPS))
    folder = root / "second"
    pid = child(folder, hook=block_in_c, checkpoint_every=STEPS)
    wait_until(pid, folder, functools.partial(has_trained, folder, 1))
    time.sleep(0.1)
    os.kill(pid, signal.SIGINT)
    time.sleep(0.2)
    alive = os.waitpid(pid, os.WNOHANG) == (0, 0)
    started = time.monotonic()
    os.kill(pid, signal.SIGINT)
    codes["second"] = {"alive_after_first": alive, "code": wait(pid), "seconds": time.monotonic() - started}
    return codes


def kill_each(root: Path, names: list[str]) -> dict:
    """For each ``optimizer`` or ``optimizer/schedule``: the steps of the checkpoints at the kill, in bfloat16 weights."""
    found = {}
    for name in names:
        optimizer, _, schedule = name.partition("/")
        run = functools.partial(
            child, lora=None, config=WIDER, steps=12, bfloat16=True, optimizer=optimizer,
            schedule=schedule or "whole", remat="full", lr_schedule="constant", warmup=0,
        )  # fmt: skip
        whole, broken = (root / f"{optimizer}-{schedule}-{what}" for what in ("whole", "broken"))
        assert wait(run(whole, hook=lambda figures: None)) == 0, whole.with_suffix(".log").read_text()
        pid = run(broken, hook=lambda figures: time.sleep(0.1))
        wait_until(pid, broken, functools.partial(has_trained, broken, 7))
        os.kill(pid, signal.SIGKILL)
        assert wait(pid) == 128 + signal.SIGKILL
        found[name] = newest_checkpoint(broken)
        code = wait(run(broken, hook=lambda figures: None))
        assert code == 0, broken.with_suffix(".log").read_text()
    return found


def block_in_c(figures) -> None:
    """Waits in a system call that signals do not end, where Python runs no handlers: like a long compiled step."""
    import ctypes

    signal.siginterrupt(signal.SIGINT, False)
    reader, _ = os.pipe()
    ctypes.CDLL(None).read(reader, ctypes.create_string_buffer(1), 1)


if __name__ == "__main__":
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    what, root = sys.argv[1], Path(sys.argv[2])
    if what == "signals":
        out = signals(root)
    elif what == "optimizers":
        out = kill_each(root, sys.argv[3:])
    else:
        out = kill_again_and_again(root, int(sys.argv[3]), int(sys.argv[4]))
    print(json.dumps(out))
