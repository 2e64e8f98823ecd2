"""Logits, losses and gradients against ``transformers`` and ``peft``, for every family.

Written from the contract alone. Bounds: logits 2e-4 of the largest one; loss 1e-5; each tensor of each layer has a
gradient of cosine 0.99999 with theirs and a norm within 1e-4.
"""

import dataclasses

import jax
import numpy as np
import pytest

from edgejax.data import Batch
from edgejax.models import LINEAR_NAMES, Decoder, LoraConfig, logits, loss
from edgejax.weights.load import load_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
from helpers import oracle  # noqa: E402

LONG = 300  # three query blocks, the last one not full; far beyond the sliding window
IGNORE = -100  # the label that transformers leaves out
OFF = {  # for each family, what makes it itself: without it the logits must be others
    "llama": {"rope_theta": 20_000.0},
    "llama3-rope": {"rope_scaling": None},
    "llama-biases": {"norm_eps": 1e-2},
    "qwen2": {"rope_theta": 20_000.0},
    "qwen3": {"norm_eps": 1e-2},
    "gemma3": {"sliding_window": 14},
    "gemma3-linear-rope": {"rope_scaling": None},
}


@pytest.fixture(scope="module", params=oracle.FAMILIES)
def case(request, tmp_path_factory):
    """(family, their model, the same model loaded by edgejax)."""
    theirs, folder = oracle.saved_model(request.param, tmp_path_factory.mktemp(request.param))
    model = load_model(folder, base="f32", need_tokenizer=False)
    assert model.notes == ()
    return request.param, theirs, model


def rows(length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random tokens ``[2, T]`` and their labels, a fifth of which (and a whole stretch) do not count."""
    random = np.random.default_rng(seed)
    tokens = random.integers(0, 300, (2, length))
    ignored = random.random(tokens.shape) < 0.2
    ignored[1, length // 3 : length // 2] = True
    return tokens, np.where(ignored, IGNORE, tokens)


def our_batch(tokens: np.ndarray, labels: np.ndarray) -> Batch:
    """The same as a batch of ours: targets are labels moved one to the left."""
    targets = np.concatenate([labels[:, 1:], np.full((len(labels), 1), IGNORE)], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    to_int = np.int32
    return Batch(
        tokens.astype(to_int), np.maximum(targets, 0).astype(to_int), targets != IGNORE,
        np.ones(tokens.shape, to_int), positions.astype(to_int),
    )  # fmt: skip


def their_logits(model, tokens) -> np.ndarray:
    with torch.no_grad():
        return model(torch.as_tensor(tokens)).logits.numpy()


def their_gradients(model, tokens, labels) -> tuple[float, dict[str, np.ndarray]]:
    """Their own mean loss and its gradients by name."""
    model.zero_grad()
    mean_loss = model(torch.as_tensor(tokens), labels=torch.as_tensor(labels)).loss
    mean_loss.backward()
    return mean_loss.item(), {n: p.grad.numpy() for n, p in model.named_parameters() if p.requires_grad}


def our_gradients(decoder, params, adapters, batch, *, mode: str, remat: str):
    """Mean loss and gradient tree of ours."""

    def mean(trained, params, batch):
        base, extra = (params, trained) if mode == "lora" else (trained, {})
        total, count = loss(decoder, base, extra, batch, frozen_head=mode == "lora", remat=remat)
        return total / count

    trained, frozen = (adapters, params) if mode == "lora" else (params, {})
    value, gradient = jax.jit(jax.value_and_grad(mean))(trained, frozen, batch)
    return float(value), jax.tree.map(np.asarray, gradient)


def assert_same_direction(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:
    a, b = ours.astype(np.float64).ravel(), theirs.astype(np.float64).ravel()
    assert a.shape == b.shape, name
    norm_a, norm_b = np.linalg.norm(a), np.linalg.norm(b)
    assert norm_b > 1e-9, f"{name}: their gradient is zero, it shows nothing"
    assert a @ b / (norm_a * norm_b) >= 0.99999, name
    assert abs(norm_a / norm_b - 1) <= 1e-4, name


def assert_close_logits(ours, theirs) -> None:
    assert np.abs(np.asarray(ours) - theirs).max() <= 2e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("length", [37, LONG])
def test_logits(case, length):
    _, theirs, model = case
    tokens, _ = rows(length)
    ours = jax.jit(lambda p, t: logits(Decoder(model.config), p, {}, t))(
        model.params, tokens.astype(np.int32)
    )
    assert_close_logits(ours, their_logits(theirs, tokens))


def test_logits_change_with_what_makes_the_family(case):
    family, theirs, model = case
    tokens, _ = rows(37)
    other = Decoder(dataclasses.replace(model.config, **OFF[family]))
    ours = jax.jit(lambda p, t: logits(other, p, {}, t))(model.params, tokens.astype(np.int32))
    expected = their_logits(theirs, tokens)
    assert np.abs(np.asarray(ours) - expected).max() > 10 * 2e-4 * np.abs(expected).max()


def test_loss_and_gradients_of_all_parameters(case):
    family, theirs, model = case
    tokens, labels = rows(LONG)
    their_loss, expected = their_gradients(theirs, tokens, labels)
    our_loss, gradient = our_gradients(
        Decoder(model.config), model.params, {}, our_batch(tokens, labels), mode="full", remat="none"
    )
    assert abs(our_loss / their_loss - 1) <= 1e-5
    seen = set()
    for name, theirs_here in expected.items():
        path, layer = oracle.our_path(name, four_norms=family.startswith("gemma3"))
        assert_same_direction(name, oracle.leaf_at(gradient, path, layer), theirs_here)
        seen.add(path)
    ours = {tuple(k.key for k in path) for path, _ in jax.tree_util.tree_leaves_with_path(gradient)}
    assert seen == ours  # no leaf of ours is without a counterpart


def compare_lora(theirs, model, *, remat: str, **settings) -> None:
    tokens, labels = rows(LONG, seed=1)
    wrapped = oracle.with_peft(theirs, **settings)
    try:
        plain = {k: v for k, v in settings.items() if k in ("rank", "alpha", "rslora")}
        lora = LoraConfig(targets=tuple(settings.get("targets", LINEAR_NAMES)), **plain)
        decoder, adapters = Decoder(model.config, lora), oracle.adapters_of(wrapped)
        assert set(adapters["blocks"]) == set(lora.targets)
        their_loss, expected = their_gradients(wrapped, tokens, labels)
        our_loss, gradient = our_gradients(
            decoder, model.params, adapters, our_batch(tokens, labels), mode="lora", remat=remat
        )
        assert abs(our_loss / their_loss - 1) <= 1e-5
        assert len(expected) == 2 * len(lora.targets) * model.config.n_layers
        for name, theirs_here in expected.items():
            assert_same_direction(name, oracle.leaf_at(gradient, *oracle.our_adapter_path(name)), theirs_here)
        theirs_now = their_logits(wrapped, tokens[:, :37])
    finally:
        wrapped.unload()
        theirs.requires_grad_(True)
    short = tokens[:, :37].astype(np.int32)
    assert_close_logits(
        jax.jit(lambda p, a: logits(decoder, p, a, short))(model.params, adapters), theirs_now
    )
    base = their_logits(theirs, tokens[:, :37])
    assert np.abs(theirs_now - base).max() > 0.02 * np.abs(base).max()  # the adapters matter


def test_loss_and_gradients_of_adapters(case):
    pytest.importorskip("peft")
    _, theirs, model = case
    compare_lora(theirs, model, remat="full", rank=4, alpha=6.0)


@pytest.mark.parametrize(
    "settings",
    [
        dict(rank=9, alpha=5.0, rslora=True),  # alpha / 3, not alpha / 9
        dict(rank=4, alpha=8.0, targets=("v_proj", "down_proj")),
        dict(rank=1, alpha=2.0, targets=("k_proj",)),
    ],
    ids=["rslora", "two-targets", "one-target"],
)
def test_other_adapter_settings(tmp_path, settings):
    pytest.importorskip("peft")
    theirs, folder = oracle.saved_model("llama-biases", tmp_path)
    model = load_model(folder, base="f32", need_tokenizer=False)
    compare_lora(theirs, model, remat="attention", b_std=0.3, **settings)
