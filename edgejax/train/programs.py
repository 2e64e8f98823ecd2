"""The two compiled programs of a run, the step and the evaluation, made from shapes alone.

Compiling takes several hundred megabytes for a moment. A run therefore compiles before it reads the weights, so that
the two are never in memory together.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.sharding import Mesh

from edgejax.core.allocator import release_freed_memory
from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.core.small_code import small_code
from edgejax.data import Batch
from edgejax.models import LoraConfig, ModelConfig
from edgejax.train.learning_rate import make_schedule
from edgejax.train.mesh import make_mesh, parse_mesh
from edgejax.train.recipe import (
    StepRecipe,
    abstract_run,
    make_evaluation,
    make_step,
    start_run,
    trained_leaves,
)
from edgejax.train.settings import TrainSettings
from edgejax.train.state import TrainState
from edgejax.train.whole import Mode


class Programs(NamedTuple):
    """What a run executes.

    Attributes:
      mode: ``lora`` or ``full``.
      recipe: how a step is computed.
      mesh: the devices they run on; None: one.
      schedule: the learning rate by step.
      start: from the model's parameters to ``(frozen, state)`` before the first step; ``give_away`` as in ``start_run``.
      step: compiled ``(state, frozen, batch [A, B, T]) -> (state, metrics)``; takes the state by donation.
      evaluate: compiled ``(trainable, frozen, batch [B, T]) -> (loss sum, counted tokens)``.
      trained: from ``state.trainable`` to what was trained, as the rest of the library takes it.
      params: shapes and dtypes of the parameters they were compiled for.
    """

    mode: Mode
    recipe: StepRecipe
    mesh: Mesh | None
    schedule: optax.Schedule
    start: Callable[..., tuple[PyTree, TrainState]]
    step: Any
    evaluate: Any
    trained: Callable[[PyTree], PyTree]
    params: PyTree

    def fit(self, params: PyTree) -> bool:
        """Whether they were compiled for parameters like these."""
        return params is self.params or abstract(params) == self.params


def compile_programs(
    config: ModelConfig, params: PyTree, settings: TrainSettings, lora: LoraConfig | None, seq_length: int
) -> Programs:
    """Compile a run's programs; nothing is computed.

    Args:
      config: the decoder.
      params: its parameters, or their ``jax.ShapeDtypeStruct``s; a ``LayerSource`` with the schedule streamed.
      settings: of the run.
      lora: which layers get adapters; None trains all parameters.
      seq_length: positions of a row, T.

    Raises:
      ConfigError: settings that cannot be honoured.
    """
    mode: Mode = "full" if lora is None else "lora"
    schedule = make_schedule(
        settings.lr_schedule,
        settings.learning_rate,
        steps=settings.steps,
        warmup=settings.warmup,
        final_fraction=settings.final_rate_fraction,
    )
    mesh = None if settings.mesh is None else make_mesh(parse_mesh(settings.mesh))
    recipe = settings.recipe(mode, settings.learning_rate if settings.is_constant else schedule)

    streamed = recipe.schedule == "streamed"

    def start(params: PyTree, give_away: bool = False) -> tuple[PyTree, TrainState]:
        placed = params if streamed or give_away or mesh is not None else jax.device_put(params)
        return start_run(recipe, config, placed, lora, mesh, give_away=give_away)

    shapes = params if streamed else abstract(params)
    frozen, state = abstract_run(recipe, config, shapes, lora)
    step: Any = make_step(recipe, config, lora, mesh)
    evaluate: Any = make_evaluation(recipe, config, lora, mesh)
    rows = (settings.batch_size, seq_length)
    options = [_small_code()] if settings.small_code and not streamed else []
    compiled = (
        step.lower(state, frozen, abstract_batch(settings.accumulate, *rows)).compile(*options),
        evaluate.lower(state.trainable, frozen, abstract_batch(*rows)).compile(*options),
    )
    release_freed_memory()
    trained = functools.partial(trained_leaves, recipe, config, lora, mesh)
    return Programs(mode, recipe, mesh, schedule, start, *compiled, trained, shapes)


def _small_code() -> dict[str, bool]:
    options = small_code()
    if not options:
        raise ConfigError("small code is an option of XLA for CPUs, and this back end has none; leave it out")
    return options


def abstract(tree: PyTree) -> PyTree:
    """Shapes and dtypes of a tree of arrays, as ``jax.ShapeDtypeStruct``s that compare equal.

    >>> abstract({"w": np.zeros((2, 3), np.float32)})
    {'w': ShapeDtypeStruct(shape=(2, 3), dtype=float32)}
    """
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def abstract_batch(*shape: int) -> Batch:
    """Shapes and dtypes of a batch with leaves of this shape."""
    integers = jax.ShapeDtypeStruct(shape, np.int32)
    return Batch(integers, integers, jax.ShapeDtypeStruct(shape, bool), integers, integers)  # type: ignore[arg-type]
