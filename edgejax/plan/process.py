"""What the process of a run takes at its most, beside and around the program that trains.

XLA's buffer assignment says what a step has; what it does not see was measured (``experiments/memory_forecast``): the code
of the programs and what JAX keeps of them, the scratch of matrix products, and the least that any step, evaluation or
sample takes for a moment. Python, JAX and the data are not a constant: they are read off the process that compiles.
"""

from typing import Any

import jax

from edgejax.core.arrays import PyTree
from edgejax.core.trees import tree_bytes
from edgejax.measure.memory import xla_memory
from edgejax.models import LoraConfig, ModelConfig
from edgejax.plan.footprint import Footprint, step_sources
from edgejax.train.programs import Programs
from edgejax.train.receipt import make_receipt
from edgejax.train.recipe import abstract_run
from edgejax.train.settings import TrainSettings

PROGRAMS_BYTES = 60_000_000  # of step, evaluation and the small ones, loaded from the compile cache
SCRATCH_BYTES = 42_000_000  # matrix products and their threads, at the same time as the step's own memory
LEAST_STEP_BYTES = 100_000_000  # that is there for a moment, however small the step is


class LayerShapes:
    """Of a model that is not packed yet, what ``train.streamed.LayerSource`` gives to compile for: shapes and dtypes."""

    def __init__(self, params: PyTree):
        self._params = params

    def layer(self, index: int) -> PyTree:
        """A layer's leaves, without a leading axis."""
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype), self._params["blocks"]
        )

    def tables(self) -> PyTree:
        """Embedding, final norm and head."""
        return {name: leaves for name, leaves in self._params.items() if name != "blocks"}


def process_footprint(
    programs: Programs,
    config: ModelConfig,
    settings: TrainSettings,
    lora: LoraConfig | None,
    seq_length: int,
    *,
    opened_bytes: int,
    compiling_bytes: int,
    source: Any = None,
) -> Footprint:
    """Bytes by source of a run whose programs are in the compile cache.

    Args:
      programs: compiled for the run.
      config: the decoder's.
      settings: of the run.
      lora: its adapters; None: all parameters train.
      seq_length: positions of a row.
      opened_bytes: resident in a process that has opened the model and the data, before anything was compiled.
      compiling_bytes: the most a process had that compiled them.
      source: the packed file of a streamed run.
    """
    streamed = settings.schedule == "streamed"
    frozen, state = abstract_run(programs.recipe, config, programs.params, lora)
    shape = (settings.accumulate, settings.batch_size, seq_length)
    receipt = make_receipt(programs.recipe, config, state, {} if streamed else frozen, shape)
    xla = xla_memory(programs.step)
    sources = {"Python, JAX and data": opened_bytes, "programs": PROGRAMS_BYTES}
    if streamed:
        mapped = tree_bytes(source.tables()) + 2 * tree_bytes(source.layer(0))
        stored = receipt.boundaries_bytes
        sources |= {"mapped weights": mapped}
        sources |= step_sources(receipt, stored + xla.temp_bytes, keeps_all=False)
        floor = mapped + sum(tree.n_bytes for tree in receipt.trees)
    else:
        sources |= step_sources(receipt, xla.temp_bytes, keeps_all=settings.remat == "none")
        floor = sum(tree.n_bytes for tree in receipt.trees)
    sources["scratch"] = max(SCRATCH_BYTES, LEAST_STEP_BYTES - xla.temp_bytes)
    return Footprint(
        sources=sources,
        floor_bytes=opened_bytes + floor,
        xla=xla,
        bytes_per_parameter=receipt.bytes_per_parameter,
        compiling_bytes=compiling_bytes,
    )
