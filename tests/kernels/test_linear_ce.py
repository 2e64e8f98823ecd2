"""Cross-entropy of a linear head against softmax in float64: values, gradients, masks, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from edgejax.core.errors import ConfigError
from edgejax.kernels.linear_ce import chunks, linear_cross_entropy, linear_cross_entropy_reference
from edgejax.kernels.linear_ce.chunks import ROW_CHUNK, VOCAB_CHUNK, vocab_starts
from edgejax.measure.memory import xla_memory
from edgejax.quant import dequantize, quantize_int4, quantize_int8

WIDTH = 32
D_LOSS = 0.25  # the cotangent of the loss: a backward pass that ignores it is 4 times off
BF16_ROUNDING = 2.0**-8  # of 8 bits, to nearest, relative
EDGES = [0, VOCAB_CHUNK - 1, VOCAB_CHUNK, -1]  # first and last rows of the chunks of a head
VOCABULARIES = [100, VOCAB_CHUNK, VOCAB_CHUNK + 1]
ROWS = [1, 5, ROW_CHUNK, ROW_CHUNK + 1]
KINDS = pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trainable"])


def inputs(n_rows=9, vocab_size=100, seed=0, counted=0.8):
    """Hidden rows, head, targets (the edges of chunks among them) and mask; logits spread over several units."""
    rng = np.random.default_rng(seed)
    hidden = rng.normal(size=(n_rows, WIDTH)).astype(np.float32)
    weight = rng.normal(0, 0.4, (vocab_size, WIDTH)).astype(np.float32)
    targets = rng.integers(0, vocab_size, n_rows).astype(np.int32)
    edges = [edge % vocab_size for edge in EDGES][:n_rows]
    targets[: len(edges)] = edges
    mask = rng.random(n_rows) < counted
    mask[: len(edges)] = True
    return hidden, weight, targets, mask


def by_equation(hidden, weight, targets, mask):
    """Loss, d hidden and d weight in float64, all logits at once; rows that do not count are left out of it."""
    h, w, y = np.asarray(hidden, np.float64)[mask], np.asarray(weight, np.float64), targets[mask]
    logits = h @ w.T
    top = logits.max(axis=1, keepdims=True)
    lse = top + np.log(np.exp(logits - top).sum(axis=1, keepdims=True))
    loss = np.sum(lse[:, 0] - logits[np.arange(len(y)), y])
    d_logits = np.exp(logits - lse)
    d_logits[np.arange(len(y)), y] -= 1
    d_hidden = np.zeros(hidden.shape)
    d_hidden[mask] = D_LOSS * d_logits @ w
    return loss, d_hidden, D_LOSS * d_logits.T @ h


@functools.partial(jax.jit, static_argnames="frozen")
def run(hidden, weight, targets, mask, *, frozen):
    """The loss, and the gradients of ``hidden`` and (None where it is frozen) ``weight``."""

    def loss_of(hidden, trained):
        head = weight if trained is None else trained
        return linear_cross_entropy(hidden, head, targets, mask, frozen=frozen)

    loss, pull_back = jax.vjp(loss_of, hidden, None if frozen else weight)
    return loss, *pull_back(jnp.float32(D_LOSS))


def assert_close(actual, expected, relative=2e-5):
    """No element is off by more than ``relative`` of the largest one."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * np.abs(expected).max())


def assert_loss_and_gradients(hidden, weight, targets, mask, *, frozen):
    actual = run(hidden, weight, targets, mask, frozen=frozen)
    expected = by_equation(hidden, weight, targets, mask)
    for got, wanted in zip(actual, expected, strict=True):
        if got is not None:
            assert_close(got, wanted)


# --- values and gradients ---------------------------------------------------------------------------------


@pytest.mark.quick
@KINDS
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_every_vocabulary_has_its_loss_and_gradients(vocab_size, frozen):
    assert_loss_and_gradients(*inputs(vocab_size=vocab_size), frozen=frozen)


@pytest.mark.quick
@KINDS
@pytest.mark.parametrize("n_rows", ROWS)
def test_every_number_of_rows_has_its_loss_and_gradients(n_rows, frozen):
    assert_loss_and_gradients(*inputs(n_rows), frozen=frozen)


@KINDS
def test_chunks_of_rows_and_of_vocabulary_together(frozen):
    assert_loss_and_gradients(*inputs(2 * ROW_CHUNK + 70, 2 * VOCAB_CHUNK + 900), frozen=frozen)


@KINDS
def test_loss_and_gradients_are_those_of_torch(frozen):
    torch = pytest.importorskip("torch")
    hidden, weight, targets, mask = inputs(vocab_size=VOCAB_CHUNK + 1)
    h, w = (torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (hidden, weight))
    labels = torch.tensor(np.where(mask, targets, -100), dtype=torch.int64)
    loss = torch.nn.functional.cross_entropy(h @ w.T, labels, ignore_index=-100, reduction="sum")
    (D_LOSS * loss).backward()
    actual = run(hidden, weight, targets, mask, frozen=frozen)
    assert_close(actual[0], loss.item())
    assert_close(actual[1], h.grad.numpy())
    if not frozen:
        assert_close(actual[2], w.grad.numpy())


@pytest.mark.quick
@KINDS
def test_logits_of_thousands_do_not_overflow(frozen):
    hidden, weight, targets, mask = inputs()
    actual = run(1000 * hidden, weight, targets, mask, frozen=frozen)
    expected = by_equation(1000 * hidden, weight, targets, mask)
    assert_close(actual[0], expected[0], 1e-5)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(actual))


@pytest.mark.quick
def test_the_reference_follows_the_equation():
    hidden, weight, targets, mask = inputs()
    loss, gradients = jax.jit(jax.value_and_grad(linear_cross_entropy_reference, (0, 1)))(
        hidden, weight, targets, mask
    )
    expected = by_equation(hidden, weight, targets, mask)
    for actual, wanted in zip((loss, *(D_LOSS * g for g in gradients)), expected, strict=True):
        assert_close(actual, wanted)


@pytest.mark.quick
@KINDS
def test_bfloat16_hidden_rows_have_a_float32_loss_and_bfloat16_gradients(frozen):
    hidden, weight, targets, mask = inputs(vocab_size=VOCAB_CHUNK + 1)
    hidden = jnp.asarray(hidden, jnp.bfloat16)
    loss, d_hidden, *_ = run(hidden, weight, targets, mask, frozen=frozen)
    expected_loss, expected_d_hidden, _ = by_equation(hidden, weight, targets, mask)
    assert loss.dtype == jnp.float32
    assert_close(loss, expected_loss)  # the products are float32
    assert d_hidden.dtype == jnp.bfloat16
    # One rounding: D_LOSS is a power of two, so that scaling with it adds none.
    np.testing.assert_allclose(
        np.asarray(d_hidden, np.float64), expected_d_hidden, rtol=1.01 * BF16_ROUNDING, atol=1e-5
    )


# --- heads ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_a_quantised_head_is_the_head_that_its_codes_stand_for(quantize):
    hidden, weight, targets, mask = inputs(vocab_size=VOCAB_CHUNK + 1)
    head = quantize(weight)
    loss, d_hidden, _ = run(hidden, head, targets, mask, frozen=True)
    expected = by_equation(hidden, dequantize(head), targets, mask)
    assert_close(loss, expected[0])
    assert_close(d_hidden, expected[1])


@pytest.mark.quick
@KINDS
def test_a_bfloat16_head_is_widened(frozen):
    hidden, weight, targets, mask = inputs(vocab_size=VOCAB_CHUNK + 1)
    weight = jnp.asarray(weight, jnp.bfloat16)
    loss, d_hidden, d_weight = run(hidden, weight, targets, mask, frozen=frozen)
    expected = by_equation(hidden, weight, targets, mask)
    assert_close(loss, expected[0])
    assert_close(d_hidden, expected[1])
    if not frozen:
        assert d_weight.dtype == jnp.bfloat16
        assert_close(d_weight, expected[2], BF16_ROUNDING)


@pytest.mark.quick
def test_a_frozen_head_has_no_gradient():
    hidden, weight, targets, mask = inputs()
    loss = functools.partial(linear_cross_entropy, frozen=True)
    d_weight = jax.jit(jax.grad(loss, 1))(hidden, weight, targets, mask)
    assert not np.any(d_weight)


@pytest.mark.quick
@pytest.mark.parametrize("quantize", [quantize_int8, quantize_int4])
def test_a_quantised_head_cannot_be_trained(quantize):
    hidden, weight, targets, mask = inputs()
    with pytest.raises(ConfigError, match=r"quantised head cannot be trained.*--base f32"):
        linear_cross_entropy(hidden, quantize(weight), targets, mask, frozen=False)


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@KINDS
def test_rows_that_do_not_count_have_exactly_no_gradient(frozen):
    hidden, weight, targets, mask = inputs(ROW_CHUNK + 1, counted=0.5)
    _, d_hidden, _ = run(hidden, weight, targets, mask, frozen=frozen)
    assert not np.any(d_hidden[~mask])
    assert np.all(np.any(d_hidden[mask], axis=1))


@pytest.mark.quick
@KINDS
@pytest.mark.parametrize("content", [1e30, np.inf])
def test_what_rows_that_do_not_count_hold_does_not_matter(content, frozen):
    hidden, weight, targets, mask = inputs(ROW_CHUNK + 1, counted=0.5)
    mask[0] = False  # the row that padding to whole chunks repeats
    expected = run(hidden, weight, targets, mask, frozen=frozen)
    hidden[~mask] = content
    actual = run(hidden, weight, targets, mask, frozen=frozen)
    for got, wanted in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.quick
@KINDS
def test_no_rows_are_no_loss_and_have_gradients_of_their_shapes(frozen):
    hidden, weight, targets, mask = inputs()
    loss, d_hidden, d_weight = run(hidden[:0], weight, targets[:0], mask[:0], frozen=frozen)
    assert loss == 0
    assert d_hidden.shape == (0, hidden.shape[1])
    assert not np.any(d_weight)


@pytest.mark.quick
@KINDS
def test_no_row_that_counts_is_no_loss_and_no_gradient(frozen):
    hidden, weight, targets, mask = inputs(ROW_CHUNK + 1)
    actual = run(hidden, weight, targets, np.zeros_like(mask), frozen=frozen)
    for x in jax.tree.leaves(actual):
        assert not np.any(x)


# --- memory -----------------------------------------------------------------------------------------------


def temp_bytes_per_logit(loss, argnums):
    """XLA's temporary memory of loss and gradients over the 4 bytes of each logit; compiled, not run."""
    n_rows, vocab_size, width = 2048, 49152, 64
    rows = [jax.ShapeDtypeStruct((n_rows,), dtype) for dtype in (jnp.int32, jnp.bool_)]
    matrices = [jax.ShapeDtypeStruct((n, width), jnp.float32) for n in (n_rows, vocab_size)]
    compiled = jax.jit(jax.value_and_grad(loss, argnums)).lower(*matrices, *rows).compile()
    return xla_memory(compiled).temp_bytes / (4 * n_rows * vocab_size)


@KINDS
def test_logits_are_never_all_in_memory(frozen):
    loss = functools.partial(linear_cross_entropy, frozen=frozen)
    assert temp_bytes_per_logit(loss, 0 if frozen else (0, 1)) < 0.5


def test_logits_of_the_reference_are_all_in_memory():
    """So the measure above does see a buffer of that size."""
    assert temp_bytes_per_logit(linear_cross_entropy_reference, (0, 1)) >= 1


@pytest.mark.parametrize(
    ("vocab_size", "width", "chunk"),
    [(49152, 576, 4096), (151936, 896, 2560), (151936, 2048, 1024), (300, 8192, 300)],
)
def test_a_chunk_of_a_wide_head_has_fewer_rows(vocab_size, width, chunk):
    found, starts = vocab_starts(jax.ShapeDtypeStruct((vocab_size, width), np.float32))
    assert found == chunk
    assert len(starts) == -(-vocab_size // chunk)


@pytest.mark.parametrize("frozen", [True, False])
def test_chunks_of_fewer_rows_give_the_same(frozen, monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_ELEMENTS", 1)
    assert_loss_and_gradients(*inputs(vocab_size=1300), frozen=frozen)
