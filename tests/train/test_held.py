"""Trained weights as they are held: the same numbers whichever way they get there, and never twice."""

import copy

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from edgejax.measure.memory import process_memory
from edgejax.quant import Bfloat16Array, dequantize, is_quantized, quantize_int8
from edgejax.train.held import as_patterns, hold_weights, on_host, take_weights

pytestmark = pytest.mark.quick


def weights(dtype=np.float32):
    random = np.random.default_rng(0)
    kernel = random.standard_normal((3, 16, 64)).astype(np.float32)
    return {
        "embed": {"table": random.standard_normal((32, 64)).astype(dtype)},
        "blocks": {
            "q_proj": {"kernel": kernel.astype(dtype)},
            "norm": {"scale": np.ones((3, 64), np.float32)},
        },
    }


@pytest.mark.parametrize("bfloat16", [True, False])
@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_taken_weights_are_held_ones_and_the_tree_is_emptied(bfloat16, kind):
    params = weights(ml_dtypes.bfloat16 if kind == "bfloat16" else np.float32)
    if kind == "int8":
        params["embed"]["table"] = quantize_int8(params["embed"]["table"])
    wanted = hold_weights(copy.deepcopy(params), bfloat16=bfloat16)
    taken = take_weights(params, bfloat16=bfloat16)
    assert params == {}
    assert jax.tree.structure(taken) == jax.tree.structure(wanted)
    for ours, theirs in zip(jax.tree.leaves(taken), jax.tree.leaves(wanted), strict=True):
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    donate = jax.jit(lambda x: x + x.dtype.type(1), donate_argnums=0)
    before = taken["blocks"]["norm"]["scale"]
    donate(before)
    assert before.is_deleted()


def test_no_more_than_a_leaf_is_there_twice():
    leaf = 32 << 20
    params = {"blocks": {str(k): {"kernel": np.ones((leaf // 4,), np.float32)} for k in range(8)}}
    take_weights({"blocks": {"0": {"kernel": np.ones((leaf // 4,), np.float32)}}}, bfloat16=False)  # compiles
    before = process_memory().rss_bytes
    taken = take_weights(params, bfloat16=False)
    now = process_memory()
    assert now.rss_bytes - before < 3 * leaf
    assert len(jax.tree.leaves(taken)) == 8


def test_patterns_and_back():
    held = hold_weights(weights(), bfloat16=True)
    host = on_host(held)
    again = as_patterns(host)
    assert isinstance(again["embed"]["table"], Bfloat16Array)
    assert again["blocks"]["norm"]["scale"].dtype == jnp.float32
    assert np.shares_memory(again["embed"]["table"].pattern, host["embed"]["table"])
    pairs = zip(
        jax.tree.leaves(again, is_leaf=is_quantized), jax.tree.leaves(held, is_leaf=is_quantized), strict=True
    )
    assert all(np.array_equal(dequantize(a), dequantize(b)) for a, b in pairs)
