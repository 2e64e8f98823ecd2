"""The measuring process of ``edgejax bench``: ``python -m edgejax.cli.bench_process SETTINGS``.

A fresh process, so that its peak memory and the time to its first step are those of a training run. It limits
itself to the asked-for cores before JAX counts them, loads the model, compiles and runs the training step, and
prints the record as its last line. Order matters: what is measured first cannot be raised by what comes later.
"""

import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from edgejax.cli.bench_settings import BenchSettings
from edgejax.core.errors import ConfigError, EdgejaxError, NonFiniteLossError

if TYPE_CHECKING:
    from edgejax.measure.matmul_peak import SustainedPeak
    from edgejax.measure.timing import Timing


PEAK_SECONDS = 0.5  # of products between two steps


def main(argv: list[str]) -> int:
    """Measure the settings in ``argv[0]`` (JSON) and print the record as one line of JSON."""
    import json

    try:
        settings = BenchSettings.from_json(argv[0])
        record = measure(settings, limit_cores(settings.threads))
    except EdgejaxError as error:
        print(f"edgejax bench: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(record, allow_nan=False))
    return 0


def limit_cores(wanted: int) -> int:
    """Keep this process to ``wanted`` of the cores it may use; returns how many it has."""
    if not hasattr(os, "sched_setaffinity"):  # macOS
        return os.cpu_count() or 1
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:wanted])
    return len(os.sched_getaffinity(0))


def measure(settings: BenchSettings, threads: int) -> dict[str, Any]:
    """Run the benchmark in this process and return its record (``measure.record``)."""
    import dataclasses

    import jax

    from edgejax.cli.bench_inputs import open_inputs
    from edgejax.core.allocator import (
        keep_scratch,
        release_freed_memory,
        release_library_code,
        return_large_blocks_at_once,
    )
    from edgejax.core.cache import enable_compile_cache, forget_traces
    from edgejax.measure.matmul_peak import SustainedPeak, measure_matmul_peak
    from edgejax.measure.memory import (
        AnonymousPeak,
        device_peak_bytes,
        memory_report,
        process_memory,
        xla_memory,
    )
    from edgejax.measure.record import make_record
    from edgejax.measure.timing import process_age_s
    from edgejax.models import LoraConfig
    from edgejax.train.programs import abstract
    from edgejax.train.receipt import make_receipt
    from edgejax.train.recipe import abstract_run, make_step, start_run

    return_large_blocks_at_once()
    jax.devices()
    after_imports = process_memory()
    cache = _CacheCounter(enable_compile_cache() if settings.compile_cache else None)
    inputs = open_inputs(settings)
    lora = LoraConfig(rank=settings.rank) if settings.mode == "lora" else None
    recipe = settings.recipe()
    step_fn = make_step(recipe, inputs.config, lora)

    def compile_for(params):
        frozen, state = abstract_run(recipe, inputs.config, params, lora)
        return step_fn.lower(state, frozen, inputs.batch_at(0)).compile()

    with AnonymousPeak() as anonymous:
        start_s = time.perf_counter()
        compiled = compile_for(inputs.abstract_params)
        compile_s = time.perf_counter() - start_s
        forget_traces()
        release_library_code()
        after_compile = process_memory()
        params = inputs.load()
        if (
            params is not inputs.abstract_params and abstract(params) != inputs.abstract_params
        ):  # scales that float16 cannot hold
            compiled = compile_for(params)
        frozen, state = start_run(recipe, inputs.config, params, lora)
        counted = {} if settings.schedule == "streamed" else frozen  # mapped, not in memory
        del params
        release_freed_memory()
        release_library_code()
        keep_scratch()
        after_load = process_memory()
        sources = memory_report(
            frozen=counted,
            trainable=state.trainable,
            opt_state=state.opt_state,
            compiled=compiled,
            runtime_bytes=after_imports.rss_bytes,
        )
        shape = (settings.accumulate, settings.batch, settings.seq)
        receipt = make_receipt(recipe, inputs.config, state, counted, shape)
        run = _Run(compiled, state, frozen, inputs.batch_at, settings.tokens_per_step)
        del state, frozen, counted
        run.step()
        first_step_s = process_age_s()
        for _ in range(settings.warmup):
            run.step()
    burst = measure_matmul_peak()
    timing, peaks = _in_turns(run.step, SustainedPeak(burst.shape), settings.repeats)
    peak = statistics.median(peaks)
    run.check_losses()

    memory, xla = process_memory(), xla_memory(compiled)
    n_params = inputs.config.n_params()
    flop_per_token = settings.flop_per_token(n_params)
    flop_per_step = flop_per_token * settings.tokens_per_step
    fractions = [
        flop_per_step / seconds / 1e9 / near for seconds, near in zip(timing.wall_s, peaks, strict=True)
    ]
    rate = settings.tokens_per_step / timing.median_s
    results = {
        "tokens_per_s_median": rate,
        "tokens_per_s_samples": [settings.tokens_per_step / seconds for seconds in timing.wall_s],
        "step_wall_s_samples": list(timing.wall_s),
        "step_cpu_s_samples": list(timing.cpu_s),
        "cpu_seconds_over_wall": timing.cpu_over_wall,
        "load_average": timing.load_average_before,
        "load_average_after": timing.load_average_after,
        "matmul_peak_gflop_per_s": peak,
        "matmul_peak_gflop_per_s_samples": peaks,
        "matmul_burst_gflop_per_s": burst.gflop_per_s,
        "matmul_burst_gflop_per_s_by_shape": burst.gflop_per_s_by_shape(),
        "step_gflop_per_s": flop_per_token * rate / 1e9,
        "fraction_of_matmul_peak": statistics.median(fractions),
        "fraction_of_matmul_peak_samples": fractions,
        "fraction_of_matmul_burst": flop_per_token * rate / 1e9 / burst.gflop_per_s,
        "flop_per_token": flop_per_token,
        "n_params": n_params,
        "tokens_per_step": settings.tokens_per_step,
        "first_step_s": first_step_s,
        "compile_s": compile_s,
        "compile_cache_hits": cache.hits,
        "compile_cache_misses": cache.misses,
        "xla_temp_bytes": xla.temp_bytes,
        "xla_argument_bytes": xla.argument_bytes,
        "xla_output_bytes": xla.output_bytes,
        "xla_alias_bytes": xla.alias_bytes,
        "xla_generated_code_bytes": xla.generated_code_bytes,
        "peak_rss_bytes": memory.peak_rss_bytes,
        "peak_rss_anonymous_bytes": anonymous.peak_bytes,
        "anonymous_above_idle_bytes": _above(anonymous.peak_bytes, after_imports.anonymous_bytes),
        "rss_after_imports_bytes": after_imports.rss_bytes,
        "rss_after_load_bytes": after_load.rss_bytes,
        "rss_after_compile_bytes": after_compile.rss_bytes,
        "peak_rss_after_compile_bytes": after_compile.peak_rss_bytes,
        "device_peak_bytes": device_peak_bytes(),
        "memory_by_source_bytes": sources.by_source(),
        "bytes_per_parameter": receipt.bytes_per_parameter,
        "receipt": receipt.to_json(),
        "losses": run.losses,
        "threads": threads,
        "orbax_imported": "orbax.checkpoint" in sys.modules,
    }
    return make_record(
        "bench",
        config=dataclasses.asdict(settings),
        results=results,
        seeds={"all": settings.seed},
        hashes=inputs.hashes,
    )


def _in_turns(step: Callable[[], None], meter: "SustainedPeak", repeats: int) -> "tuple[Timing, list[float]]":
    """Steps and the peak by turns: each step is compared with the mean of the peaks before and after it."""
    from edgejax.core.allocator import release_freed_memory
    from edgejax.measure.timing import joined, sample

    def peak() -> float:
        rate = meter.gflop_per_s(PEAK_SECONDS)
        release_freed_memory()  # what the products leave is not the step's
        return rate

    release_freed_memory()
    step()  # caches hold the model again
    timings, peaks = [], [peak()]
    for _ in range(repeats):
        timings.append(sample(step, warmup=0, repeats=1))
        peaks.append(peak())
    return joined(timings), [(before + after) / 2 for before, after in itertools.pairwise(peaks)]


def _above(peak: int | None, idle: int | None) -> int | None:
    return None if peak is None or idle is None else peak - idle


class _Run:
    """The training run that is timed: real steps, each from the state that the one before it left."""

    def __init__(self, compiled, state, frozen, batch_at, tokens_per_step: int):
        self.compiled, self.state, self.frozen = compiled, state, frozen
        self.batch_at, self.tokens_per_step = batch_at, tokens_per_step
        self.n_steps = 0
        self.losses: list[float] = []

    def step(self) -> None:
        import jax

        self.state, metrics = self.compiled(self.state, self.frozen, self.batch_at(self.n_steps))
        jax.block_until_ready(self.state)
        self.losses.append(float(metrics["loss"]))
        self.n_steps += 1
        if int(metrics["n_tokens"]) != self.tokens_per_step:
            raise ConfigError(
                f"a step counted {metrics['n_tokens']} tokens instead of {self.tokens_per_step}"
            )

    def check_losses(self) -> None:
        import math

        for number, loss in enumerate(self.losses):
            if not math.isfinite(loss):
                raise NonFiniteLossError(f"the loss of step {number} is {loss}; run `edgejax doctor`")


class _CacheCounter:
    """Counts what the compile cache had and had not; switches it off when there is none to use."""

    def __init__(self, folder):
        import jax

        self.hits = self.misses = 0
        if folder is None:  # also one that JAX_COMPILATION_CACHE_DIR names: the run is to be cold
            jax.config.update("jax_enable_compilation_cache", False)
        jax.monitoring.register_event_listener(self._count)

    def _count(self, event: str, **_: Any) -> None:
        self.hits += event.endswith("/cache_hits")
        self.misses += event.endswith("/cache_misses")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
