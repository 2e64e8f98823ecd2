"""What `edgejax finetune` takes at its most, beside XLA's buffer assignment of its step, for many settings.

    python experiments/memory_forecast/measure.py            about 40 minutes; goes on where it was stopped

Each setting is run twice in fresh processes, the first time from an empty compile cache. A line of ``runs.jsonl`` in the work
folder holds both: the peaks of the whole process (``ru_maxrss``, Linux' VmHWM), and those of its phases.
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

ROOT = Path(__file__).resolve().parents[2]
STEPS, SAMPLE_TOKENS, EVAL_ROWS = "3", "8", "2"

LORA = {"base": "int4"}
FULL = {"mode": "full", "base": "bf16", "schedule": "layerwise", "optimizer": "adamw4bit"}
SETTINGS: list[dict[str, Any]] = [
    {"model": "smollm2-135m", "seq": seq, **LORA, **kept}
    for seq in (128, 256, 512, 1024)
    for kept in ({"remat": "none"}, {"remat": "full"}, {"remat": "mlp", "boundaries": "bf16"})
] + [
    {"model": "smollm2-135m", "seq": 512, **LORA, "remat": "full", "boundaries": "int8"},
    {"model": "smollm2-135m", "seq": 256, **LORA, "remat": "full", "batch": 4},
    {"model": "smollm2-135m", "seq": 256, **LORA, "remat": "full", "batch": 2, "accumulate": 2},
    {"model": "smollm2-135m", "seq": 2048, **LORA, "remat": "full", "boundaries": "bf16"},
    {"model": "smollm2-135m", "seq": 512, "base": "int8", "remat": "full"},
    {"model": "smollm2-135m", "seq": 512, "base": "f32", "remat": "full"},
    {"model": "smollm2-135m", "seq": 256, **FULL},
    {"model": "smollm2-135m", "seq": 512, **FULL, "optimizer": "adamw8bit"},
    {"model": "smollm2-135m", "seq": 256, "mode": "full", "base": "f32", "remat": "full"},
    {"model": "smollm2-360m", "seq": 256, **LORA, "remat": "full"},
    {"model": "smollm2-360m", "seq": 512, **LORA, "remat": "mlp", "boundaries": "bf16"},
    {"model": "smollm2-360m", "seq": 128, **LORA, "remat": "none"},
    {"model": "smollm2-360m", "seq": 256, **FULL},
    {"model": "qwen2.5-0.5b", "seq": 256, **LORA, "remat": "full"},
    {"model": "qwen2.5-0.5b", "seq": 512, **LORA, "remat": "full", "boundaries": "bf16"},
    {"model": "qwen2.5-0.5b", "seq": 128, **FULL},
]  # fmt: skip


def model_path(name: str, work: Path) -> str:
    """A preset by its name; of another shape a Hugging Face folder with random weights and SmolLM2's tokenizer."""
    if name == "smollm2-135m":
        return name
    folder = work / "models" / name
    if not (folder / "config.json").exists():
        from edgejax.models.shapes import find_shape
        from edgejax.weights.export import export
        from edgejax.weights.load import LoadedModel, ModelSource, load_params, open_model
        from edgejax.weights.random import RandomSource

        config = find_shape(name)
        params = load_params(RandomSource(config, 0), "bf16", [])
        source = ModelSource(name, str(folder), "huggingface", "", "bf16")
        model = LoadedModel(config, params, open_model("smollm2-135m").tokenizer, source)
        export(model, folder, format="merged-safetensors", overwrite=True)
    return str(folder)


def run(setting: dict[str, Any], work: Path) -> dict[str, Any]:
    """One fresh process: the peak of all of it, and what it says of its phases."""
    out = work / "run"
    shutil.rmtree(out, ignore_errors=True)
    options = {"model": model_path(setting["model"], work)} | {
        k: v for k, v in setting.items() if k != "model"
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [
        sys.executable, "-m", "edgejax", "finetune", *words, "--steps", STEPS, "--eval-rows", EVAL_ROWS,
        "--sample-tokens", SAMPLE_TOKENS, "--out", str(out), "--quiet",
    ]  # fmt: skip
    started = time.perf_counter()
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(work / "cache")}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{' '.join(command)} ended with {status}")
    result = json.loads((out / "result.json").read_text())
    return {
        "peak_rss_bytes": usage.ru_maxrss * 1024,
        "seconds": time.perf_counter() - started,
        "memory": result["memory"],
        "receipt": result["receipt"],
    }


def main() -> None:
    """All settings that are not in the work folder yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "memory_forecast")
    work = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    path = work / "runs.jsonl"
    done = [json.loads(line)["setting"] for line in path.read_text().splitlines()] if path.exists() else []
    for setting in SETTINGS:
        if setting in done:
            continue
        shutil.rmtree(work / "cache", ignore_errors=True)
        model_path(setting["model"], work)
        row = {"setting": setting, "cold": run(setting, work), "warm": run(setting, work)}
        with path.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        peaks = [f"{name} {row[name]['peak_rss_bytes'] / 1e6:.0f} MB" for name in ("cold", "warm")]
        print(f"{setting}: {', '.join(peaks)}", flush=True)


if __name__ == "__main__":
    main()
