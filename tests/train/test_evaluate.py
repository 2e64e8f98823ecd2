"""Held-out loss: the mean over counted tokens, whatever the batch size and packing."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.tiny_run import LORA, make_model, make_rows

from edgejax.core.errors import DataError
from edgejax.data import Document, pack_documents
from edgejax.models import Decoder, init_lora, logits
from edgejax.train import EvalResult, evaluate, evaluate_with, make_eval_step


def oracle(model, documents):
    """Mean next-token loss, one document at a time, from all logits in float64."""
    losses = []
    decoder = Decoder(model.config)
    all_logits = jax.jit(lambda tokens: logits(decoder, model.params, {}, tokens))
    for document in documents:
        tokens = np.asarray(document.tokens)
        z = np.asarray(all_logits(jnp.asarray(tokens)[None]), np.float64)[0, :-1]
        log_p = (
            z - np.log(np.exp(z - z.max(-1, keepdims=True)).sum(-1, keepdims=True)) - z.max(-1, keepdims=True)
        )
        counted = np.asarray(document.loss)[1:]
        losses += (-log_p[np.arange(len(z)), tokens[1:]])[counted].tolist()
    return float(np.mean(losses)), len(losses)


@pytest.fixture(scope="module")
def documents():
    random = np.random.default_rng(3)
    lengths = (7, 9, 7, 7, 9)  # two programs to compile; packed into rows of 16 they share them
    return [
        Document(random.integers(0, 61, n).astype(np.int32), np.arange(n) >= n // 3, f"{i}")
        for i, n in enumerate(lengths)
    ]


@pytest.mark.quick
def test_loss_is_the_mean_over_tokens_for_every_batch_size(documents):
    model = make_model()
    expected, n_tokens = oracle(model, documents)
    for batch_size in (1, 4):
        rows = pack_documents(documents, seq_length=16)
        result = evaluate(Decoder(model.config), {}, model.params, rows, batch_size=batch_size)
        assert result.n_tokens == n_tokens
        assert result.loss == pytest.approx(expected, rel=1e-5)
        assert result.perplexity == pytest.approx(np.exp(expected), rel=1e-4)


def test_adapters_and_full_mode(documents):
    model = make_model()
    rows = pack_documents(documents, seq_length=16)
    base = evaluate(Decoder(model.config), {}, model.params, rows, batch_size=2)
    adapters = init_lora(model.config, LORA, jax.random.key(0))
    decoder = Decoder(model.config, LORA)
    assert evaluate(decoder, adapters, model.params, rows, batch_size=2).loss == pytest.approx(
        base.loss, rel=1e-6
    )
    moved = jax.tree.map(lambda leaf: leaf + 0.3, adapters)
    assert abs(evaluate(decoder, moved, model.params, rows, batch_size=2).loss - base.loss) > 1e-4
    full = evaluate(Decoder(model.config), model.params, {}, rows, batch_size=2, mode="full")
    assert full.loss == pytest.approx(base.loss, rel=1e-6)


def test_max_rows_and_stopping():
    model, rows = make_model(), make_rows()
    step = make_eval_step(Decoder(model.config), mode="lora")
    some = evaluate_with(step, {}, model.params, rows, batch_size=1, max_rows=2)
    assert 0 < some.n_tokens < evaluate_with(step, {}, model.params, rows, batch_size=1).n_tokens
    answers = iter([False, False, True])
    assert (
        evaluate_with(step, {}, model.params, rows, batch_size=1, should_stop=lambda: next(answers)) is None
    )


@pytest.mark.quick
def test_nothing_that_counts():
    model = make_model()
    rows = make_rows(n_documents=2)
    silent = dataclasses.replace(rows, loss=np.zeros_like(rows.loss))
    with pytest.raises(DataError, match="no token whose loss counts"):
        evaluate(Decoder(model.config), {}, model.params, silent)


@pytest.mark.quick
def test_perplexity_that_overflows_is_infinite():
    assert EvalResult(loss=1e4, n_tokens=1).perplexity == float("inf")
