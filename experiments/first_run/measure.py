"""What the README says of one machine: a fine-tuning run from start to end, and the training step by itself.

    python experiments/first_run/measure.py            about 14 minutes on two cores; nothing else may run
    python experiments/first_run/render.py             writes the newest result into README.md

Each measurement is a process of its own; those whose speeds are compared run in turns. The result file is never
overwritten.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from edgejax.measure.record import make_record, write_record

RESULTS = Path(__file__).parent / "results"
STEP = [
    "--model",
    "smollm2-135m",
    "--mode",
    "lora",
    "--rank",
    "8",
    "--batch",
    "1",
    "--seq",
    "512",
    "--base",
    "int4",
]
FINETUNE = ["--seq", "512", "--batch", "1", "--rank", "8", "--steps", "32", "--learning-rate", "5e-4"]
COMPARED = {
    "no_remat": ["--remat", "none"],
    "remat": ["--remat", "full"],
    "remat_kept": ["--remat", "mlp", "--boundaries", "bf16"],
}
ROUNDS = 2
WITH_CACHE = {
    "remat_fill_cache": ["--remat", "full", "--compile-cache"],
    "remat_warm": ["--remat", "full", "--compile-cache"],
}


def edgejax(*arguments: str) -> dict[str, Any]:
    """The last line of a command's output, which is one JSON object."""
    command = [sys.executable, "-m", "edgejax", *arguments, "--json"]
    print(" ".join(command[2:]), file=sys.stderr, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure everything and write one record."""
    rounds = [{name: edgejax("bench", *STEP, *how) for name, how in COMPARED.items()} for _ in range(ROUNDS)]
    results: dict[str, Any] = {name: [found[name] for found in rounds] for name in COMPARED}
    results |= {name: edgejax("bench", *STEP, *how) for name, how in WITH_CACHE.items()}
    del results["remat_fill_cache"]
    with tempfile.TemporaryDirectory() as folder:
        run = ["--data", "python-reference", *FINETUNE, "--out", f"{folder}/run", "--quiet"]
        results["finetune"] = edgejax("finetune", *run)
    for name in ("run_dir", "report", "trained"):  # of a folder that is gone
        results["finetune"].pop(name, None)
    record = make_record(
        "first_run",
        config={"step": STEP, "finetune": FINETUNE, "benches": COMPARED | WITH_CACHE},
        results=results,
    )
    print(write_record(RESULTS / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))


if __name__ == "__main__":
    main()
