"""The measuring process of ``edgejax bench``: ``python -m edgejax.cli.bench_process SETTINGS``.

A fresh process, so that its peak memory and the time to its first step are those of a training run. It limits
itself to the asked-for cores before JAX counts them, loads the model, compiles and runs the training step, and
prints the record as its last line. Order matters: what is measured first cannot be raised by what comes later.
"""

import os
import sys
import time
from typing import Any

from edgejax.cli.bench_settings import BenchSettings
from edgejax.core.errors import ConfigError, EdgejaxError, NonFiniteLossError


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

    from edgejax.cli.bench_inputs import load_inputs, trained_parameters
    from edgejax.core.allocator import release_freed_memory
    from edgejax.core.cache import enable_compile_cache
    from edgejax.measure.matmul_peak import measure_matmul_peak
    from edgejax.measure.memory import AnonymousPeak, memory_report, process_memory, xla_memory
    from edgejax.measure.record import make_record
    from edgejax.measure.timing import process_age_s, sample
    from edgejax.models import Decoder, LoraConfig, init_lora
    from edgejax.train.optimizers import make_optimizer
    from edgejax.train.state import init_state
    from edgejax.train.whole import make_train_step

    jax.devices()
    after_imports = process_memory()
    cache = _CacheCounter(enable_compile_cache() if settings.compile_cache else None)
    inputs = load_inputs(settings)
    release_freed_memory()
    after_load = process_memory()
    lora = LoraConfig(rank=settings.rank) if settings.mode == "lora" else None
    decoder = Decoder(inputs.config, lora)
    optimizer = make_optimizer(settings.optimizer, settings.learning_rate)
    with AnonymousPeak() as anonymous:
        if lora is not None:
            frozen, trainable = inputs.params, init_lora(inputs.config, lora, jax.random.key(settings.seed))
        else:
            frozen, trainable = {}, trained_parameters(inputs.params)
            inputs = inputs._replace(params=None)  # the base is not needed beside its trained copy
        state = init_state(trainable, optimizer)
        step_fn = make_train_step(decoder, optimizer, mode=settings.mode, remat=settings.remat)  # type: ignore[arg-type]
        release_freed_memory()
        report_trees = {"frozen": frozen, "trainable": trainable, "opt_state": state.opt_state}
        start_s = time.perf_counter()
        compiled = step_fn.lower(state, frozen, inputs.batch_at(0)).compile()  # type: ignore[attr-defined]
        compile_s = time.perf_counter() - start_s
        release_freed_memory()
        after_compile = process_memory()
        sources = memory_report(**report_trees, compiled=compiled, runtime_bytes=after_imports.rss_bytes)
        del report_trees, trainable
        run = _Run(compiled, state, frozen, inputs.batch_at, settings.tokens_per_step)
        del state
        run.step()
        first_step_s = process_age_s()
        for _ in range(settings.warmup):
            run.step()
    peak_before = measure_matmul_peak()
    run.step()  # caches hold the model again
    timing = sample(run.step, warmup=0, repeats=settings.repeats)
    peak_after = measure_matmul_peak()
    peak = max(peak_before, peak_after, key=lambda found: found.gflop_per_s)
    run.check_losses()

    memory, xla = process_memory(), xla_memory(compiled)
    n_params = inputs.config.n_params()
    flop_per_token = settings.flop_per_token(n_params)
    rate = settings.tokens_per_step / timing.median_s
    results = {
        "tokens_per_s_median": rate,
        "tokens_per_s_samples": [settings.tokens_per_step / seconds for seconds in timing.wall_s],
        "step_wall_s_samples": list(timing.wall_s),
        "step_cpu_s_samples": list(timing.cpu_s),
        "cpu_seconds_over_wall": timing.cpu_over_wall,
        "load_average": timing.load_average_before,
        "load_average_after": timing.load_average_after,
        "matmul_peak_gflop_per_s": peak.gflop_per_s,
        "matmul_peak_gflop_per_s_by_shape": [
            found.gflop_per_s_by_shape() for found in (peak_before, peak_after)
        ],
        "step_gflop_per_s": flop_per_token * rate / 1e9,
        "fraction_of_matmul_peak": flop_per_token * rate / 1e9 / peak.gflop_per_s,
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
        "rss_after_imports_bytes": after_imports.rss_bytes,
        "rss_after_load_bytes": after_load.rss_bytes,
        "rss_after_compile_bytes": after_compile.rss_bytes,
        "peak_rss_after_compile_bytes": after_compile.peak_rss_bytes,
        "memory_by_source_bytes": sources.by_source(),
        "losses": run.losses,
        "threads": threads,
        "orbax_imported": "orbax.checkpoint" in sys.modules,
        "notes": list(inputs.notes),
    }
    return make_record(
        "bench",
        config=dataclasses.asdict(settings),
        results=results,
        seeds={"all": settings.seed},
        hashes=inputs.hashes,
    )


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
