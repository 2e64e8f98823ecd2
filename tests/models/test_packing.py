"""Documents packed into rows learn what they would learn alone: loss, gradients, and what must not matter.

Bounds: sums of losses 1e-5 relative; every gradient leaf 1e-5 of its largest value.
"""

import jax
import numpy as np
import pytest
from export_cases import CONFIGS, LORAS, random_adapters, random_params

from edgejax.data import Batch, Document, eval_batches, pack_documents
from edgejax.models import Decoder, loss

LENGTHS = (24, 17, 11, 9, 5, 2, 8, 14)  # tokens; the sliding window of gemma3 is 4
T = 32


@pytest.fixture(scope="module", params=["llama", "gemma3"])
def learner(request):
    """A function from a batch to the loss sum and the gradient of all adapters of a tiny model, as numpy."""
    config = CONFIGS[request.param]
    decoder, params = Decoder(config, LORAS["all"]), random_params(config)
    adapters = random_adapters(config, LORAS["all"])

    @jax.jit
    def loss_and_gradients(params, adapters, batch):
        return jax.value_and_grad(lambda a: loss(decoder, params, a, batch, remat="full")[0])(adapters)

    return lambda batch: jax.device_get(loss_and_gradients(params, adapters, batch))


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(0)
    flags = [random.random(n) < 0.7 for n in LENGTHS]
    return [
        Document(random.integers(0, 384, n).astype(np.int32), np.append(learned[:-1], True), f"{n}")
        for n, learned in zip(LENGTHS, flags, strict=True)
    ]


@pytest.fixture(scope="module")
def packed(documents) -> Batch:
    """All documents in one batch of three rows."""
    rows = pack_documents(documents, T)
    batch = next(eval_batches(rows, rows.n_rows))
    assert batch.tokens.shape == (3, T)
    assert batch.segment_ids.max() >= 3  # three in a row
    assert (batch.segment_ids == 0).any()  # and padding
    assert not batch.loss_mask[batch.segment_ids > 0].all()  # and tokens that do not count
    return batch


@pytest.fixture(scope="module")
def expected(learner, packed):
    return learner(packed)


def assert_same(ours, expected, bound: float = 1e-5) -> None:
    (loss_sum, gradients), (expected_sum, expected_gradients) = ours, expected
    assert loss_sum == pytest.approx(expected_sum, rel=bound)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected_gradients), strict=True
    ):
        largest = np.abs(b).max()
        assert largest > 0, path
        assert np.abs(a - b).max() <= bound * largest, jax.tree_util.keystr(path)


def differs(ours, expected) -> bool:
    return abs(float(ours[0]) / float(expected[0]) - 1) > 1e-3


def test_documents_in_rows_of_their_own_give_the_same(learner, documents, expected):
    rows = pack_documents(documents, T, packing=False)
    assert rows.n_rows == len(LENGTHS)
    alone = [learner(batch) for batch in eval_batches(rows, 3)]
    assert_same(jax.tree.map(lambda *leaves: sum(x.astype(np.float64) for x in leaves), *alone), expected)


def test_a_document_without_any_padding_gives_the_same(learner, documents, packed):
    """A row of its own length, against the second document of a packed row, all others masked out."""
    row = int(np.argmax(packed.segment_ids.max(axis=1)))
    here = np.zeros_like(packed.loss_mask)
    here[row] = packed.segment_ids[row] == 2
    (document,) = [d for d in documents if d.tokens[0] == packed.tokens[row][here[row]][0]]
    length = len(document.tokens) - 1
    (only,) = eval_batches(pack_documents([document], length), 1)
    assert only.tokens.shape == (1, length) == (1, here.sum())
    assert (only.segment_ids == 1).all()
    assert_same(learner(only), learner(packed._replace(loss_mask=packed.loss_mask & here)))


def test_order_of_rows_and_of_documents_in_a_row_does_not_matter(learner, packed, expected):
    def turned(row: Batch) -> Batch:
        """Its documents from last to first, padding at the front."""
        order = np.argsort(-row.segment_ids.astype(int) % (row.segment_ids.max() + 1), kind="stable")
        return Batch(*(leaf[order] for leaf in row))

    rows = [turned(Batch(*(leaf[b] for leaf in packed))) for b in (2, 0, 1)]
    other = Batch(*(np.stack(leaves) for leaves in zip(*rows, strict=True)))
    assert (other.segment_ids[:, 0] != packed.segment_ids[:, 0]).any()
    assert_same(learner(other), expected)


def test_segments_and_positions_are_what_does_it(learner, packed, expected):
    """The bounds above would notice documents that see each other, and positions that go on."""
    one_segment = packed._replace(segment_ids=np.minimum(packed.segment_ids, 1))
    assert differs(learner(one_segment), expected)
    going_on = packed._replace(positions=np.broadcast_to(np.arange(T, dtype=np.int32), (3, T)))
    # Rotary attention sees differences of positions only, and those inside a document are the same.
    assert_same(learner(going_on), expected, bound=1e-4)
    stretched = packed._replace(positions=2 * packed.positions)
    assert differs(learner(stretched), expected)


def test_what_padding_holds_does_not_matter(learner, packed, expected):
    random, padding = np.random.default_rng(1), packed.segment_ids == 0
    tokens, targets, positions = (
        np.where(padding, random.integers(0, high, padding.shape), leaf).astype(np.int32)
        for high, leaf in ((384, packed.tokens), (384, packed.targets), (T, packed.positions))
    )
    assert (tokens != packed.tokens).any()
    loss_sum, gradients = learner(packed._replace(tokens=tokens, targets=targets, positions=positions))
    assert loss_sum == expected[0]
    jax.tree.map(np.testing.assert_array_equal, gradients, expected[1])


def test_targets_that_are_masked_out_do_not_matter(learner, packed, expected):
    other = np.where(packed.loss_mask, packed.targets, (packed.targets + 7) % 384).astype(np.int32)
    assert (other != packed.targets).any()
    loss_sum, gradients = learner(packed._replace(targets=other))
    assert loss_sum == expected[0]
    jax.tree.map(np.testing.assert_array_equal, gradients, expected[1])


def test_a_document_that_is_masked_out_leaves_the_others_as_they_are(learner, packed):
    """Its tokens are still read, and change nothing outside."""
    hidden = packed.segment_ids == 2
    silent = packed._replace(loss_mask=packed.loss_mask & ~hidden)
    tokens = np.where(hidden, (packed.tokens + 3) % 384, packed.tokens).astype(np.int32)
    gone = Batch(*(np.where(hidden, 0, leaf).astype(leaf.dtype) for leaf in silent))
    assert_same(learner(silent._replace(tokens=tokens)), learner(silent))
    assert_same(learner(gone), learner(silent))
    assert differs(learner(silent), learner(packed))


def test_nothing_that_counts_gives_no_loss_and_no_gradient(learner, packed):
    loss_sum, gradients = learner(packed._replace(loss_mask=np.zeros_like(packed.loss_mask)))
    assert loss_sum == 0
    assert all(not leaf.any() for leaf in jax.tree.leaves(gradients))
