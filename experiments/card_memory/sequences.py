"""How long may a row be? What our step and the usual one take at several lengths, and what follows for each card.

    python experiments/card_memory/sequences.py     about 30 minutes; needs `make gpu-aot`, no GPU; goes on where it was stopped
    python experiments/card_memory/render.py        the tables, into README.md

Steps are compiled for a card of 80 GB, so that XLA has no reason to compute anything twice (but in those that exceed it, the usual
steps of all parameters of 7B and 13B), at a few lengths. In between ours is a straight line, the usual step's a parabola. How true that is, compiling at the length that was found says, for
cards that are to hold it.
"""

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lengths import longest
from measure import RANK, baseline_bytes

from edgejax.core.errors import RunError
from edgejax.core.sources import sources_sha256
from edgejax.devices import find_device
from edgejax.measure.record import make_record, write_record
from edgejax.models.shapes import find_shape
from edgejax.plan import Candidate
from edgejax.plan.card import card_footprints, find_plugin
from edgejax.plan.cuda_target import RESERVE_BYTES

HERE = Path(__file__).resolve().parent
ROOM = "a100"  # to compile for
MODELS = (
    "smollm2-135m", "smollm2-360m", "qwen2.5-0.5b", "llama-3.2-1b", "gemma-3-1b", "qwen2.5-1.5b", "smollm2-1.7b", "qwen2.5-3b",
    "llama-3.2-3b", "qwen2.5-7b", "llama-13b",
)  # fmt: skip
CARDS = ("rtx3050 8gb", "rtx3060 12gb", "rtx4060", "rtx4070", "rtx4090", "rtx5090", "a100", "h100")
KINDS: dict[str, dict[str, Any]] = {
    "LoRA, int4 base": {"mode": "lora", "base": "int4", "rank": RANK, "remat": "full", "boundaries": "int8"},
    "LoRA, ternary base": {"mode": "lora", "base": "ternary", "rank": RANK, "remat": "full", "boundaries": "int8"},
    "all parameters": {
        "mode": "full", "base": "bf16", "schedule": "layerwise", "optimizer": "adamw4bit", "remat": "full",
        "boundaries": "int8",
    },
}  # fmt: skip
TERNARY_MODELS = ("llama-13b",)
OURS, USUAL = "ours", "usual, bfloat16"
USUAL_LENGTHS = (512, 1024, 2048)
CHECKS = (
    ("rtx3050 8gb", "llama-3.2-3b", "LoRA, int4 base"),
    ("rtx3060 12gb", "llama-3.2-1b", "LoRA, int4 base"),
    ("rtx3060 12gb", "llama-3.2-1b", "all parameters"),
    ("rtx4060", "llama-13b", "LoRA, ternary base"),
    ("rtx4070", "qwen2.5-7b", "LoRA, int4 base"),
    ("rtx4090", "qwen2.5-3b", "all parameters"),
    ("rtx5090", "gemma-3-1b", "LoRA, int4 base"),
)


def cases() -> Iterator[tuple[str, str]]:
    """Models and what is trained of them."""
    for kind in KINDS:
        for model in TERNARY_MODELS if "ternary" in kind else MODELS:
            yield model, kind


def our_lengths(context: int) -> list[int]:
    """Where ours is compiled.

    >>> our_lengths(4096), our_lengths(131072)
    ([1024, 4096], [1024, 8192, 131072])
    """
    return sorted({length for length in (1024, 8192) if length < context} | {context})


def our_points(card: str, model: str, kind: str, lengths: list[int]) -> list[dict[str, Any]]:
    """Bytes by source at each length."""
    candidates = [Candidate(seq=seq, **KINDS[kind]) for seq in lengths]
    points = []
    answers = card_footprints(find_device(card), model, candidates)
    for seq, found in zip(lengths, answers, strict=True):
        if isinstance(found, str):
            raise RunError(f"{model}, {kind}, {seq} positions: {found}")
        points.append({"seq": seq, "peak_bytes": found.peak_bytes, "sources_bytes": found.sources})
    return points


def usual_points(card: str, model: str, kind: str, lengths: list[int]) -> list[dict[str, Any]]:
    """Bytes at each length."""
    shared = {
        "model": model,
        "mode": KINDS[kind]["mode"],
        "card": find_device(card).name,
        "dtype": "bfloat16",
        "batch": 1,
    }
    found = baseline_bytes([shared | {"rank": RANK, "seq": seq} for seq in lengths])
    return [{"seq": seq, "peak_bytes": size} for seq, size in zip(lengths, found, strict=True)]


POINTS = {OURS: our_points, USUAL: usual_points}


def measure(model: str, kind: str, side: str) -> dict[str, Any]:
    """A row: the points of a model, of what is trained and of a side."""
    context = find_shape(model).max_position
    lengths = our_lengths(context) if side == OURS else list(USUAL_LENGTHS)
    points = POINTS[side](ROOM, model, kind, lengths)
    return {"model": model, "kind": kind, "side": side, "context": context, "points": points}


def check(card: str, row: dict[str, Any]) -> dict[str, Any]:
    """What a row says of the longest that fits on a card, and what the step compiled for that card takes."""
    device = find_device(card)
    assert device.memory_bytes is not None
    found = longest(
        row["points"], device.memory_bytes - RESERVE_BYTES, row["context"], parabola=row["side"] == USUAL
    )
    about = {
        "card": device.name,
        "model": row["model"],
        "kind": row["kind"],
        "side": row["side"],
        "seq": found.seq,
    }
    if not found.seq:
        return about
    (point,) = POINTS[row["side"]](card, row["model"], row["kind"], [found.seq])
    return about | {"predicted_bytes": found.n_bytes, "compiled_bytes": point["peak_bytes"]}


def main() -> None:
    """All rows that are not in the work folder yet, the checks, and one result file, which is never overwritten."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=HERE.parents[1] / "runs" / "card_sequences")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    path = args.work / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    sources = {"edgejax_sha256": sources_sha256(), "plugin": find_plugin()[1]}
    if any(row["sources"] != sources for row in rows):
        raise SystemExit(f"{path} was begun with other sources or another plugin; give another --work")
    done = {(row["model"], row["kind"], row["side"]) for row in rows}
    for model, kind in cases():
        for side in POINTS if "ternary" not in kind else (OURS,):
            if (model, kind, side) not in done:
                started = time.perf_counter()
                rows.append(measure(model, kind, side) | {"sources": sources})
                with path.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
                print(f"{model}, {kind}, {side}: {time.perf_counter() - started:.0f} s", flush=True)
    by_case = {(row["model"], row["kind"], row["side"]): row for row in rows}
    checks = []
    for card, model, kind in CHECKS:
        for side in POINTS:
            if (model, kind, side) in by_case:
                checks.append(check(card, by_case[model, kind, side]))
                print(checks[-1], flush=True)
    memory = {card: find_device(card).memory_bytes for card in CARDS}
    config = {
        "compiled_for": find_device(ROOM).name, "plugin": find_plugin(), "reserve_bytes": RESERVE_BYTES, "rank": RANK,
        "cards": {find_device(card).name: size for card, size in memory.items()},
        "settings": {kind: Candidate(**settings).describe() for kind, settings in KINDS.items()},
    }  # fmt: skip
    record = make_record("card_sequences", config=config, results={"rows": rows, "checks": checks})
    print(write_record(HERE / "sequences" / f"{time.strftime('%Y-%m-%d-%H%M')}.json", record))


if __name__ == "__main__":
    main()
