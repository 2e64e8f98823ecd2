"""What a training step takes, by source, read from the compiled program before anything runs."""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from edgejax.core.arrays import PyTree
from edgejax.measure.memory import XlaMemory, xla_memory
from edgejax.models import ModelConfig
from edgejax.plan.candidate import Candidate
from edgejax.train.programs import abstract_batch
from edgejax.train.receipt import make_receipt
from edgejax.train.recipe import abstract_run, make_step


@dataclasses.dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one compiled step.

    Attributes:
      sources: bytes by name, as large as the peak together: each tree, the layer inputs and what is kept beside them,
        the rest of the step's temporary memory.
      xla: XLA's own figures.
      bytes_per_parameter: of weights that train, their gradients and the optimizer's state.
      remark: what is unusual about how it was compiled; empty: nothing.
    """

    sources: dict[str, int]
    xla: XlaMemory
    bytes_per_parameter: float
    remark: str = ""

    @property
    def peak_bytes(self) -> int:
        """Arguments + outputs - alias + temp: what the program has at once, the trees included."""
        return self.xla.peak_bytes

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "peak_bytes": self.peak_bytes,
            "sources_bytes": self.sources,
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
        sources = {str(name): int(size) for name, size in value["sources_bytes"].items()}
        found = cls(
            sources=sources,
            xla=XlaMemory(**{name: int(size) for name, size in value["xla"].items()}),
            bytes_per_parameter=float(value["bytes_per_parameter"]),
            remark=str(value["remark"]),
        )
        if found.peak_bytes != value["peak_bytes"] or sum(sources.values()) != found.peak_bytes:
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
      candidate: how to train.
      config: the decoder's.
      params: shapes and dtypes of its parameters.
      device: what to compile for; None: the default one.
      place: gives the shapes of arguments their sharding, for a device that is not here.
      compiler_options: of XLA.
      remark: what to say of these.

    Example:
      >>> from edgejax.plan.candidate import abstract_model
      >>> candidate = Candidate(seq=32, base="int8")
      >>> found = compile_footprint(candidate, *abstract_model("tiny", candidate.base))
      >>> sum(found.sources.values()) == found.peak_bytes
      True
    """
    recipe, lora = candidate.recipe(), candidate.lora()
    frozen, state = abstract_run(recipe, config, params, lora)
    step = make_step(recipe, config, lora)
    shape = (candidate.accumulate, candidate.batch, candidate.seq)
    with contextlib.nullcontext() if device is None else jax.default_device(device):
        lowered = step.lower(place(state), place(frozen), place(abstract_batch(*shape)))
        xla = xla_memory(lowered.compile(compiler_options))
    receipt = make_receipt(recipe, config, state, frozen, shape)
    sources = {tree.name: tree.n_bytes for tree in receipt.trees}
    stored = {"layer inputs": receipt.boundaries_bytes, "kept beside them": receipt.kept_bytes}
    if sum(stored.values()) < xla.temp_bytes and candidate.remat != "none":
        sources |= {name: size for name, size in stored.items() if size}
    # Batches, outputs and what is rounded up for alignment belong to it too.
    sources["the step itself"] = xla.peak_bytes - sum(sources.values())
    return Footprint(sources=sources, xla=xla, bytes_per_parameter=receipt.bytes_per_parameter, remark=remark)
