"""Is the forecast of a run's memory true? Many settings, each forecast and then run in a fresh process.

    python experiments/memory_forecast/measure.py            about 30 minutes; goes on where it was stopped

For each setting ``edgejax finetune --dry-run`` forecasts, from an empty compile cache, and ``edgejax finetune`` then runs with
the programs that it kept: its peak is ``ru_maxrss`` (Linux' VmHWM). With ``--limit`` the run is in a control group that has the
forecast and 3% more, where the kernel ends a process that exceeds it. Rows go to ``runs.jsonl`` in the work folder;
``analyse.py`` makes a result of them.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from control_group import control_group

ROOT = Path(__file__).resolve().parents[2]
COMMON = ("--steps", "3", "--eval-rows", "2", "--sample-tokens", "8")
MARGIN = 1.03

LORA = {"base": "int4"}
STREAMED = {"base": "int4", "schedule": "streamed"}
FULL = {"mode": "full", "base": "bf16", "schedule": "layerwise", "optimizer": "adamw4bit"}
SETTINGS: list[dict[str, Any]] = [
    {"model": "smollm2-135m", "seq": seq, **LORA, **kept}
    for seq in (128, 512, 1024)
    for kept in ({"remat": "none"}, {"remat": "full"}, {"remat": "mlp", "boundaries": "bf16"})
] + [
    {"model": "smollm2-135m", "seq": 512, **LORA, "remat": "full", "boundaries": "int8"},
    {"model": "smollm2-135m", "seq": 512, **LORA, "remat": "full", "small-code": True},
    {"model": "smollm2-135m", "seq": 256, **LORA, "remat": "none", "small-code": True},
    {"model": "smollm2-135m", "seq": 256, **LORA, "remat": "full", "batch": 4},
    {"model": "smollm2-135m", "seq": 256, **LORA, "remat": "full", "batch": 2, "accumulate": 2},
    {"model": "smollm2-135m", "seq": 2048, **LORA, "remat": "full", "boundaries": "bf16"},
    {"model": "smollm2-135m", "seq": 512, "base": "int8", "remat": "full"},
    {"model": "smollm2-135m", "seq": 512, "base": "f32", "remat": "full"},
    {"model": "smollm2-135m", "seq": 512, **STREAMED, "boundaries": "int8"},
    {"model": "smollm2-135m", "seq": 256, **STREAMED},
    {"model": "smollm2-135m", "seq": 256, **FULL},
    {"model": "smollm2-135m", "seq": 512, **FULL, "optimizer": "adamw8bit"},
    {"model": "smollm2-135m", "seq": 256, "mode": "full", "base": "f32", "remat": "full"},
    {"model": "smollm2-360m", "seq": 256, **LORA, "remat": "full"},
    {"model": "smollm2-360m", "seq": 512, **LORA, "remat": "mlp", "boundaries": "bf16"},
    {"model": "smollm2-360m", "seq": 128, **LORA, "remat": "none"},
    {"model": "smollm2-360m", "seq": 256, **STREAMED, "boundaries": "bf16"},
    {"model": "smollm2-360m", "seq": 256, **FULL},
    {"model": "qwen2.5-0.5b", "seq": 256, **LORA, "remat": "full"},
    {"model": "qwen2.5-0.5b", "seq": 512, **LORA, "remat": "full", "boundaries": "bf16"},
    {"model": "qwen2.5-0.5b", "seq": 128, **FULL},
]  # fmt: skip


def model_file(name: str, base: str, work: Path) -> str:
    """A packed file of random weights in a model's shape, with SmolLM2's tokenizer."""
    file = work / "models" / f"{name}-{base}.ejx"
    if not file.exists():
        from edgejax.models.shapes import find_shape
        from edgejax.weights import open_model
        from edgejax.weights.packed_layout import Origin
        from edgejax.weights.packed_write import write_packed
        from edgejax.weights.random import RandomSource

        file.parent.mkdir(parents=True, exist_ok=True)
        origin = Origin(name=name, format="random", sha256="", base=base)
        tokenizer = open_model("smollm2-135m").tokenizer
        write_packed(file, RandomSource(find_shape(name), 0), origin=origin, base=base, tokenizer=tokenizer)
    return str(file)


def words_of(setting: dict[str, Any], work: Path) -> list[str]:
    """Arguments of ``edgejax finetune``; of SmolLM2-135M the real file, but for streamed runs, which need a packed one."""
    options = dict(setting)
    if setting["model"] != "smollm2-135m" or setting.get("schedule") == "streamed":
        options["model"] = model_file(setting["model"], setting["base"], work)
    words = [
        w for name, v in options.items() for w in ((f"--{name}",) if v is True else (f"--{name}", str(v)))
    ]
    return [sys.executable, "-m", "edgejax", "finetune", *words, *COMMON]


def measure(setting: dict[str, Any], work: Path, *, limited: bool) -> dict[str, Any]:
    """A row: the forecast, and the run's peak and phases."""
    environment = (
        os.environ
        | {
            "JAX_COMPILATION_CACHE_DIR": str(work / "cache"),
            "GLIBC_TUNABLES": "glibc.malloc.hugetlb=0",  # as with --memory, which this does not use: it would choose settings
        }
    )
    shutil.rmtree(work / "cache", ignore_errors=True)
    shutil.rmtree(work / "run", ignore_errors=True)
    command = words_of(setting, work)
    forecast = subprocess.run(
        [*command, "--dry-run", "--json", "--quiet"], env=environment, check=True, stdout=subprocess.PIPE
    )
    footprint = json.loads(forecast.stdout)["footprint"]
    limit = round(MARGIN * footprint["running_bytes"]) if limited else None
    started = time.perf_counter()
    with control_group(limit) as enter:
        process = subprocess.Popen(
            [*command, "--out", str(work / "run"), "--quiet"], env=environment, preexec_fn=enter, stdout=subprocess.DEVNULL
        )  # fmt: skip
        _, status, usage = os.wait4(process.pid, 0)
    row = {
        "setting": setting,
        "forecast": footprint,
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "limit_bytes": limit,
        "exit_status": os.waitstatus_to_exitcode(status),
        "seconds": time.perf_counter() - started,
    }
    if row["exit_status"] == 0:
        row |= {"memory": json.loads((work / "run" / "result.json").read_text())["memory"]}
    return row


def main() -> None:
    """All settings that are not in the work folder yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "memory_forecast")
    parser.add_argument(
        "--limit", action="store_true", help="run each in a control group of the forecast and 3% more"
    )
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "runs.jsonl"
    done = [json.loads(line)["setting"] for line in path.read_text().splitlines()] if path.exists() else []
    for setting in SETTINGS:
        if setting in done:
            continue
        row = measure(setting, args.work, limited=args.limit)
        with path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        forecast, peak = row["forecast"]["running_bytes"], row["peak_rss_bytes"]
        print(
            f"{setting}: forecast {forecast / 1e6:.0f} MB, was {peak / 1e6:.0f} ({100 * (peak / forecast - 1):+.1f}%), "
            f"exit {row['exit_status']}", flush=True,
        )  # fmt: skip


if __name__ == "__main__":
    main()
