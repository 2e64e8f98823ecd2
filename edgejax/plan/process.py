"""What the process of a run takes at its most, beside and around the program that trains.

XLA's buffer assignment says what a step has; what it does not see was measured (``experiments/memory_forecast``): the code
of the programs and what JAX keeps of them, the scratch of matrix products, and the least that any step, evaluation or
sample takes for a moment. Python, JAX and the data are not a constant: they are read off the process that compiles, but for
the code of libraries, which a run gives back when it has compiled and of which it takes up again what it uses.
"""

import dataclasses
from typing import Any

import jax

from edgejax.core.arrays import PyTree
from edgejax.core.trees import tree_bytes
from edgejax.measure.memory import ProcessMemory, xla_memory
from edgejax.models import LoraConfig, ModelConfig
from edgejax.plan.footprint import Footprint, step_sources
from edgejax.train.programs import Programs
from edgejax.train.receipt import make_receipt
from edgejax.train.recipe import abstract_run
from edgejax.train.settings import TrainSettings

LIBRARY_BYTES = 58_000_000  # mapped code and constants in use while training
PROGRAMS_BYTES = {  # step, evaluation and the small ones, loaded from the compile cache
    "whole": 60_000_000,
    "layerwise": 138_000_000,
    "streamed": 60_000_000,
}
SCRATCH_BYTES = {  # matrix products and their threads, at the same time as the step's own memory
    "whole": 42_000_000,
    "layerwise": 42_000_000,
    "streamed": 62_000_000,
}
SAVING_BYTES = 85_000_000  # copies of leaves, and what saves them; there while a step's memory is not
# Seen: 4.5%, 1.1% and 0.5%, with older constants 4.1%, 2.8% and 1.3%.
UNCERTAIN = {"whole": 0.05, "layerwise": 0.05, "streamed": 0.03}
SAMPLE_BYTES = 217_000_000  # beside both models: of all programs, and of reading the base once more


def bytes_once_opened(memory: ProcessMemory) -> int:
    """What a process that has opened a model and data will still have of that when it trains.

    >>> bytes_once_opened(ProcessMemory(rss_bytes=9, peak_rss_bytes=9, anonymous_bytes=10**6, file_bytes=3)) - LIBRARY_BYTES
    1000000
    """
    if memory.anonymous_bytes is None:  # not told apart from libraries
        return memory.rss_bytes or memory.peak_rss_bytes
    return memory.anonymous_bytes + LIBRARY_BYTES


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
    sample_temp_bytes: int | None = None,
) -> Footprint:
    """Bytes by source of a run whose programs are in the compile cache.

    Args:
      programs: compiled for the run.
      config: the decoder's.
      settings: of the run.
      lora: its adapters; None: all parameters train.
      seq_length: positions of a row.
      opened_bytes: ``bytes_once_opened`` of a process that has opened the model and the data, before anything was compiled.
      compiling_bytes: the most a process had that compiled them.
      source: the layers of a streamed run.
      sample_temp_bytes: of the programs that continue a prompt when it ends; None: there is no sample.
    """
    streamed = settings.schedule == "streamed"
    frozen, state = abstract_run(programs.recipe, config, programs.params, lora)
    shape = (settings.accumulate, settings.batch_size, seq_length)
    receipt = make_receipt(programs.recipe, config, state, {} if streamed else frozen, shape)
    if settings.spill_to is not None:  # they wait in a file
        receipt = dataclasses.replace(receipt, boundaries_bytes=0)
    xla = xla_memory(programs.step)
    programs_bytes, scratch = PROGRAMS_BYTES[settings.schedule], SCRATCH_BYTES[settings.schedule]
    sources = {"Python, JAX and data": opened_bytes, "programs": programs_bytes}
    if streamed:
        # Two layers at a time, and the tables; what is stored for the backward pass waits outside of its programs.
        sources["mapped weights"] = tree_bytes(source.tables()) + 2 * tree_bytes(source.layer(0))
        sources |= step_sources(receipt, receipt.boundaries_bytes + xla.temp_bytes, keeps_all=False)
        sources["scratch"] = scratch
    else:
        sources |= step_sources(receipt, xla.temp_bytes, keeps_all=settings.remat == "none")
        sources["scratch"] = max(scratch, SAVING_BYTES - xla.temp_bytes)
    trees = {tree.name: tree.n_bytes for tree in receipt.trees}
    floor = opened_bytes + sum(trees.values()) + sources.get("mapped weights", 0)
    if sample_temp_bytes is not None and lora is None:  # the base is read again, beside what was trained
        sample = opened_bytes + 2 * trees["weights"] + sample_temp_bytes + SAMPLE_BYTES
        sources["beyond it, the sample"] = max(0, sample - sum(sources.values()))
    return Footprint(
        sources={name: size for name, size in sources.items() if size},
        uncertain_bytes=round(UNCERTAIN[settings.schedule] * sum(sources.values())),
        remark="the model has to be packed for it" if isinstance(source, LayerShapes) else "",
        floor_bytes=floor,
        xla=xla,
        bytes_per_parameter=receipt.bytes_per_parameter,
        compiling_bytes=compiling_bytes,
    )
