"""Does AdamW with 8-bit and 4-bit moments reach the validation loss of float32 AdamW? The runs; README.md has the rule.

    python experiments/optimizer_parity/run.py            about two hours on two cores
    python experiments/optimizer_parity/run.py --quick    about a minute: whether it works, never an answer
    python experiments/optimizer_parity/analyse.py        the result file, from the finished runs

Each finished run is a line of ``rows.jsonl`` in the work folder. Stop it whenever you like (Ctrl-C, or SIGTERM): the
run under way is lost, and the same command goes on with it. SIGSTOP and SIGCONT pause and wake it.
"""

import argparse
import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from corpus import Corpus, load_corpus
from jaxtyping import Float, Int
from rows import Row, Run, append_row, missing, n_steps_left, read_rows
from settings import Optimizer, Settings, load_settings, settle

from edgejax.core.arrays import Array, PyTree
from edgejax.core.cache import enable_compile_cache
from edgejax.core.sources import sources_sha256
from edgejax.data import micro_batches
from edgejax.measure.record import source_state
from edgejax.measure.timing import load_average
from edgejax.models import Decoder
from edgejax.train import (
    SignalGuard,
    TrainState,
    evaluate_with,
    init_state,
    make_eval_step,
    make_schedule,
    make_train_step,
    optimizer_names,
    rates,
)
from edgejax.train.held import hold_weights
from edgejax.train.programs import abstract, abstract_batch
from edgejax.train.recipe import StepRecipe

ROOT = Path(__file__).resolve().parents[2]
EVAL_ROWS = 8


class RunState(NamedTuple):
    """The optimizer's state with what differs between runs, so that one compiled step serves all of an optimizer's.

    Attributes:
      rates: float32 ``[S]``; the learning rate of each step.
      seed: int32; of the stochastic rounding.
      inner: the optimizer's own state.
    """

    rates: Float[Array, " S"]
    seed: Int[Array, ""]
    inner: PyTree


class Programs(NamedTuple):
    """What an optimizer's runs execute: ``begin(seed, rates) -> state``, ``step(state, {}, batch)``."""

    begin: Callable[..., TrainState]
    step: Callable[..., tuple[TrainState, dict[str, Array]]]
    state_bytes: int  # of the optimizer
    weight_bytes: int


def per_run(make: Callable[[optax.Schedule, Array], optax.GradientTransformation], n_steps: int):
    """``make(schedule, seed)`` as a transformation whose schedule and seed are part of its state."""

    def init(params: PyTree) -> RunState:
        inner = make(lambda count: jnp.float32(0), jnp.int32(0)).init(params)
        return RunState(jnp.zeros(n_steps, jnp.float32), jnp.zeros((), jnp.int32), inner)

    def update(gradients: PyTree, state: RunState, params: PyTree = None):
        optimizer = make(lambda count: state.rates[count], state.seed)
        updates, inner = optimizer.update(gradients, state.inner, params)
        return updates, state._replace(inner=inner)

    return optax.GradientTransformation(init, update)


def compile_programs(settings: Settings, optimizer: Optimizer) -> Programs:
    """The programs of one optimizer, compiled once for all its learning rates and seeds."""
    training, decoder = settings.training, Decoder(settings.model_config())

    def make(schedule: optax.Schedule, seed: Array) -> optax.GradientTransformation:
        recipe = StepRecipe(
            mode="full",
            optimizer=optimizer.name,
            optimizer_options={"seed": seed} if optimizer.seeded else {},
            learning_rate=schedule,
            weight_decay=training["weight_decay"],
            clip_norm=training["clip_norm"],
            remat="none",
            bfloat16=optimizer.bfloat16,
            seed=seed,  # type: ignore[arg-type]  # of the weights' rounding: traced here
        )
        return recipe.make_optimizer()

    transformation = per_run(make, training["steps"])

    @jax.jit
    def begin(seed: Array, run_rates: Array) -> TrainState:
        params = hold_weights(decoder.init(jax.random.key(seed)), bfloat16=optimizer.bfloat16)
        state = init_state(params, transformation)
        return state._replace(opt_state=state.opt_state._replace(rates=run_rates, seed=seed))

    state = abstract(jax.eval_shape(begin, jnp.int32(0), jnp.zeros(training["steps"])))
    batch = abstract_batch(1, training["rows_per_step"], settings.data["sequence_length"])
    step: Any = make_train_step(decoder, transformation, mode="full", remat="none")
    n_bytes = [
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.opt_state.inner, state.trainable)
    ]
    return Programs(begin, step.lower(state, {}, batch).compile(), *n_bytes)


def rates_of_run(settings: Settings, run: Run) -> Float[Array, " S"]:
    """Linear warm-up and a cosine to 0 over the run's own number of steps; zeros after them."""
    n_steps = steps_of_run(settings, run)
    schedule = make_schedule("cosine", run.learning_rate, steps=n_steps, warmup=settings.training["warmup"])
    return jnp.zeros(settings.training["steps"]).at[:n_steps].set(rates(schedule, n_steps))


def steps_of_run(settings: Settings, run: Run) -> int:
    """A run of the grid is a shorter one."""
    return settings.grid["steps"] if run.kind == "grid" else settings.training["steps"]


def train(
    settings: Settings, run: Run, programs: Programs, corpus: Corpus, eval_step: Any, stop: Callable[[], bool]
) -> Row | None:
    """One run from its random parameters to its validation loss; None if it was stopped."""
    started_s, cpu_started_s = time.perf_counter(), time.process_time()
    state = programs.begin(jnp.int32(run.seed), rates_of_run(settings, run))
    losses: list[float] = []
    n_rows = settings.training["rows_per_step"]
    for number in range(steps_of_run(settings, run)):
        if stop():
            return None
        batch = micro_batches(corpus.train, number, 1, n_rows, run.seed)
        state, metrics = programs.step(state, {}, jax.tree.map(jnp.asarray, batch))
        losses.append(float(metrics["loss"]))
        if not math.isfinite(losses[-1]):
            break
    judged = evaluate_with(
        eval_step,
        state.trainable,
        {},
        corpus.validation,
        batch_size=EVAL_ROWS,
        max_rows=(settings.grid if run.kind == "grid" else settings.data)["validation_rows"],
        should_stop=stop,
    )
    if judged is None:
        return None
    return run._asdict() | {
        "validation_loss": judged.loss if math.isfinite(judged.loss) else None,  # None: diverged
        "validation_tokens": judged.n_tokens,
        "training_losses": [loss if math.isfinite(loss) else None for loss in losses],
        "state_bytes": programs.state_bytes,
        "weight_bytes": programs.weight_bytes,
        "wall_s": time.perf_counter() - started_s,
        "cpu_s": time.process_time() - cpu_started_s,
        "load_average": load_average(),
        "finished_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def describe(run: Run) -> str:
    """A run in a line of the log."""
    return f"{run.kind:5} {run.optimizer}, rate {run.learning_rate:g}, seed {run.seed}"


def main() -> int:
    """All runs that are not in the work folder yet."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tiny model and two seeds")
    parser.add_argument("--work", type=Path, help="default: runs/optimizer_parity, with -quick at its end")
    arguments = parser.parse_args()
    work = arguments.work or ROOT / "runs" / ("optimizer_parity" + "-quick" * arguments.quick)
    source = (source_state() or {}) | {"sha256": sources_sha256()}
    settings = load_settings(quick=arguments.quick)
    settle(work, settings)
    enable_compile_cache()

    corpus = load_corpus(settings.data)
    config, path = settings.model_config(), work / "rows.jsonl"
    print(
        f"{config.n_params()} parameters; {corpus.train.n_positions} tokens to train on, "
        f"{corpus.validation.n_positions} to judge by (topics {', '.join(corpus.held_out)}); {path}",
        flush=True,
    )
    rows, known = read_rows(path), set(optimizer_names())
    for row in rows:
        if row["data"] != corpus.hashes:
            raise SystemExit(f"{path} was begun with another text or tokenizer; give another --work")
    for optimizer in settings.optimizers:
        if optimizer.name not in known:
            print(
                f"{optimizer.label} is left out: no optimizer has the name {optimizer.name} yet", flush=True
            )

    by_label = {optimizer.label: optimizer for optimizer in settings.optimizers}
    programs: dict[str, Programs] = {}
    eval_step = make_eval_step(Decoder(config), mode="full")
    step_s: list[float] = []
    with SignalGuard() as guard:
        for run in missing(settings, rows, known):
            if run.optimizer not in programs and guard.received is None:
                print(f"compiling {run.optimizer}", flush=True)
                programs[run.optimizer] = compile_programs(settings, by_label[run.optimizer])
            stop = lambda: guard.received is not None  # noqa: E731
            found = None if stop() else train(settings, run, programs[run.optimizer], corpus, eval_step, stop)
            if found is None:
                print(f"stopped with {len(rows)} runs in {path}; the same command goes on", flush=True)
                return 128 + (guard.received or 0)
            optimizer_settings = dataclasses.asdict(by_label[run.optimizer])
            row = found | {"source": source, "data": corpus.hashes, "optimizer_settings": optimizer_settings}
            append_row(path, row)
            rows.append(row)
            step_s.append(row["wall_s"] / max(1, len(row["training_losses"])))
            left_s = n_steps_left(settings, rows, known) * statistics.median(step_s[-9:])
            loss = "diverged" if row["validation_loss"] is None else f"{row['validation_loss']:.4f}"
            print(
                f"{describe(run)}: {loss} in {row['wall_s']:.1f} s ({row['cpu_s'] / row['wall_s']:.1f} cores); "
                f"about {left_s / 60:.0f} min left",
                flush=True,
            )
    print(f"all {len(rows)} runs are in {path}; next: analyse.py --work {work}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
