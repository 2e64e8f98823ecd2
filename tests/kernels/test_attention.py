"""Attention against its equation in float64: values, gradients, masks, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgejax.kernels.attention import (
    attention,
    attention_keeping,
    attention_recalled,
    attention_reference,
    tiles,
)
from edgejax.measure.memory import xla_memory

HEADS = [(2, 2), (6, 2), (4, 1)]  # H = K, H = 3 K, K = 1
LENGTHS = [1, 7, 127, 128, 129, 300]  # around the query block of 128
BUNDLED = 1100  # 9 query blocks, more than there are bundles: those of one bundle run in a loop
SCALE = 0.4
BF16_ROUNDING = 2.0**-8  # of 8 bits, to nearest, relative


def inputs(length, heads=(6, 2), width=8, batch=1, seed=0):
    """q, k, v and the cotangent of the output, float32; scores spread over several units."""
    rng = np.random.default_rng(seed)
    n_heads, n_kv = heads
    shapes = [(batch, length, n, width) for n in (n_heads, n_kv, n_kv, n_heads)]
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def segments_of(length, batch=1):
    """Rows of two or three documents, the last row padded at its end with segment 0; cuts differ between rows."""
    at = np.arange(length)
    rows = [1 + (at >= length // (2 + b)) + (at >= length - length // (3 + b)) for b in range(batch)]
    rows[-1][length - length // 5 :] = 0
    return np.stack(rows).astype(np.int32)


def by_equation(q, k, v, segments=None, *, scale=SCALE, window=None):
    """Row after row in float64: a query takes the keys that it may see and nothing else."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    batch, length, n_heads, _ = q.shape
    of_query_head = np.arange(n_heads) // (n_heads // k.shape[2])
    out = np.zeros_like(q)
    for b in range(batch):
        for t in range(length):
            seen = np.arange(0 if window is None else max(0, t - window + 1), t + 1)
            if segments is not None:
                seen = seen[segments[b, seen] == segments[b, t]]
            scores = scale * np.einsum("hc,shc->hs", q[b, t], k[b, seen][:, of_query_head])
            weights = np.exp(scores - scores.max(axis=1, keepdims=True))
            weights /= weights.sum(axis=1, keepdims=True)
            out[b, t] = np.einsum("hs,shc->hc", weights, v[b, seen][:, of_query_head])
    return out


def torch_gradients(q, k, v, d_out, segments=None, *, scale=SCALE, window=None):
    """dq, dk, dv in float64 from torch's own attention."""
    torch = pytest.importorskip("torch")
    q, k, v, d_out = (torch.tensor(np.asarray(x, np.float64)) for x in (q, k, v, d_out))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])[None, :]
    seen = (distance >= 0)[None] & (distance < (window or q.shape[1]))
    if segments is not None:
        ids = torch.tensor(segments)
        seen = seen & (ids[:, :, None] == ids[:, None, :])
    for x in (q, k, v):
        x.requires_grad_()
    heads_first = (x.transpose(1, 2) for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(
        *heads_first, attn_mask=seen[:, None], scale=scale, enable_gqa=True
    )
    out.transpose(1, 2).backward(d_out)
    return [x.grad.numpy() for x in (q, k, v)]


@functools.partial(jax.jit, static_argnames=("scale", "window"))
def run(q, k, v, d_out, segments=None, use_window=None, *, scale, window=None):
    """The output, and the gradients that belong to the cotangent ``d_out``."""
    op = functools.partial(attention, scale=scale, window=window, use_window=use_window)
    out, pull_back = jax.vjp(lambda q, k, v: op(q, k, v, segments), q, k, v)
    return out, pull_back(d_out)


def assert_close(actual, expected, relative):
    """No element is off by more than ``relative`` of the largest one (of 0.01 where all of them vanish)."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=0, atol=relative * max(np.abs(expected).max(), 0.01))


def assert_values_and_gradients(q, k, v, d_out, segments=None, *, window=None):
    out, gradients = run(q, k, v, d_out, segments, scale=SCALE, window=window)
    assert_close(out, by_equation(q, k, v, segments, window=window), 1e-5)
    expected = torch_gradients(q, k, v, d_out, segments, window=window)
    for actual, wanted in zip(gradients, expected, strict=True):
        assert_close(actual, wanted, 1e-4)


# --- values and gradients ---------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_has_its_values(length):
    q, k, v, d_out = inputs(length, batch=2)
    segments = segments_of(length, batch=2)
    out, _ = run(q, k, v, d_out, segments, scale=SCALE)
    assert_close(out, by_equation(q, k, v, segments), 1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_length_has_its_gradients(length):
    assert_values_and_gradients(*inputs(length, batch=2), segments_of(length, batch=2))


@pytest.mark.quick
def test_gradients_follow_finite_differences_of_the_equation():
    q, k, v, d_out = inputs(23, seed=1)
    segments = segments_of(23)
    _, gradients = run(q, k, v, d_out, segments, scale=0.5, window=6)
    step, rng = 1e-5, np.random.default_rng(2)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=gradient.shape)
        loss = []
        for sign in (1, -1):
            moved = [x + sign * step * direction if i == j else x for j, x in enumerate((q, k, v))]
            loss.append(np.sum(by_equation(*moved, segments, scale=0.5, window=6) * d_out))
        slope = (loss[0] - loss[1]) / (2 * step)
        assert np.sum(gradient * direction) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("width", [8, 64])
@pytest.mark.parametrize("heads", HEADS, ids=lambda heads: "H{}K{}".format(*heads))
def test_every_grouping_of_heads_has_its_values_and_gradients(heads, width):
    assert_values_and_gradients(*inputs(40, heads, width, batch=2))


@pytest.mark.parametrize("window", [1, 2, 100, 128, 129, 130, 1000])
def test_a_query_sees_as_many_keys_as_its_window_has(window):
    assert_values_and_gradients(*inputs(300, (3, 1)), window=window)


@pytest.mark.parametrize("window", [None, 200])
def test_many_query_blocks_follow_the_equation(window):
    block = tiles.query_block(BUNDLED)
    bundles = tiles.plan_bundles(-(-BUNDLED // block) * block, block, None)
    assert any(b.n_blocks > 1 for b in bundles)  # else this tests nothing that the shorter rows do not
    assert_values_and_gradients(*inputs(BUNDLED, (2, 1)), segments_of(BUNDLED), window=window)


@pytest.mark.quick
def test_scores_of_thousands_do_not_overflow():
    q, k, v, d_out = inputs(33)
    out, gradients = run(100 * q, 100 * k, v, d_out, scale=SCALE)
    assert_close(out, by_equation(100 * q, 100 * k, v), 1e-2)  # a score of 1e4 has 3 digits behind it
    assert all(np.isfinite(x).all() for x in gradients)


@pytest.mark.quick
def test_the_reference_follows_the_equation():
    q, k, v, _ = inputs(31, batch=2)
    segments = segments_of(31, batch=2)
    out = attention_reference(q, k, v, segments, scale=SCALE, window=9)
    assert_close(out, by_equation(q, k, v, segments, window=9), 1e-5)


@functools.cache
def in_blocks_of_8(window):
    """A program for 40 positions in 5 query blocks and 2 bundles: as much structure as a long row has."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "QUERY_BLOCK", 8)
        patch.setattr(tiles, "MAX_BUNDLES", 2)
        q, k, v, _ = inputs(40, (2, 1))
        op = functools.partial(attention, scale=SCALE, window=window)
        return jax.jit(op).lower(q, k, v, segments_of(40)).compile()


@pytest.mark.quick
@settings(max_examples=20)
@given(
    seed=st.integers(0, 1000),
    segments=st.lists(st.integers(0, 2), min_size=40, max_size=40),
    window=st.sampled_from([None, 1, 7, 8, 10]),
)
def test_any_segments_and_window_follow_the_equation(seed, segments, window):
    q, k, v, _ = inputs(40, (2, 1), seed=seed)
    segments = np.asarray([segments], np.int32)
    out = in_blocks_of_8(window)(q, k, v, segments)
    assert_close(out, by_equation(q, k, v, segments, window=window), 1e-5)


# --- masks ------------------------------------------------------------------------------------------------


@pytest.mark.quick
@pytest.mark.parametrize("use_window", [True, False])
def test_flag_decides_at_run_time_whether_the_window_holds(use_window):
    q, k, v, d_out = inputs(50)
    out, gradients = run(q, k, v, d_out, None, jnp.array(use_window), scale=SCALE, window=5)
    fixed, fixed_gradients = run(q, k, v, d_out, scale=SCALE, window=5 if use_window else None)
    assert_close(out, fixed, 1e-6)
    for actual, expected in zip(gradients, fixed_gradients, strict=True):
        assert_close(actual, expected, 1e-6)


@pytest.mark.quick
def test_two_documents_in_a_row_are_the_two_documents_alone():
    cut = 60
    packed = inputs(160)  # the second document crosses a query block
    segments = (1 + (np.arange(160) >= cut)).astype(np.int32)[None]
    together = jax.tree.leaves(run(*packed, segments, scale=SCALE))
    first = jax.tree.leaves(run(*(x[:, :cut] for x in packed), scale=SCALE))
    second = jax.tree.leaves(run(*(x[:, cut:] for x in packed), scale=SCALE))
    for actual, *alone in zip(together, first, second, strict=True):
        assert_close(actual, np.concatenate(alone, axis=1), 1e-5)


@pytest.mark.quick
def test_padding_does_not_reach_the_documents():
    real = 130
    q, k, v, d_out = inputs(150)
    segments = (np.arange(150) < real).astype(np.int32)[None]
    d_out[:, real:] = 0  # no loss on padding
    out, gradients = run(q, k, v, d_out, segments, scale=SCALE)
    for x in (q, k, v):
        x[:, real:] *= 1e4
    other_out, other_gradients = run(q, k, v, d_out, segments, scale=SCALE)
    np.testing.assert_array_equal(out[:, :real], other_out[:, :real])
    assert np.isfinite(other_out).all()
    for gradient, other in zip(gradients, other_gradients, strict=True):
        np.testing.assert_array_equal(gradient[:, :real], other[:, :real])
        assert not np.any(other[:, real:])


# --- bfloat16 ---------------------------------------------------------------------------------------------


def bfloat16_inputs():
    return [jnp.asarray(x, jnp.bfloat16) for x in inputs(129)]


@pytest.mark.quick
def test_bfloat16_output_is_the_float64_output_rounded_once():
    """The inputs are exact, products and softmax float32: only the last rounding may show."""
    q, k, v, d_out = bfloat16_inputs()
    out, _ = run(q, k, v, d_out, scale=SCALE)
    assert out.dtype == jnp.bfloat16
    expected = by_equation(q, k, v)
    np.testing.assert_allclose(np.asarray(out, np.float64), expected, rtol=1.01 * BF16_ROUNDING, atol=1e-5)


def test_bfloat16_gradients_are_off_by_two_roundings():
    """Of the largest element: one rounding of the gradient, and one of the output kept for the backward pass."""
    q, k, v, d_out = bfloat16_inputs()
    _, gradients = run(q, k, v, d_out, scale=SCALE)
    for actual, expected in zip(gradients, torch_gradients(q, k, v, d_out), strict=True):
        assert actual.dtype == jnp.bfloat16
        assert_close(actual, expected, 2 * BF16_ROUNDING)


# --- memory -----------------------------------------------------------------------------------------------


@functools.cache
def temp_bytes(length, with_segments):
    """XLA's temporary memory of forward and backward; compiled, not run."""
    q, kv = (jax.ShapeDtypeStruct((1, length, n_heads, 64), jnp.float32) for n_heads in (9, 3))
    segments = jax.ShapeDtypeStruct((1, length), jnp.int32) if with_segments else None
    lowered = run.lower(q, kv, kv, q, segments, scale=SCALE)
    # Buffers are assigned before LLVM runs; without its optimisation the same figure comes in a third of the time.
    compiled = lowered.compile(compiler_options={"xla_backend_optimization_level": 0})
    return xla_memory(compiled).temp_bytes


@pytest.mark.parametrize("with_segments", [False, True], ids=["one document", "segments"])
def test_twice_the_length_takes_twice_the_memory(with_segments):
    ratio = temp_bytes(2048, with_segments) / temp_bytes(1024, with_segments)
    assert 1.5 <= ratio <= 2.2  # a score matrix would take 4 times the memory


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("length", LENGTHS)
def test_recalled_attention_gives_what_is_given_and_has_the_derivative(length, window):
    q, k, v, d_out = inputs(length)
    segments, how = segments_of(length), {"scale": SCALE, "window": window}
    expected, pull = jax.vjp(lambda q, k, v: attention(q, k, v, segments, **how), q, k, v)
    out, lse = attention_keeping(q, k, v, segments, **how)
    found, pull_again = jax.vjp(
        lambda q, k, v: attention_recalled(q, k, v, out, lse, segments, **how), q, k, v
    )
    assert np.array_equal(out, expected)
    assert np.array_equal(found, expected)
    for ours, theirs in zip(pull_again(d_out), pull(d_out), strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-6 * float(np.abs(theirs).max()) + 1e-30)
    other = attention_recalled(q, k, v, 2 * out, lse, segments, **how)
    assert np.array_equal(other, 2 * np.asarray(out))
