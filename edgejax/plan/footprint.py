"""What a training step takes, by source, read from the compiled program before anything runs."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError
from edgejax.measure.memory import XlaMemory, xla_memory
from edgejax.models import ModelConfig
from edgejax.plan.candidate import Candidate
from edgejax.train.programs import abstract_batch
from edgejax.train.receipt import Receipt, make_receipt
from edgejax.train.recipe import abstract_run, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of a training step, or of the process that runs it.

    Attributes:
      sources: bytes by name while it runs: each tree, the layer inputs and what is kept beside them, the rest of the
        step's temporary memory; of a process also what lies beside its arrays.
      floor_bytes: what is there whatever is computed again: the trees, and of a process what it has before them.
      xla: XLA's own figures.
      bytes_per_parameter: of weights that train, their gradients and the optimizer's state.
      compiling_bytes: the most a process has while it compiles the step; 0: that happens elsewhere.
      uncertain_bytes: what the sources may be short of together.
      remark: what is unusual about how it was compiled; empty: nothing.
    """

    sources: dict[str, int]
    floor_bytes: int
    xla: XlaMemory
    bytes_per_parameter: float
    compiling_bytes: int = 0
    uncertain_bytes: int = 0
    remark: str = ""

    @property
    def running_bytes(self) -> int:
        """All sources at once."""
        return sum(self.sources.values())

    @property
    def peak_bytes(self) -> int:
        """The most there is at once, compiling included."""
        return max(self.running_bytes, self.compiling_bytes)

    @property
    def needed_bytes(self) -> int:
        """What there has to be for it: the peak, with what is uncertain of it."""
        return max(self.running_bytes + self.uncertain_bytes, self.compiling_bytes)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "running_bytes": self.running_bytes,
            "needed_bytes": self.needed_bytes,
            "uncertain_bytes": self.uncertain_bytes,
            "sources_bytes": self.sources,
            "floor_bytes": self.floor_bytes,
            "compiling_bytes": self.compiling_bytes,
            "xla": dataclasses.asdict(self.xla),
            "bytes_per_parameter": self.bytes_per_parameter,
            "remark": self.remark,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Footprint":
        """What ``to_json`` gave.

        Raises:
          KeyError, TypeError, ValueError: it is something else.
        """
        found = cls(
            sources={str(name): int(size) for name, size in value["sources_bytes"].items()},
            floor_bytes=int(value["floor_bytes"]),
            xla=XlaMemory(**{name: int(size) for name, size in value["xla"].items()}),
            bytes_per_parameter=float(value["bytes_per_parameter"]),
            compiling_bytes=int(value["compiling_bytes"]),
            uncertain_bytes=int(value["uncertain_bytes"]),
            remark=str(value["remark"]),
        )
        if found.peak_bytes != value["peak_bytes"] or min(found.sources.values()) < 0:
            raise ValueError("the parts do not add up to the peak")
        return found


def compile_footprint(
    candidate: Candidate,
    config: ModelConfig,
    params: PyTree,
    *,
    device: Any | None = None,
    place: Callable[[PyTree], PyTree] = lambda tree: tree,
    compiler_options: dict[str, Any] | None = None,
    remark: str = "",
) -> Footprint:
    """Compile a candidate's step and read its buffer assignment; nothing is computed, no array is made.

    Args:
      candidate: how to train; not ``streamed``, which has no program of a whole step.
      config: the decoder's.
      params: shapes and dtypes of its parameters.
      device: what to compile for; None: the default one.
      place: gives the shapes of arguments their sharding, for a device that is not here.
      compiler_options: of XLA.
      remark: what to say of these.

    Raises:
      ConfigError: the schedule is ``streamed``.

    Example:
      >>> from edgejax.plan.candidate import abstract_model
      >>> candidate = Candidate(seq=32, base="int8")
      >>> found = compile_footprint(candidate, *abstract_model("tiny", candidate.base))
      >>> found.peak_bytes == found.xla.peak_bytes
      True
    """
    if candidate.schedule == "streamed":
        raise ConfigError(
            "the streamed schedule maps its weights from a file; it has no program to compile from shapes"
        )
    recipe, lora = candidate.recipe(), candidate.lora()
    frozen, state = abstract_run(recipe, config, params, lora)
    step = make_step(recipe, config, lora)
    shape = (candidate.accumulate, candidate.batch, candidate.seq)
    with contextlib.nullcontext() if device is None else jax.default_device(device):
        lowered = step.lower(place(state), place(frozen), place(abstract_batch(*shape)))
        xla = xla_memory(lowered.compile(compiler_options))
    receipt = make_receipt(recipe, config, state, frozen, shape)
    sources = step_sources(receipt, xla.temp_bytes, keeps_all=candidate.remat == "none")
    # Batches, outputs and what is rounded up for alignment belong to the step too.
    sources["the step itself"] += xla.peak_bytes - sum(sources.values())
    return Footprint(
        sources=sources,
        floor_bytes=xla.argument_bytes,
        xla=xla,
        bytes_per_parameter=receipt.bytes_per_parameter,
        remark=remark,
    )


def step_sources(receipt: Receipt, temp_bytes: int, *, keeps_all: bool) -> dict[str, int]:
    """Bytes by source: the trees, and the temporary memory of a step in what is stored for the backward pass and the rest.

    Args:
      receipt: of the run.
      temp_bytes: of the compiled step.
      keeps_all: nothing is computed again (remat ``none``), so that XLA alone knows what is stored.
    """
    sources = {tree.name: tree.n_bytes for tree in receipt.trees}
    stored = {"layer inputs": receipt.boundaries_bytes, "kept beside them": receipt.kept_bytes}
    if keeps_all or sum(stored.values()) >= temp_bytes:
        stored = {}
    sources |= {name: size for name, size in stored.items() if size}
    return sources | {"the step itself": temp_bytes - sum(stored.values())}
