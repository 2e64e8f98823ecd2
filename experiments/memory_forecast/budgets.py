"""Does ``edgejax finetune --memory`` keep its word, and use what it is given?

    python experiments/memory_forecast/budgets.py            about 12 minutes; as root, for the control groups

SmolLM2-135M, LoRA, rows of 512 positions, for several amounts, each from an empty cache of programs and of packed files. The
command and all its processes are in a control group of that amount, where the kernel ends what exceeds it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from control_group import control_group

from edgejax.core.cache import cache_dir
from edgejax.devices import parse_budget
from edgejax.measure.record import make_record, write_record

HERE = Path(__file__).resolve().parent
AMOUNTS = ("450MB", "600MB", "1GB", "2GB")
WORDS = ("--model", "smollm2-135m", "--seq", "512", "--steps", "6", "--eval-rows", "4")


def measure(amount: str) -> dict[str, Any]:
    """A command under its limit: what it chose, and the most that any of its processes had."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copytree(cache_dir() / "models", folder / "cache" / "models")
        environment = os.environ | {
            "EDGEJAX_CACHE": str(folder / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(folder / "xla"),
        }
        command = [sys.executable, "-m", "edgejax", "finetune", *WORDS, "--memory", amount]
        started = time.perf_counter()
        with control_group(parse_budget(amount)) as enter, open(folder / "said", "w+") as said:
            process = subprocess.Popen(
                [*command, "--out", str(folder / "run")], env=environment, preexec_fn=enter, stdout=said, stderr=said
            )  # fmt: skip
            _, status, usage = os.wait4(process.pid, 0)
            said.seek(0)
            lines = said.read().replace(str(folder), "FOLDER").splitlines()
        row = {
            "amount": amount,
            "exit_status": os.waitstatus_to_exitcode(status),
            "largest_process_bytes": usage.ru_maxrss * 1024,  # of all, those that compiled included
            "tried": [line.strip() for line in lines if line.startswith(("->", " x"))],
            "seconds": time.perf_counter() - started,
        }
        if row["exit_status"]:
            return row | {"said": lines[-5:]}
        result = json.loads((folder / "run" / "result.json").read_text())
        config = json.loads((folder / "run" / "config.json").read_text())
        return row | {
            "peak_rss_bytes": result["memory"]["peak_rss_bytes"],
            "tokens_per_s": result["tokens_per_s_median"],
            "settings": config["settings"],
        }


def main() -> None:
    """One result file, which is never overwritten."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    rows = []
    for amount in AMOUNTS:
        rows.append(measure(amount))
        print({name: value for name, value in rows[-1].items() if name != "settings"}, flush=True)
    record = make_record("memory_budgets", config={"words": WORDS}, results={"rows": rows})
    print(write_record(HERE / "budgets" / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))


if __name__ == "__main__":
    main()
