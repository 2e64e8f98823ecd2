"""How much less memory does a step take than the usual one, on a card? The question and the cases are in README.md.

python experiments/card_memory/measure.py       about 10 minutes; needs `make gpu-aot`, no GPU
python experiments/card_memory/render.py        the table, into README.md
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from edgejax.core.errors import RunError
from edgejax.core.units import format_bytes
from edgejax.devices import find_device
from edgejax.measure.record import make_record, write_record
from edgejax.plan import plan_for_card
from edgejax.plan.card import compiling_environment, find_plugin
from edgejax.plan.cuda_target import target_config

HERE = Path(__file__).resolve().parent
CARD, RANK = "rtx3060", 8
CASES = (
    {"model": "llama-3.2-1b", "mode": "lora", "seq": 1024},
    {"model": "gemma-3-1b", "mode": "lora", "seq": 1024},
    {"model": "smollm2-135m", "mode": "lora", "seq": 1024},
    {"model": "llama-3.2-1b", "mode": "full", "seq": 1024},
)


def baseline_bytes(requests: list[dict[str, Any]]) -> list[int]:
    """Peak of each usual step, compiled in a process of their own."""
    done = subprocess.run(
        [sys.executable, str(HERE / "baseline.py")], input=json.dumps(requests), text=True, capture_output=True,
        env=compiling_environment(), check=False,
    )  # fmt: skip
    if done.returncode:
        raise RunError(f"the baseline {requests} could not be compiled: {done.stderr.splitlines()[-1:]}")
    answers = [json.loads(line)["peak_bytes"] for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(answers) == len(requests)
    return answers


def measure(case: dict[str, Any]) -> dict[str, Any]:
    """A case: our settings on the card, and the usual step in both types."""
    note = lambda text: print(f"{case['model']} {case['mode']}: {text}", flush=True)  # noqa: E731
    card = find_device(CARD)
    plan = plan_for_card(card, case["model"], mode=case["mode"], seq=case["seq"], rank=RANK, note=note)
    dtypes = ("float32", "bfloat16")
    asked = [case | {"card": card.name, "dtype": dtype, "rank": RANK, "batch": 1} for dtype in dtypes]
    baselines = dict(zip(dtypes, baseline_bytes(asked), strict=True))
    for dtype, size in baselines.items():
        note(f"the usual step in {dtype}: {format_bytes(size)}")
    options = [option.to_json() for option in plan.options]
    return case | {"options": options, "failed": plan.failed, "baseline_peak_bytes": baselines}


def main() -> None:
    """All cases, then one result file, which is never overwritten."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    card, plugin = find_device(CARD), find_plugin()
    config = {
        "card": dataclasses.asdict(card),
        "target_config": target_config(card),
        "plugin": plugin,
        "rank": RANK,
    }
    record = make_record("card_memory", config=config, results={"cases": [measure(case) for case in CASES]})
    print(write_record(HERE / "results" / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))


if __name__ == "__main__":
    main()
