"""The ``whole`` schedule over a mesh: each device differentiates its own rows, layers are put together as they run.

The gradient is computed under ``shard_map``, so that a device runs the same program as one alone does, on its rows: with
what XLA would make of the program by itself, the head (whose loop over rows ends where the rows with loss do) runs
whole on every device. A layer's weights are gathered inside the layer, so they are dropped and gathered again wherever
its values are (``memory.remat``), and the gradient of gathering is the sum over devices of which each keeps its part:

    forward:   W = all_gather(W_part)          backward:   dW_part = reduce_scatter(dW)

Gradients are float32 and have the form of the parts, so a device never holds the whole tree of them. The optimizer is
left to XLA, which knows what a norm over a split leaf is; it needs no communication for what is elementwise. Leaves with
quantised moments, which are walked in pieces, are updated part by part (``optim.streaming.units_split_over``).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Bool, Float, Int

from edgejax.core.arrays import Array, ArrayLike, PyTree
from edgejax.data.batch import Batch
from edgejax.models import Decoder, loss
from edgejax.models.rope import RopeTables
from edgejax.optim.streaming import units_split_over
from edgejax.train.held import wide
from edgejax.train.mesh import AXES, DATA, SHARD
from edgejax.train.placement import (
    REPEATED,
    STACKS,
    batch_spec,
    partition_specs,
    replicated,
    shard_axes,
    shard_batch,
    shard_tree,
    shardings,
)
from edgejax.train.state import TrainState
from edgejax.train.whole import Mode, apply_gradients, split_parameters, sum_gradients


@dataclasses.dataclass(frozen=True)
class GatheringDecoder(Decoder):
    """A decoder whose parameters are parts of leaves, put together where they are used.

    Attributes:
      axes: axes that the parameters are split along, as ``shard_axes`` gives them.
      adapter_axes: those of the adapters.
    """

    axes: PyTree = None
    adapter_axes: PyTree = None

    def embed(self, params: PyTree, tokens: Int[ArrayLike, "B T"]) -> Float[Array, "B T D"]:
        return super().embed(_gather_named(params, self.axes, "embed"), tokens)

    def block(
        self,
        block_params: PyTree,
        block_adapters: PyTree,
        h: Float[Array, "B T D"],
        rope: RopeTables,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        sliding: Bool[Array, ""] | None = None,
        kept: dict[str, Array] | None = None,
    ) -> Float[Array, "B T D"]:
        return super().block(
            *self._gathered(block_params, block_adapters), h, rope, segment_ids, sliding, kept
        )

    def block_keeping(
        self,
        block_params: PyTree,
        block_adapters: PyTree,
        h: Float[Array, "B T D"],
        rope: RopeTables,
        segment_ids: Int[ArrayLike, "B T"] | None = None,
        sliding: Bool[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], dict[str, Array]]:
        gathered = self._gathered(block_params, block_adapters)
        return super().block_keeping(*gathered, h, rope, segment_ids, sliding)

    def _gathered(self, block_params: PyTree, block_adapters: PyTree) -> tuple[PyTree, PyTree]:
        weights = _gather(block_params, _of_a_layer(self.axes))
        return weights, _gather(block_adapters, _of_a_layer(self.adapter_axes))

    def head_loss(self, params: PyTree, h: Float[Array, "B T D"], batch: Batch, *, frozen: bool):
        names = ("final_norm", "embed" if self.config.tie_embeddings else "head")
        return super().head_loss(_gather_named(params, self.axes, *names), h, batch, frozen=frozen)


class OverMesh:
    """A compiled function of split trees whose last argument, a batch of numpy arrays, is given whole.

    Args:
      function: jitted or compiled.
      mesh: where the batch goes.
    """

    def __init__(self, function: Any, mesh: Mesh) -> None:
        self.function, self.mesh = function, mesh

    def __call__(self, *args: Any) -> Any:
        *split, batch = args
        return self.function(*split, shard_batch(batch, self.mesh))

    def compile(self, *options: Any) -> "OverMesh":
        """After ``lower``."""
        return OverMesh(self.function.compile(*options), self.mesh)

    def memory_analysis(self) -> Any:
        """XLA's, of one device."""
        return self.function.memory_analysis()

    def as_text(self) -> str:
        """The compiled program."""
        return self.function.as_text()


class _Lazy:
    """Jits a function when the forms of its arguments, and with them their shardings, are known."""

    def __init__(self, jit_for: Callable[..., Any], mesh: Mesh) -> None:
        self._jit_for = functools.lru_cache(maxsize=8)(lambda key: jit_for(*key.trees))
        self.mesh = mesh

    def lower(self, *args: Any) -> OverMesh:
        """From arrays or their shapes."""
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), args)
        return OverMesh(self._jitted(args).lower(*shapes), self.mesh)

    def __call__(self, *args: Any) -> Any:
        return OverMesh(self._jitted(args), self.mesh)(*args)

    def _jitted(self, args: tuple) -> Any:
        return self._jit_for(_Forms(*args[:-1]))


class _Forms:
    """Trees that compare by their structure, shapes and dtypes."""

    def __init__(self, *trees: PyTree) -> None:
        self.trees = trees
        leaves, structure = jax.tree.flatten(trees)
        self._key = (structure, tuple((leaf.shape, jnp.dtype(leaf.dtype).name) for leaf in leaves))

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Forms) and self._key == other._key


def make_sharded_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    mesh: Mesh,
    *,
    mode: Mode,
    remat: str = "full",
    boundaries: str = "f32",
) -> Any:
    """``make_train_step`` over a mesh: ``(state, frozen, batch) -> (state, metrics)``; the state is donated.

    The same numbers as on one device within float32 rounding: rows are summed in another order.

    Args:
      decoder: the model's functions.
      optimizer: any optax transformation over the trainable tree.
      mesh: ``make_mesh``.
      mode, remat, boundaries: as for ``make_train_step``.

    Returns:
      The step. ``state`` and ``frozen`` are placed with ``shard_state`` and ``shard_tree``, ``batch`` is numpy arrays
      ``[A, B, T]``, the same in every process, B a multiple of the number of devices.
    """
    n_shards = mesh.shape[SHARD]

    def gradients_of_rows(axes: tuple[PyTree, PyTree], trainable: PyTree, frozen: PyTree, batch: Batch):
        local = _gathering(decoder, mode, *axes)

        def micro_loss(weights, frozen, micro: Batch):
            params, adapters = split_parameters(mode, weights, frozen)
            frozen_head = mode == "lora"
            return loss(
                local, params, adapters, micro, frozen_head=frozen_head, remat=remat, boundaries=boundaries
            )

        gradients, loss_sum, n_tokens = sum_gradients(micro_loss, wide(trainable), frozen, batch)
        over_rows = lambda g, axis: lax.psum(g, AXES if axis == REPEATED else DATA)  # noqa: E731
        gradients = jax.tree.map(over_rows, gradients, axes[0])
        return gradients, lax.psum(loss_sum, AXES), lax.psum(n_tokens, AXES)

    def step(state: TrainState, frozen: PyTree, batch: Batch):
        weights = jax.eval_shape(wide, state.trainable)  # whole leaves; inside shard_map only parts are seen
        axes = (shard_axes(weights, n_shards), shard_axes(frozen, n_shards))
        sums = jax.shard_map(
            functools.partial(gradients_of_rows, axes),
            mesh=mesh,
            in_specs=(
                partition_specs(state.trainable, n_shards),
                partition_specs(frozen, n_shards),
                batch_spec(3),
            ),
            out_specs=(partition_specs(weights, n_shards), PartitionSpec(), PartitionSpec()),
            check_vma=False,
        )(state.trainable, frozen, batch)
        with units_split_over(mesh, SHARD):
            return apply_gradients(optimizer, state, *sums)

    def jit_for(state: PyTree, frozen: PyTree) -> Any:
        held = shardings(state, mesh)
        rows = jax.sharding.NamedSharding(mesh, batch_spec(3))
        return jax.jit(
            step,
            donate_argnums=0,
            in_shardings=(held, shardings(frozen, mesh), rows),
            out_shardings=(held, replicated(mesh)),
        )

    return _Lazy(jit_for, mesh)


def make_sharded_eval_step(decoder: Decoder, mesh: Mesh, *, mode: Mode) -> Any:
    """``make_eval_step`` over a mesh: ``(trainable, frozen, batch [B, T]) -> (loss sum, counted tokens)``."""
    n_shards = mesh.shape[SHARD]

    def sums_of_rows(axes: tuple[PyTree, PyTree], trainable: PyTree, frozen: PyTree, batch: Batch):
        params, adapters = split_parameters(mode, trainable, frozen)
        return lax.psum(loss(_gathering(decoder, mode, *axes), params, adapters, batch), AXES)

    def evaluate(trainable: PyTree, frozen: PyTree, batch: Batch):
        axes, specs = (
            tuple(f(tree, n_shards) for tree in (trainable, frozen)) for f in (shard_axes, partition_specs)
        )
        over_rows = jax.shard_map(
            functools.partial(sums_of_rows, axes),
            mesh=mesh,
            in_specs=(*specs, batch_spec(2)),
            out_specs=PartitionSpec(),
            check_vma=False,
        )
        return over_rows(trainable, frozen, batch)

    def jit_for(trainable: PyTree, frozen: PyTree) -> Any:
        rows = jax.sharding.NamedSharding(mesh, batch_spec(2))
        in_shardings = (shardings(trainable, mesh), shardings(frozen, mesh), rows)
        return jax.jit(evaluate, in_shardings=in_shardings, out_shardings=replicated(mesh))

    return _Lazy(jit_for, mesh)


def start_over_mesh(
    start: Callable[[PyTree], tuple[PyTree, TrainState]], mode: Mode, params: PyTree, mesh: Mesh
) -> tuple[PyTree, TrainState]:
    """``start(params)``, a run's ``(frozen, state)``, made in parts: no device ever holds the whole of it."""
    placed = shard_tree(params, mesh)
    state_of = lambda params: start(params)[1]  # noqa: E731
    held = shardings(jax.eval_shape(state_of, placed), mesh)
    state = jax.jit(state_of, out_shardings=held)(placed)
    return (placed if mode == "lora" else {}), state


def _gathering(decoder: Decoder, mode: Mode, trainable_axes: PyTree, frozen_axes: PyTree) -> GatheringDecoder:
    axes, adapter_axes = split_parameters(mode, trainable_axes, frozen_axes)
    fields = {field.name: getattr(decoder, field.name) for field in dataclasses.fields(decoder)}
    return GatheringDecoder(**fields, axes=axes, adapter_axes=adapter_axes)


def _gather(tree: PyTree, axes: PyTree) -> PyTree:
    def whole(part: Array, axis: int) -> Array:
        return part if axis < 0 else lax.all_gather(part, SHARD, axis=axis, tiled=True)

    return jax.tree.map(whole, tree, axes)


def _gather_named(params: PyTree, axes: PyTree, *names: str) -> PyTree:
    return {name: _gather(params[name], axes[name]) for name in names}


def _of_a_layer(axes: PyTree) -> PyTree:
    """Axes of one layer's leaves from those of the stacks; negative ones stay negative."""
    return jax.tree.map(lambda axis: axis - 1, axes.get(STACKS, {}))
