"""The ``streamed`` schedule: a host loop over layers whose frozen weights are mapped from a file.

Two small programs run L times a step, one layer forward and one layer backward with its update; beside them one for the
embedding and one for the head. A layer's packed weights are pages of the file, mapped without a copy while its program
runs and given back afterwards, so a model may be larger than memory (as MeBP, Song and Tang 2025, arXiv 2510.03425,
does it on phones). What stays in memory is the adapters, a vector a layer (``flat_adapters``), their optimizer's state
and the stored inputs of the layers, which can be narrow (``memory.residuals``) or spilled to a file.

It computes what ``layerwise`` does with adapters and an elementwise optimizer.
"""

import contextlib
import dataclasses
import functools
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from edgejax.core.allocator import release_freed_memory
from edgejax.core.arrays import PyTree
from edgejax.core.cache import forget_traces
from edgejax.core.errors import ConfigError, RunError
from edgejax.core.in_place import replace_row
from edgejax.core.small_code import small_code
from edgejax.data.batch import Batch
from edgejax.models import Decoder, LoraConfig, ModelConfig
from edgejax.train.flat_adapters import FlatAdapters, check_elementwise
from edgejax.train.layerwise_state import LayerwiseState, init_layerwise
from edgejax.train.passes import Passes, mean_factor, row_of
from edgejax.train.state import TrainState
from edgejax.train.updater import Updater
from edgejax.train.whole import Metrics


class LayerSource(Protocol):
    """Frozen weights, a layer at a time (``weights.PackedFile``)."""

    def layer(self, index: int) -> PyTree:
        """That layer's leaves, without a leading axis; views of mapped pages."""
        ...

    def tables(self) -> PyTree:
        """Embedding, final norm and head; views too."""
        ...

    def prefetch(self, section: int | str) -> None:
        """Begin to read a layer's pages."""
        ...

    def release(self, section: int | str) -> None:
        """Give a layer's pages back."""
        ...

    def check_unchanged(self) -> None:
        """Raise WeightsError if the file is not what it was."""
        ...


def make_streamed_step(
    decoder: Decoder,
    optimizer: optax.GradientTransformation,
    *,
    boundaries: str = "f32",
    clip_norm: float | None = None,
    clip_by: str = "previous",
    spill_to: Path | None = None,
) -> "StreamedStep":
    """Build the step ``(state, source, batch) -> (state, metrics)``, a host function; the state is donated.

    Args:
      decoder: the model's functions, with adapters.
      optimizer: an optax transformation without clipping by the global norm.
      boundaries: how inputs of layers are stored: f32, bf16 or int8.
      clip_norm, clip_by: see ``updater``.
      spill_to: a folder where stored inputs wait in a file that has no name; None keeps them in memory.

    Returns:
      The step. Its state is what ``init_streamed`` gives, with a vector of all adapters for each layer
      (``flat_adapters``); the batch has leaves ``[A, B, T]``.

    Raises:
      ConfigError: no adapters, an optimizer that needs the whole gradient or a whole matrix, an unknown way to clip or
        to store.
      WeightsError: from the step, if the file changed since it was opened.
      RunError: from the step, if inputs cannot be spilled.
    """
    passes = Passes(decoder, "lora", boundaries, _flat(decoder))
    check_elementwise(optimizer)
    return StreamedStep(_Programs(passes, Updater(optimizer, clip_norm, clip_by)), spill_to)


class StreamedStep:
    """What ``make_streamed_step`` gives. ``lower`` and ``compile`` are those of a jitted function: they compile it before
    its first call, for the shapes they are given."""

    def __init__(self, programs: "_Programs", spill_to: Path | None):
        self._programs, self._spill_to = programs, spill_to
        self._shapes: Any = None

    def __call__(self, state: TrainState, source: LayerSource, batch: Batch) -> tuple[TrainState, Metrics]:
        source.check_unchanged()
        programs = self._programs
        batch = jax.device_put(batch)
        tables = _mapped(source.tables())
        with _store(self._spill_to) as store:
            carry = _forward(programs, source, tables, state.trainable["blocks"], batch, store.put)
            head, n_tokens, per_token = jax.block_until_ready(programs.head(tables, carry[0], batch))
            for name in tables:
                source.release(name)
            del tables
            new, norm = _backward(programs, source, state, batch, store.take, carry[1], head)
        loss = head.loss_sum.sum() * per_token
        return new, {"loss": loss, "grad_norm": norm, "n_tokens": n_tokens}

    def lower(self, state: TrainState, source: LayerSource, batch: Batch) -> "StreamedStep":
        """Take the shapes of arguments."""
        self._shapes = (state, source, batch)
        return self

    def compile(self) -> "StreamedStep":
        """Compile for them."""
        self._programs.compile(*self._shapes)
        return self

    def memory_analysis(self) -> "ProgramBytes":
        """XLA's figures of the largest of its programs; known after ``compile``."""
        return self._programs.memory_analysis()


@dataclasses.dataclass(frozen=True)
class ProgramBytes:
    """The largest figures among several programs, by the names of ``compiled.memory_analysis()``."""

    argument_size_in_bytes: int
    output_size_in_bytes: int
    alias_size_in_bytes: int
    temp_size_in_bytes: int
    generated_code_size_in_bytes: int


def init_streamed(
    adapters: PyTree, config: ModelConfig, lora: LoraConfig, optimizer: optax.GradientTransformation
) -> TrainState:
    """The state before the first step, from adapters as ``init_lora`` gives them."""
    trainable = FlatAdapters(config, lora).join(adapters)
    return TrainState(jnp.zeros((), jnp.int32), trainable, init_layerwise(trainable, optimizer))


def _flat(decoder: Decoder) -> FlatAdapters:
    if decoder.lora is None:
        raise ConfigError(
            "the streamed schedule trains adapters beside frozen weights; it has no full-parameter training (layerwise has)"
        )
    return FlatAdapters(decoder.config, decoder.lora)


def make_streamed_eval(decoder: Decoder) -> "StreamedEval":
    """Build ``(trainable, source, batch [B, T]) -> (loss sum, counted tokens)``, a host function.

    Raises:
      ConfigError: no adapters.
    """
    return StreamedEval(decoder)


class StreamedEval:
    """What ``make_streamed_eval`` gives; ``lower`` and ``compile`` as in ``StreamedStep``."""

    def __init__(self, decoder: Decoder):
        self._programs = _Programs(Passes(decoder, "lora", "f32", _flat(decoder)), None)
        self._loss: Any = jax.jit(
            lambda tables, h, batch: decoder.head_loss(tables, h[0], batch, frozen=True)
        )
        self._shapes: Any = None

    def __call__(self, adapters: PyTree, source: LayerSource, batch: Batch) -> tuple[jax.Array, jax.Array]:
        source.check_unchanged()
        batch = jax.device_put(batch)
        one = jax.tree.map(lambda leaf: leaf[None], batch)
        tables = _mapped(source.tables())
        h, _ = _forward(self._programs, source, tables, adapters["blocks"], one, lambda stored: None)
        found = jax.block_until_ready(self._loss(tables, h, batch))
        for name in tables:
            source.release(name)
        return found

    def lower(self, adapters: PyTree, source: LayerSource, batch: Batch) -> "StreamedEval":
        """Take the shapes of arguments."""
        self._shapes = (adapters, source, batch)
        return self

    def compile(self) -> "StreamedEval":
        """Compile for them."""
        adapters, source, batch = self._shapes
        one = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((1, *leaf.shape), leaf.dtype), batch)
        (h, _), _ = self._programs.compile_forward(adapters["blocks"], source, one)
        self._loss = self._loss.lower(_shapes(source.tables()), h, batch).compile()
        forget_traces()
        return self


def _forward(programs: "_Programs", source: LayerSource, tables, adapters, batch: Batch, put):
    carry = programs.embed(tables, batch)
    for layer in range(programs.n_layers):
        with _layer(source, layer, layer + 1, programs.n_layers) as block:
            carry, stored = programs.forward(block, adapters, carry, batch, np.int32(layer))
            put(jax.block_until_ready(stored))
            jax.block_until_ready(carry)
    return carry


def _backward(
    programs: "_Programs", source: LayerSource, state: TrainState, batch: Batch, take, reference, head
):
    adapters, opt_state = state.trainable["blocks"], state.opt_state
    factor = programs.factor(opt_state.grad_norm)
    stacks, passed_on = (adapters, opt_state.blocks), (head.dh, reference, jnp.float32(0))
    for layer in reversed(range(programs.n_layers)):
        with _layer(source, layer, layer - 1, programs.n_layers) as block:
            stacks, passed_on = programs.backward(
                stacks, passed_on, take(), block, batch, np.int32(layer), factor
            )
            jax.block_until_ready((stacks, passed_on))
    norm = jnp.sqrt(passed_on[2])
    return TrainState(state.step + 1, {"blocks": stacks[0]}, LayerwiseState(stacks[1], {}, None, norm)), norm


class _Programs:
    """The functions of one layer; each is compiled once, by ``compile`` or its first call, and serves all layers."""

    def __init__(self, passes: Passes, updater: Updater | None):
        flags = passes.decoder.sliding_flags()
        sliding = lambda layer: None if flags is None else jnp.asarray(flags)[layer]  # noqa: E731
        self.n_layers = passes.decoder.config.n_layers

        def head(tables, h, batch):
            n_tokens, per_token = mean_factor(batch)
            return passes.head(tables, h, batch, per_token), n_tokens, per_token

        def forward(block, adapters, carry, batch, layer):
            return passes.layer_forward(block, row_of(adapters, layer), carry, batch, layer, sliding(layer))

        def backward(stacks, passed_on, stored, block, batch, layer, factor):
            def on_row(row, passed_on):
                return passes.layer_backward(
                    *row, block, passed_on, stored, batch, layer, sliding(layer), (updater, factor)
                )

            return replace_row(stacks, layer, on_row, passed_on)

        jit = functools.partial(jax.jit, compiler_options=small_code())
        self.embed: Any = jit(passes.embed)
        self.forward: Any = jit(forward)
        self.head: Any = jit(head)
        self.backward: Any = jit(backward, donate_argnums=(0, 1))
        self.factor: Any = jax.jit(
            lambda norm: jnp.float32(1) if updater is None else updater.factor_of_step(norm)
        )

    def compile(self, state: TrainState, source: LayerSource, batch: Batch) -> None:
        """Compile all of them for a step's shapes."""
        block, tables, batch = _shapes(source.layer(0)), _shapes(source.tables()), _shapes(batch)
        adapters = state.trainable["blocks"]
        number, factor = jax.ShapeDtypeStruct((), np.int32), jax.ShapeDtypeStruct((), np.float32)
        (h, reference), stored = self.compile_forward(adapters, source, batch)
        dh = jax.eval_shape(self.head, tables, h, batch)[0].dh
        stacks, passed_on = (adapters, state.opt_state.blocks), (dh, reference, factor)
        self._compile("head", tables, h, batch)
        self._compile("factor", factor)
        self._compile("backward", stacks, passed_on, stored, block, batch, number, factor)

    def compile_forward(self, adapters: PyTree, source: LayerSource, batch: Batch) -> tuple[PyTree, PyTree]:
        """Compile those of the forward pass; the shapes of what a layer passes on and of what it stores."""
        block, tables, batch = _shapes(source.layer(0)), _shapes(source.tables()), _shapes(batch)
        carry = jax.eval_shape(self.embed, tables, batch)
        arguments = (block, adapters, carry, batch, jax.ShapeDtypeStruct((), np.int32))
        found = jax.eval_shape(self.forward, *arguments)
        self._compile("embed", tables, batch)
        self._compile("forward", *arguments)
        return found

    def _compile(self, name: str, *shapes: Any) -> None:
        setattr(self, name, getattr(self, name).lower(*shapes).compile())
        forget_traces()  # before the next one: what is freed at once leaves no holes in the heap

    def memory_analysis(self) -> ProgramBytes:
        """Of the compiled ones."""
        analyses = [
            program.memory_analysis() for program in (self.embed, self.forward, self.head, self.backward)
        ]
        names = [field.name for field in dataclasses.fields(ProgramBytes)]
        return ProgramBytes(*(max(getattr(one, name) for one in analyses) for name in names))


@contextlib.contextmanager
def _layer(source: LayerSource, layer: int, following: int, n_layers: int) -> Iterator[PyTree]:
    """A layer's mapped leaves; the next one is being read meanwhile, and the pages go back afterwards."""
    if 0 <= following < n_layers:
        source.prefetch(following)
    yield _mapped(source.layer(layer))
    source.release(layer)
    release_freed_memory()


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)


def _mapped(leaves: PyTree) -> PyTree:
    """Device arrays over the mapped pages: on CPU without a copy."""
    return jax.tree.map(jax.device_put, leaves)


class _Stack:
    """Stored inputs in memory, taken in the opposite order."""

    def __init__(self) -> None:
        self._stored: list[PyTree] = []

    def put(self, stored: PyTree) -> None:
        self._stored.append(stored)

    def take(self) -> PyTree:
        return self._stored.pop()


class _SpilledStack:
    """Stored inputs in a file, taken in the opposite order."""

    def __init__(self, file: Any, folder: Path) -> None:
        self._file, self._folder = file, folder
        self._forms: list[tuple[Any, list[tuple[int, tuple[int, ...], Any]]]] = []

    def put(self, stored: PyTree) -> None:
        leaves, treedef = jax.tree.flatten(stored)
        places = []
        try:
            for leaf in map(np.asarray, leaves):
                places.append((self._file.seek(0, 2), leaf.shape, leaf.dtype))
                self._file.write(np.ascontiguousarray(leaf).data)
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"the inputs of layers cannot be spilled to {self._folder}: {error.strerror or error}. Free space or choose "
                "another folder, then resume."
            ) from error
        self._forms.append((treedef, places))

    def take(self) -> PyTree:
        treedef, places = self._forms.pop()
        leaves = []
        for start, shape, dtype in places:
            self._file.seek(start)
            data = self._file.read(int(np.prod(shape)) * dtype.itemsize)
            leaves.append(jnp.asarray(np.frombuffer(data, dtype).reshape(shape)))
        if places:
            self._file.truncate(places[0][0])
        return jax.tree.unflatten(treedef, leaves)


@contextlib.contextmanager
def _store(folder: Path | None) -> Iterator[_Stack | _SpilledStack]:
    if folder is None:
        yield _Stack()
        return
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  closed below
    except OSError as error:
        raise RunError(
            f"the inputs of layers cannot be spilled to {folder}: {error.strerror or error}; choose another folder"
        ) from error
    with file:
        yield _SpilledStack(file, folder)
