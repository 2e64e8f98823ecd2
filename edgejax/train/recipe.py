"""How one optimizer step is computed: the schedule, the optimizer, what is kept and what is recomputed.

A recipe is checked when it is made; ``make_step`` and ``start_run`` turn it into a program and the state it begins with.
"""

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError
from edgejax.memory.remat import check_kept
from edgejax.memory.tiles import check_tile
from edgejax.models import Decoder, LoraConfig, ModelConfig, init_lora
from edgejax.optim import stochastic_rounding
from edgejax.train.flat_adapters import FlatAdapters, check_elementwise
from edgejax.train.held import hold_weights, on_host, take_weights
from edgejax.train.layerwise import REMAT as LAYERWISE_REMAT
from edgejax.train.layerwise import make_layerwise_step
from edgejax.train.layerwise_state import check_layerwise, init_layerwise
from edgejax.train.optimizers import make_optimizer
from edgejax.train.processes import gather
from edgejax.train.sharded import make_sharded_eval_step, make_sharded_step, start_over_mesh
from edgejax.train.state import TrainState, init_state
from edgejax.train.streamed import init_streamed, make_streamed_eval, make_streamed_step
from edgejax.train.updater import CLIP_KINDS
from edgejax.train.whole import Mode, make_eval_step, make_train_step

SCHEDULES = ("whole", "layerwise", "streamed")
REMAT_OF_SCHEDULE = {"layerwise": LAYERWISE_REMAT, "streamed": ("full",)}  # whole: all


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """The choices behind a compiled step.

    Raises:
      ConfigError: an unknown name, a value out of range, or choices that do not go together.

    Example:
      >>> StepRecipe(mode="full", schedule="layerwise", optimizer="adamw4bit", bfloat16=True).clips_by
      'previous'
    """

    mode: Mode = "lora"
    schedule: str = "whole"
    optimizer: str = "adamw"
    optimizer_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    learning_rate: float | optax.Schedule = 5e-4
    weight_decay: float = 0.0
    clip_norm: float | None = 1.0
    clip_by: str | None = None  # global, layer or previous; None: global with whole, previous with layerwise
    remat: str = "full"
    boundaries: str = "f32"
    mlp_tile: int | None = None
    bfloat16: bool = False  # trained matrices in bfloat16 with stochastic rounding, no float32 copy
    spill_to: Path | None = None  # streamed: a folder where inputs of layers wait instead of in memory
    seed: int = 0

    def __post_init__(self):
        if self.schedule not in SCHEDULES:
            raise ConfigError(
                f"no schedule of steps named {self.schedule!r}; there are: {', '.join(SCHEDULES)}"
            )
        check_kept(self.remat, self.boundaries)
        check_tile(self.mlp_tile)
        if self.bfloat16 and self.mode != "full":
            raise ConfigError(
                "adapters are held in float32: bfloat16 weights are an option of full-parameter training"
            )
        if self.spill_to is not None and self.schedule != "streamed":
            raise ConfigError(
                f"the schedule {self.schedule} keeps inputs of layers in memory; only streamed can spill them"
            )
        if self.schedule == "whole" and self.clips_by != "global":
            raise ConfigError(
                f"the schedule whole has the whole gradient and clips by its global norm, not by {self.clip_by!r}"
            )
        if self.schedule == "streamed" and self.mode != "lora":
            raise ConfigError(
                "the streamed schedule trains adapters beside frozen weights; for all parameters use layerwise or whole"
            )
        if self.schedule != "whole":
            if self.clip_norm is not None and self.clips_by not in CLIP_KINDS:
                raise ConfigError(
                    f"the {self.schedule} schedule cannot clip by the {self.clips_by} norm, which needs the whole gradient; it "
                    f"can by: {', '.join(CLIP_KINDS)}. Or use the schedule whole."
                )
            possible = REMAT_OF_SCHEDULE[self.schedule]
            if self.remat not in possible:
                raise ConfigError(
                    f"the {self.schedule} schedule recomputes each layer (remat {' or '.join(possible)}), so remat "
                    f"{self.remat!r} cannot be honoured; the schedule whole can"
                )
        optimizer = self.make_optimizer()
        if self.schedule != "whole":
            check_layerwise(optimizer)
        if self.schedule == "streamed":
            check_elementwise(optimizer)
        if self.bfloat16:
            _check_keeps_its_types(optimizer, self.optimizer)

    @property
    def clips_by(self) -> str:
        """The norm that is clipped by."""
        return self.clip_by or ("global" if self.schedule == "whole" else "previous")

    def make_optimizer(self) -> optax.GradientTransformation:
        """The transformation that the step applies, clipping by the global norm included where it does that."""
        optimizer = make_optimizer(
            self.optimizer,
            self.learning_rate,
            weight_decay=self.weight_decay,
            clip_norm=self.clip_norm if self.schedule == "whole" else None,
            options=self.optimizer_options,
        )
        return optax.chain(optimizer, stochastic_rounding(self.seed)) if self.bfloat16 else optimizer


def _check_keeps_its_types(optimizer: optax.GradientTransformation, name: str) -> None:
    """A compiled step takes a state of the types it gives."""
    gradient = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.float32)}
    params = {"kernel": jax.ShapeDtypeStruct((8, 16), jnp.bfloat16)}
    before = jax.eval_shape(optimizer.init, gradient)
    after = jax.eval_shape(optimizer.update, gradient, before, params)[1]
    if [leaf.dtype for leaf in jax.tree.leaves(before)] != [leaf.dtype for leaf in jax.tree.leaves(after)]:
        raise ConfigError(
            f"the optimizer {name} changes the types of its state with bfloat16 weights; take float32 weights "
            "(--base f32), or another optimizer"
        )


def make_step(
    recipe: StepRecipe, config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None = None
) -> Any:
    """The step ``(state, frozen, batch [A, B, T]) -> (state, metrics)``; the state is donated.

    It is a jitted function, or with ``streamed`` or a mesh an object that is called, lowered and compiled like one.
    """
    decoder = Decoder(config, lora, recipe.mlp_tile, recipe.schedule == "streamed")
    optimizer = recipe.make_optimizer()
    parts: Any = {"boundaries": recipe.boundaries, "clip_norm": recipe.clip_norm, "clip_by": recipe.clips_by}
    if recipe.schedule == "layerwise":
        return make_layerwise_step(decoder, optimizer, mode=recipe.mode, remat=recipe.remat, **parts)
    if recipe.schedule == "streamed":
        return make_streamed_step(decoder, optimizer, spill_to=recipe.spill_to, **parts)
    kept: Any = {"remat": recipe.remat, "boundaries": recipe.boundaries}
    if mesh is not None:
        return make_sharded_step(decoder, optimizer, mesh, mode=recipe.mode, **kept)
    return make_train_step(decoder, optimizer, mode=recipe.mode, **kept)


def make_evaluation(
    recipe: StepRecipe, config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None = None
) -> Any:
    """``(trainable, frozen, batch [B, T]) -> (loss sum, counted tokens)``, lowered and compiled like the step."""
    decoder = Decoder(config, lora, recipe.mlp_tile, recipe.schedule == "streamed")
    if recipe.schedule == "streamed":
        return make_streamed_eval(decoder)
    if mesh is not None:
        return make_sharded_eval_step(decoder, mesh, mode=recipe.mode)
    return make_eval_step(decoder, mode=recipe.mode)


def start_run(
    recipe: StepRecipe,
    config: ModelConfig,
    params: PyTree,
    lora: LoraConfig | None,
    mesh: Mesh | None = None,
    *,
    give_away: bool = False,
) -> tuple[PyTree, TrainState]:
    """``(frozen, state)`` before the first step. Trained leaves are never the model's own buffers: the step donates.

    One program makes it all: the code of each small program stays in memory, some megabytes of it.

    Args:
      recipe: how steps are computed.
      config: the decoder's.
      params: its parameters; a ``LayerSource`` with ``streamed``.
      lora: which layers get adapters; None trains all parameters.
      mesh: devices to place both on; None: the default one.
      give_away: where all parameters train: ``params`` is a tree of numpy arrays that is emptied, so that no more than
        one leaf of it is there twice.
    """
    if mesh is not None:
        start = functools.partial(start_run, recipe, config, lora=lora)
        return start_over_mesh(start, recipe.mode, params, mesh)
    if lora is not None:
        return params, _from_adapters(recipe, config, lora)(jax.random.key(recipe.seed))
    if give_away:
        trainable = take_weights(params, bfloat16=recipe.bfloat16)
        return {}, _before_training(recipe)(trainable)._replace(trainable=trainable)

    def from_params(params: PyTree) -> TrainState:
        return _begin(recipe, hold_weights(params, bfloat16=recipe.bfloat16))

    return {}, jax.jit(from_params)(params)


def compile_start(recipe: StepRecipe, config: ModelConfig, params: PyTree, lora: LoraConfig | None) -> None:
    """Compile what ``start_run`` runs (with ``give_away`` where all parameters train), to have it in the compile cache.

    Args:
      recipe, config, lora: as there.
      params: shapes of the parameters.
    """
    if lora is not None:
        _from_adapters(recipe, config, lora).lower(jax.random.key(recipe.seed)).compile()
        return
    trainable = jax.eval_shape(lambda params: hold_weights(params, bfloat16=recipe.bfloat16), params)
    _before_training(recipe).lower(trainable).compile()


def _begin(recipe: StepRecipe, trainable: PyTree) -> TrainState:
    optimizer = recipe.make_optimizer()
    if recipe.schedule != "whole":
        return TrainState(jnp.zeros((), jnp.int32), trainable, init_layerwise(trainable, optimizer))
    return init_state(trainable, optimizer)


def _from_adapters(recipe: StepRecipe, config: ModelConfig, lora: LoraConfig) -> Any:
    """The program that makes adapters and their optimizer's state from a key."""

    def from_adapters(key: Array) -> TrainState:
        adapters = init_lora(config, lora, key)
        if recipe.schedule == "streamed":
            return init_streamed(adapters, config, lora, recipe.make_optimizer())
        return _begin(recipe, adapters)

    return jax.jit(from_adapters)


def _before_training(recipe: StepRecipe) -> Any:
    """The program that makes all of a state but the weights, which are there."""

    def before_training(trainable: PyTree) -> TrainState:
        return _begin(recipe, trainable)._replace(trainable=None)

    return jax.jit(before_training)


def trained_leaves(
    recipe: StepRecipe, config: ModelConfig, lora: LoraConfig | None, mesh: Mesh | None, trainable: PyTree
) -> PyTree:
    """What a run trained, as the rest of the library takes it: adapters as ``init_lora`` gives them, or parameters.

    Those of a mesh are put together in process 0; each process must call it.
    """
    if recipe.schedule == "streamed" and lora is not None:
        return FlatAdapters(config, lora).split(trainable)
    return on_host(trainable if mesh is None else gather(trainable))


def abstract_run(
    recipe: StepRecipe, config: ModelConfig, params: PyTree, lora: LoraConfig | None
) -> tuple[PyTree, TrainState]:
    """Shapes of what ``start_run`` gives, from shapes of the parameters; a layer source stays what it is."""
    if recipe.schedule == "streamed":
        return params, jax.eval_shape(lambda: start_run(recipe, config, {}, lora)[1])
    return jax.eval_shape(lambda params: start_run(recipe, config, params, lora), params)
