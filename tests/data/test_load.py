"""Splits, the built-in corpus, and the whole way from a name to rows."""

import pydoc_data.topics
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.core.errors import ConfigError, DataError
from edgejax.data import (
    Document,
    TextRecord,
    batch_at,
    check_disjoint,
    check_seq_length,
    encode_records,
    load_documents,
    load_text,
    python_reference,
    split_documents,
)

pytestmark = pytest.mark.quick


def some_documents(contents) -> list[Document]:
    return [Document(np.array([c, c]), np.ones(2, bool), f"document {i}") for i, c in enumerate(contents)]


def contents(documents) -> list[int]:
    return [int(document.tokens[0]) for document in documents]


@given(
    values=st.lists(st.integers(0, 30), min_size=2, max_size=60).filter(lambda v: len(set(v)) > 3),
    fraction=st.sampled_from([0.25, 0.4, 0.5]),
    seed=st.integers(0, 5),
)
def test_a_split_is_complete_disjoint_and_of_the_stated_size(values, fraction, seed):
    train, held_out = split_documents(some_documents(values), fraction, seed)
    assert sorted(contents(train) + contents(held_out)) == sorted(values)
    assert not set(contents(train)) & set(contents(held_out))
    assert len(set(contents(held_out))) == round(fraction * len(set(values)))
    check_disjoint(train, held_out)
    again = split_documents(some_documents(values[::-1]), fraction, seed)
    assert set(contents(again[1])) == set(contents(held_out))


def test_another_seed_is_another_split_and_the_order_is_kept():
    documents = some_documents(range(40))
    splits = [split_documents(documents, 0.2, seed)[1] for seed in range(5)]
    assert len({tuple(contents(held_out)) for held_out in splits}) == 5
    assert all(contents(held_out) == sorted(contents(held_out)) for held_out in splits)


def test_the_split_is_the_same_with_another_tokenizer(make_tokenizer):
    records = [TextRecord(f"{i}", "fox " * (i + 1)) for i in range(12)]
    sides = [
        [d.name for d in split_documents(encode_records(records, tokenizer), 0.25)[1]]
        for tokenizer in (make_tokenizer(), make_tokenizer(bos_id=1, add_bos=True))
    ]
    assert sides[0] == sides[1]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match=f"held-out fraction {fraction}"):
        split_documents(some_documents(range(5)), fraction)


@pytest.mark.parametrize(
    ("n", "fraction", "side"), [(4, 0.1, "held-out"), (4, 0.9, "train"), (1, 0.5, "held-out")]
)
def test_a_side_without_documents_is_refused(n, fraction, side):
    with pytest.raises(
        DataError, match=f"{fraction} of {n} different documents leaves the {side} side empty"
    ):
        split_documents(some_documents(range(n)), fraction)


def test_a_document_on_both_sides_is_refused():
    with pytest.raises(DataError, match=r"document 1 \(held out\) .* document 2 \(training\)"):
        check_disjoint(some_documents([1, 2, 3]), some_documents([9, 3]))


def test_the_python_reference_is_its_topics_by_name():
    records = python_reference()
    assert [record.name for record in records] == sorted(pydoc_data.topics.topics)
    assert {record.name: record.text for record in records} == pydoc_data.topics.topics
    assert sum(len(record.text) for record in records) > 400_000


def test_a_python_without_its_texts_is_told_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="without pydoc_data"):
        python_reference()


def test_the_python_reference_as_rows(tokenizer):
    train, held_out = load_text("python-reference", tokenizer, 256, max_position=256, vocab_size=400)
    n_topics = len(pydoc_data.topics.topics)
    assert held_out.n_documents == round(0.1 * n_topics)
    assert train.n_documents + held_out.n_documents == n_topics
    assert train.n_positions / (train.n_rows * 256) > 0.98
    again = load_text("python-reference", tokenizer, 256)
    assert again.train.fingerprint == train.fingerprint != held_out.fingerprint
    assert load_text("python-reference", tokenizer, 256, seed=1).train.fingerprint != train.fingerprint


def test_files_as_rows_with_held_out_files_of_their_own(tmp_path, tokenizer):
    for name, text in {
        "a.txt": "the fox",
        "b.txt": "the dog and the fox",
        "held/c.txt": "the lazy dog",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    train, held_out = load_text(files, tokenizer, 64, held_out_source=str(tmp_path / "held"), packing=False)
    assert (train.n_rows, held_out.n_rows) == (2, 1)
    batch = batch_at(held_out, 0, 1, seed=0)
    assert tokenizer.decode(batch.tokens[batch.segment_ids > 0]) == "the lazy dog"
    assert batch.targets[batch.segment_ids > 0][-1] == tokenizer.eos_id
    assert load_text(files, tokenizer, 64, held_out_source=tmp_path / "held").train.n_rows == 1
    with pytest.raises(DataError, match=r"c.txt \(held out\) has the same content as .*c.txt \(training\)"):
        load_text([tmp_path / "held/c.txt"], tokenizer, 64, held_out_source=tmp_path / "held")


def test_a_name_that_is_neither_corpus_nor_file(tokenizer):
    with pytest.raises(DataError, match=r"python_reference: there is no such file .*\(python-reference\)"):
        load_documents("python_reference", tokenizer)


def test_a_corpus_beside_files_is_refused(tokenizer):
    with pytest.raises(DataError, match="python-reference comes along with edgejax and is used alone"):
        load_documents(["python-reference", "a.txt"], tokenizer)


def test_rows_longer_than_the_models_context():
    check_seq_length(2048, max_position=2048)
    check_seq_length(4096, max_position=2048, allow_long_context=True)
    check_seq_length(4096, max_position=None)
    with pytest.raises(ConfigError, match=r"4096 .* 2048 .* --allow-long-context"):
        check_seq_length(4096, max_position=2048)
    with pytest.raises(DataError, match="sequence length 1"):
        check_seq_length(1, max_position=2048)
    with pytest.raises(DataError, match="at most 16777216 positions"):
        check_seq_length(2**24 + 1, max_position=2048, allow_long_context=True)


def test_the_length_is_checked_before_anything_is_read(tokenizer):
    with pytest.raises(ConfigError, match="--allow-long-context"):
        load_text("not read", tokenizer, 512, max_position=256)


def test_a_tokenizer_of_another_model_is_refused(tmp_path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": "the fox"}\n{"text": "two"}\n')
    with pytest.raises(DataError, match=r"a.jsonl:\d: token id \d+ is beyond the model's vocabulary of 50"):
        load_text(tmp_path, tokenizer, 8, held_out_fraction=0.5, vocab_size=50)
