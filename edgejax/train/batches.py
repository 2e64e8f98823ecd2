"""The batch of every optimizer step, by the step's number: all there is to resume."""

from typing import Protocol

from edgejax.data import Batch, PackedDataset, micro_batches
from edgejax.train.settings import TrainSettings


class StepBatches(Protocol):
    """What the loop asks of the data."""

    def __call__(self, step: int) -> Batch:
        """Leaves ``[A, B, T]`` of the optimizer step that follows ``step`` others; the same ones each time."""
        ...

    def position(self, step: int) -> int:
        """Rows taken before that step, over all epochs."""
        ...

    def describe(self, step: int) -> str:
        """Where those rows come from, for an error message."""
        ...


class DatasetBatches:
    """The rows of a packed data set in their shuffled order.

    Args:
      dataset: rows of T positions.
      settings: its ``batch_size`` (B), ``accumulate`` (A) and ``seed``.
    """

    def __init__(self, dataset: PackedDataset, settings: TrainSettings) -> None:
        self.dataset = dataset
        self.settings = settings

    def __call__(self, step: int) -> Batch:
        settings = self.settings
        return micro_batches(self.dataset, step, settings.accumulate, settings.batch_size, settings.seed)

    def position(self, step: int) -> int:
        return step * self.settings.accumulate * self.settings.batch_size

    def describe(self, step: int) -> str:
        settings, first = self.settings, self.position(step)
        epoch, row = divmod(first, self.dataset.n_rows)
        return (
            f"rows {first} to {self.position(step + 1) - 1} of the shuffled order (epoch {epoch + 1}, its row {row} on; "
            f"micro_batches(dataset, {step}, {settings.accumulate}, {settings.batch_size}, {settings.seed}))"
        )
