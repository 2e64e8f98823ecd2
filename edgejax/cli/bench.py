"""``edgejax bench``: speed and memory of a training step, measured in a fresh process.

The measuring is done by ``cli.bench_process`` in a process of its own; this command starts it, shows what it
found, and with ``--json`` ends with one line of JSON. Numbers count only from an otherwise idle machine:
``cpu_seconds_over_wall`` far below the threads, or a load average above them, says it was not.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from edgejax.cli.bench_settings import SCHEDULES, BenchSettings
from edgejax.cli.options import add_model_arguments
from edgejax.core.allocator import huge_pages_environment
from edgejax.core.errors import RunError
from edgejax.core.units import format_bytes, format_seconds

EPILOG = """examples:
  edgejax bench --remat full --base int4 --json
  edgejax bench --random-weights --model smollm2-360m --mode full --optimizer sgd --repeats 5
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``edgejax bench``; each is a field of ``BenchSettings``."""
    defaults = BenchSettings()
    parser.epilog = EPILOG
    add_model_arguments(parser, adapter=False)
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="random weights and tokens of the model's shape; no file",
    )
    group = parser.add_argument_group("the step")
    group.add_argument(
        "--mode", choices=("lora", "full"), default=defaults.mode,
        help="adapters on all linear layers, or all parameters (default: %(default)s)",
    )  # fmt: skip
    group.add_argument("--rank", type=int, default=defaults.rank, help="of adapters (default: %(default)s)")
    group.add_argument(
        "--batch", type=int, default=defaults.batch, help="rows of a micro-step (default: %(default)s)"
    )
    group.add_argument(
        "--accumulate",
        type=int,
        default=defaults.accumulate,
        help="micro-steps of a step (default: %(default)s)",
    )
    group.add_argument("--seq", type=int, default=defaults.seq, help="tokens of a row (default: %(default)s)")
    group.add_argument(
        "--remat", default="auto",
        help="what is recomputed: none, attention, mlp, full or sqrt (default: none; full with layerwise)",
    )  # fmt: skip
    group.add_argument(
        "--boundaries", default=defaults.boundaries,
        help="how inputs of layers wait for the backward pass: f32, bf16 (with them what attention and mlp keep) or "
        "int8 (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--mlp-tile", type=int, default=defaults.mlp_tile, metavar="N",
        help="positions of a row whose MLP values exist at once (default: all)",
    )  # fmt: skip
    group.add_argument(
        "--optimizer",
        default=defaults.optimizer,
        help="adamw4bit, adamw8bit, apollo_mini, ... or one of optax (default: %(default)s)",
    )
    group.add_argument(
        "--schedule", default=defaults.schedule,
        help=f"how a step is run: {', '.join(SCHEDULES)} (default: %(default)s)",
    )  # fmt: skip
    group = parser.add_argument_group("the measurement")
    group.add_argument(
        "--repeats", "--steps", type=int, default=defaults.repeats, help="steps timed (default: %(default)s)"
    )
    group.add_argument(
        "--warmup", type=int, default=defaults.warmup,
        help="steps after the first that are not timed (default: %(default)s)",
    )  # fmt: skip
    group.add_argument(
        "--threads", type=int, default=defaults.threads, help="cores to use (default: %(default)s)"
    )
    group.add_argument(
        "--compile-cache", action=argparse.BooleanOptionalAction, default=defaults.compile_cache,
        help="use and fill the compile cache; a second run is then warm (default: off, a cold start)",
    )  # fmt: skip
    group.add_argument("--seed", type=int, default=defaults.seed, help="of adapters and of what is random")
    group.add_argument("--json", action="store_true", help="print one line of JSON and nothing else")
    group.add_argument(
        "--out", type=Path, metavar="FILE", help="also write the record there; never overwrites"
    )


def run(args: argparse.Namespace) -> int:
    """Measure in a child process, show the result, and write the record where it was asked for.

    Raises:
      ConfigError: settings that cannot be honoured.
      RunError: ``--out`` exists, or the measuring process died.
    """
    names = {field.name for field in dataclasses.fields(BenchSettings)}
    settings = BenchSettings(**{name: value for name, value in vars(args).items() if name in names})
    if args.out is not None and args.out.exists():
        raise RunError(f"{args.out} exists, and results are never overwritten; choose another file name")
    code, record = measure_in_child(settings)
    if record is None:
        return code
    if args.out is not None:
        from edgejax.measure.record import write_record

        write_record(args.out, record)
    print(json.dumps(flat_result(record), allow_nan=False) if args.json else summary(record))
    return 0


def measure_in_child(settings: BenchSettings) -> tuple[int, dict[str, Any] | None]:
    """Run the measuring process; its exit code, and the record if it is 0.

    Raises:
      RunError: the process died of a signal, or ended without a record.
    """
    done = subprocess.run(
        [sys.executable, "-m", "edgejax.cli.bench_process", settings.to_json()],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=huge_pages_environment(os.environ),
    )
    if done.returncode < 0:
        hint = "; the system may have run out of memory" if done.returncode == -9 else ""
        raise RunError(f"the measuring process was ended by signal {-done.returncode}{hint}")
    if done.returncode:
        return done.returncode, None  # it has said why
    try:
        return 0, json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError) as error:
        raise RunError(f"the measuring process ended without a record: {done.stdout[-200:]!r}") from error


def flat_result(record: dict[str, Any]) -> dict[str, Any]:
    """The record as one level: its results first, then what they depend on."""
    about = {key: value for key, value in record.items() if key not in ("results", "load_average")}
    return record["results"] | about


def summary(record: dict[str, Any]) -> str:
    """What a person wants to see of a record."""
    found, config, device = record["results"], record["config"], record["device"]
    samples = found["tokens_per_s_samples"]
    cache = "off" if not config["compile_cache"] else f"{found['compile_cache_hits']} found"
    rows = [
        ("measured on", f"{device['cpu']}, {found['threads']} threads ({device['platform']})"),
        ("step", f"{config['model']} {config['mode']} B{config['batch']} T{config['seq']}, remat {config['remat']}, "
                 f"base {config['base']}, {config['optimizer']}"),
        ("speed", f"{found['tokens_per_s_median']:.1f} tokens/s (median of {len(samples)}; "
                  f"{min(samples):.1f} to {max(samples):.1f})"),
        ("of matmul peak", f"{found['fraction_of_matmul_peak']:.1%} of {found['matmul_peak_gflop_per_s']:.0f} GFLOP/s "
                           f"at {found['flop_per_token'] / 1e6:.0f} MFLOP a token"),
        ("first step after", f"{format_seconds(found['first_step_s'])} (compiling "
                             f"{format_seconds(found['compile_s'])}, compile cache {cache})"),
        ("peak memory", format_bytes(found["peak_rss_bytes"])),
        *((f"  {name}", format_bytes(size)) for name, size in found["memory_by_source_bytes"].items()),
        ("trained state", f"{found['bytes_per_parameter']:.2f} bytes a parameter: weights, gradients, optimizer"),
        ("cores kept busy", f"{found['cpu_seconds_over_wall']:.2f}, load average {_load(found)}"),
    ]  # fmt: skip
    return "\n".join(f"{name:<17} {value}" for name, value in rows)


def _load(found: dict[str, Any]) -> str:
    return "unknown" if found["load_average"] is None else f"{found['load_average'][0]:.1f}"
