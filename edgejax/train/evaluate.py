"""Held-out loss and perplexity: the mean over all counted tokens, not over rows.

loss = (sum over counted tokens of -log p(token)) / (number of counted tokens),   perplexity = exp(loss)
"""

import dataclasses
import math
from collections.abc import Callable

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import DataError
from edgejax.data import Batch, PackedDataset, eval_batches
from edgejax.models import Decoder
from edgejax.train.whole import Mode, make_eval_step

EvalStep = Callable[[PyTree, PyTree, Batch], tuple[Array, Array]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvalResult:
    """What a model makes of a data set."""

    loss: float  # nats per counted token
    n_tokens: int  # counted tokens

    @property
    def perplexity(self) -> float:
        """exp(loss), infinite where it would overflow."""
        return math.exp(self.loss) if self.loss < 700 else math.inf


_NOTHING_COUNTS = "the held-out rows have no token whose loss counts; give other or more held-out text"


def evaluate(
    decoder: Decoder,
    trainable: PyTree,
    frozen: PyTree,
    dataset: PackedDataset,
    *,
    batch_size: int = 1,
    mode: Mode = "lora",
    max_rows: int | None = None,
) -> EvalResult:
    """Loss of a model over a data set.

    Args:
      decoder: the model's functions.
      trainable: adapters, an empty dict for the base alone (``lora``), or all parameters (``full``).
      frozen: the base parameters (``lora``), or ``{}`` (``full``).
      dataset: rows of T positions.
      batch_size: rows at a time.
      mode: which of the two trees holds what.
      max_rows: only so many rows, always the same ones.

    Raises:
      DataError: the rows hold no token whose loss counts.
    """
    result = evaluate_with(
        make_eval_step(decoder, mode=mode),
        trainable,
        frozen,
        dataset,
        batch_size=batch_size,
        max_rows=max_rows,
    )
    assert result is not None  # nothing could stop it
    return result


def check_counted(dataset: PackedDataset, max_rows: int | None = None) -> None:
    """Refuses, before any work, rows that ``evaluate`` could not judge by.

    Raises:
      DataError: they hold no token whose loss counts.
    """
    if not any(batch.loss_mask.any() for batch in eval_batches(dataset, 1, max_rows)):
        raise DataError(_NOTHING_COUNTS)


def evaluate_with(
    eval_step: EvalStep,
    trainable: PyTree,
    frozen: PyTree,
    dataset: PackedDataset,
    *,
    batch_size: int,
    max_rows: int | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> EvalResult | None:
    """``evaluate`` with a step compiled before; None if ``should_stop`` became true between two batches."""
    loss_sum, n_tokens = 0.0, 0
    waiting: tuple[Array, Array] | None = None
    for batch in eval_batches(dataset, batch_size, max_rows):
        if should_stop():
            return None
        result = eval_step(trainable, frozen, batch)
        if waiting is not None:  # fetched one batch late, so that the device never waits for the host
            loss_sum, n_tokens = loss_sum + float(waiting[0]), n_tokens + int(waiting[1])
        waiting = result
    if waiting is not None:
        loss_sum, n_tokens = loss_sum + float(waiting[0]), n_tokens + int(waiting[1])
    if n_tokens == 0:
        raise DataError(_NOTHING_COUNTS)
    return EvalResult(loss=loss_sum / n_tokens, n_tokens=n_tokens)
