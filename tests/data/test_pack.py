"""Packing: every learned pair once, nothing else changed."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.core.errors import DataError
from edgejax.data import Document, eval_batches, pack_documents
from edgejax.data.pack import cut_documents, fill_rows

pytestmark = pytest.mark.quick


def documents_of(masks: list[list[bool]]) -> list[Document]:
    """Documents in which every token is unique, so that a pair says where it came from."""
    counter = itertools.count(1)
    return [
        Document(np.array([next(counter) for _ in mask]), np.array(mask), f"document {i}")
        for i, mask in enumerate(masks)
    ]


def all_rows(dataset):
    (batch,) = eval_batches(dataset, dataset.n_rows)
    return batch


documents = st.lists(
    st.lists(st.booleans(), min_size=1, max_size=24) | st.integers(1, 40).map(lambda n: [True] * n),
    min_size=1,
    max_size=14,
).map(documents_of)
some_to_learn = documents.filter(lambda ds: any(d.n_learned for d in ds))
lengths_of_rows = st.sampled_from([2, 3, 7, 8, 9, 16, 64])


@given(given_documents=some_to_learn, seq_length=lengths_of_rows, packing=st.booleans())
def test_every_learned_pair_is_there_exactly_once(given_documents, seq_length, packing):
    batch = all_rows(pack_documents(given_documents, seq_length, packing=packing))
    found = sorted(zip(batch.tokens[batch.loss_mask], batch.targets[batch.loss_mask], strict=True))
    expected = [
        (document.tokens[i], document.tokens[i + 1])
        for document in given_documents
        for i in range(len(document.tokens) - 1)
        if document.loss[i + 1]
    ]
    assert found == sorted(expected)


@given(given_documents=some_to_learn, seq_length=lengths_of_rows, packing=st.booleans())
def test_a_segment_is_one_stretch_of_one_document(given_documents, seq_length, packing):
    dataset = pack_documents(given_documents, seq_length, packing=packing)
    batch = all_rows(dataset)
    document_of = {t: i for i, d in enumerate(given_documents) for t in d.tokens.tolist()}
    seen = []
    for tokens, targets, mask, segments, positions in zip(*batch, strict=True):
        n_segments = segments.max()
        assert n_segments == 1 or packing
        # 1, 1, ..., 2, 2, ..., 0, 0: contiguous, in order, padding last.
        assert [key for key, _ in itertools.groupby(segments)] in (
            list(range(1, n_segments + 1)),
            [*range(1, n_segments + 1), 0],
        )
        padding = segments == 0
        assert not mask[padding].any()
        assert not tokens[padding].any()
        for segment in range(1, n_segments + 1):
            here = segments == segment
            assert positions[here].tolist() == list(range(here.sum()))
            assert (np.diff(tokens[here]) == 1).all()
            assert (targets[here] == tokens[here] + 1).all()
            assert len({document_of[t] for t in [*tokens[here].tolist(), *targets[here].tolist()]}) == 1
            assert mask[here].any()
            seen += tokens[here].tolist()
        assert mask.any()
    assert len(seen) == len(set(seen)) == dataset.n_positions
    assert dataset.n_learned == batch.loss_mask.sum() == sum(d.n_learned for d in given_documents)


@given(n=st.integers(2, 60), seq_length=lengths_of_rows)
def test_pieces_of_a_long_document_follow_each_other(n, seq_length):
    pieces = cut_documents(documents_of([[True] * n]), seq_length)
    assert [piece.length for piece in pieces[:-1]] == [seq_length] * (len(pieces) - 1)
    assert 1 <= pieces[-1].length <= seq_length
    assert [piece.start for piece in pieces] == [i * seq_length for i in range(len(pieces))]
    assert sum(piece.length for piece in pieces) == n - 1


@given(data=st.data(), capacity=st.integers(1, 65))
def test_rows_hold_each_piece_once_and_are_not_half_empty(data, capacity):
    lengths = data.draw(st.lists(st.integers(1, capacity), max_size=60))
    rows = fill_rows(lengths, capacity)
    assert sorted(itertools.chain(*rows)) == list(range(len(lengths)))
    filled = [sum(lengths[i] for i in row) for row in rows]
    assert max(filled, default=0) <= capacity
    # A row was opened because its first piece fitted into no other: so no two rows could be one.
    assert all(a + b > capacity for a, b in itertools.combinations(filled, 2))


def test_packing_finds_the_perfect_fit():
    assert fill_rows([6, 5, 4, 3, 2, 1, 7], 7) == [[6], [0, 5], [1, 4], [2, 3]]


def test_twenty_thousand_pieces_take_no_time():
    lengths = np.random.default_rng(0).integers(1, 513, 20_000).tolist()
    rows = fill_rows(lengths, 512)
    assert sum(lengths) / (512 * len(rows)) > 0.99


def test_a_document_of_one_token_takes_no_position():
    single, pair = documents_of([[True], [True, True]])
    assert all_rows(pack_documents([single, pair], 4)).tokens.tolist() == [[2, 0, 0, 0]]


def test_pieces_without_a_learned_token_are_left_out():
    (document,) = documents_of([[False] * 6 + [True] * 2])
    assert all_rows(pack_documents([document], 3)).tokens.tolist() == [[4, 5, 6], [7, 0, 0]]
    assert all_rows(pack_documents([document], 3, packing=False)).loss_mask.tolist() == [
        [False, False, True],
        [True, False, False],
    ]


@pytest.mark.parametrize("seq_length", [1, 0, -5])
def test_rows_too_short_are_refused(seq_length):
    with pytest.raises(DataError, match=f"sequence length {seq_length}: .*at least 2"):
        pack_documents(documents_of([[True, True]]), seq_length)


@pytest.mark.parametrize("masks", [[[False] * 5], [[True]], [[True, False, False], [False]]])
def test_a_data_set_that_is_masked_out_is_refused(masks):
    with pytest.raises(DataError, match=r"no token of the \d documents is learned .*document 0"):
        pack_documents(documents_of(masks), 4)


def test_no_documents_are_refused():
    with pytest.raises(DataError, match="no documents"):
        pack_documents([], 4)


def test_a_document_needs_a_flag_a_token():
    with pytest.raises(DataError, match=r"page 3: .*\(2,\) tokens and \(3,\) flags"):
        Document(np.array([1, 2]), np.array([True] * 3), "page 3")
