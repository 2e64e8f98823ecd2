"""The order of rows: complete, deterministic, resumed by an integer."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.core.errors import ConfigError
from edgejax.data import Document, batch_at, eval_batches, micro_batches, pack_documents
from edgejax.data.dataset import _epoch_order

pytestmark = pytest.mark.quick


def dataset_of(n_rows: int, seq_length: int = 4):
    """One document a row; row r's first token is 100 r."""
    documents = [
        Document(np.arange(100 * r, 100 * r + seq_length + 1), np.ones(seq_length + 1, bool), f"{r}")
        for r in range(n_rows)
    ]
    return pack_documents(documents, seq_length)


def rows_of(batch) -> list[int]:
    return (batch.tokens[..., 0] // 100).ravel().tolist()


def same(a, b) -> bool:
    return all(np.array_equal(x, y) and x.dtype == y.dtype for x, y in zip(a, b, strict=True))


@given(n_rows=st.integers(1, 13), batch_size=st.integers(1, 9), seed=st.integers(0, 2**40))
def test_every_row_comes_once_an_epoch(n_rows, batch_size, seed):
    dataset = dataset_of(n_rows)
    n_batches = -(-3 * n_rows // batch_size)
    stream = [r for k in range(n_batches) for r in rows_of(batch_at(dataset, k, batch_size, seed))]
    for epoch in range(3):
        assert sorted(stream[epoch * n_rows : (epoch + 1) * n_rows]) == list(range(n_rows))


@given(
    n_rows=st.integers(1, 13),
    batch_size=st.integers(1, 4),
    accumulate=st.integers(1, 4),
    step=st.integers(0, 30),
    seed=st.integers(0, 9),
)
def test_a_step_is_made_of_the_same_rows_however_it_is_cut(n_rows, batch_size, accumulate, step, seed):
    dataset = dataset_of(n_rows)
    micro = micro_batches(dataset, step, accumulate, batch_size, seed)
    assert micro.tokens.shape == (accumulate, batch_size, 4)
    assert rows_of(micro) == rows_of(batch_at(dataset, step, accumulate * batch_size, seed))
    for a in range(accumulate):
        alone = batch_at(dataset, step * accumulate + a, batch_size, seed)
        assert same(alone, [leaf[a] for leaf in micro])


def test_resuming_takes_nothing_but_the_position():
    without_stop = [batch_at(dataset_of(11), k, 3, seed=5) for k in range(20)]
    _epoch_order.cache_clear()  # a new process knows nothing
    resumed = dataset_of(11)
    for k in (19, 7, 0, 12):
        assert same(batch_at(resumed, k, 3, seed=5), without_stop[k])


def test_epochs_and_seeds_have_orders_of_their_own():
    dataset = dataset_of(50)
    orders = {tuple(rows_of(batch_at(dataset, epoch, 50, seed))) for epoch in range(3) for seed in range(3)}
    assert len(orders) == 9


def test_the_order_is_the_one_it_always_was():
    # Recorded from this implementation: a stopped run must find its order after an upgrade of numpy.
    assert _epoch_order(10, 0, 0).tolist() == ORDER_OF_TEN


def test_shapes_and_dtypes():
    batch = batch_at(dataset_of(3), 0, 2, seed=0)
    assert [leaf.shape for leaf in batch] == [(2, 4)] * 5
    assert [leaf.dtype.name for leaf in batch] == ["int32", "int32", "bool", "int32", "int32"]


@pytest.mark.parametrize("n_rows", [1, 6, 7])
def test_evaluation_sees_every_row_once_in_batches_of_one_shape(n_rows):
    batches = list(eval_batches(dataset_of(n_rows), 3))
    assert {batch.tokens.shape for batch in batches} == {(3, 4)}
    held = [batch.segment_ids[:, 0] > 0 for batch in batches]
    rows = [r for batch, real in zip(batches, held, strict=True) for r in (batch.tokens[real, 0] // 100)]
    assert sorted(rows) == list(range(n_rows))
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == 4 * n_rows


def test_evaluation_of_some_rows_takes_always_the_same():
    dataset = dataset_of(20)
    first, again = ([b.tokens.tolist() for b in eval_batches(dataset, 2, max_rows=5)] for _ in range(2))
    assert first == again
    assert len(first) == 3


@pytest.mark.parametrize("arguments", [(-1, 1, 0), (0, 0, 0), (0, 1, -1)])
def test_numbers_out_of_range_are_refused(arguments):
    with pytest.raises(ConfigError, match="position"):
        batch_at(dataset_of(2), *arguments)
    with pytest.raises(ConfigError, match="accumulate 0"):
        micro_batches(dataset_of(2), 0, 0, 1, 0)
    with pytest.raises(ConfigError, match="max_rows 0"):
        next(eval_batches(dataset_of(2), 1, max_rows=0))


def test_the_fingerprint_tells_data_sets_apart():
    tokens, loss = np.arange(9), np.ones(9, bool)
    others = [
        pack_documents([Document(tokens, loss, "a")], 4),
        pack_documents([Document(tokens, loss, "a")], 8),
        pack_documents([Document(tokens + 1, loss, "a")], 4),
        pack_documents([Document(tokens, np.arange(9) > 3, "a")], 4),
        pack_documents([Document(tokens[:5], loss[:5], "a"), Document(tokens[5:], loss[5:], "b")], 4),
        pack_documents([Document(tokens[:5], loss[:5], "a"), Document(tokens[5:], loss[5:], "b")], 8),
        pack_documents(
            [Document(tokens[:5], loss[:5], "a"), Document(tokens[5:], loss[5:], "b")], 8, packing=False
        ),
    ]
    prints = [dataset.fingerprint for dataset in others]
    assert len(set(prints)) == len(prints)
    assert pack_documents([Document(tokens, loss, "other name")], 4).fingerprint == prints[0]


ORDER_OF_TEN = [0, 8, 9, 3, 7, 5, 1, 2, 6, 4]
