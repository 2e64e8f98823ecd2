"""Training follows torch and peft: same model, same first adapters, same batches, AdamW with the same settings.

(The same with SmolLM2-135M is in tests/weights/test_real_model.py, beside the model it needs.)
"""

import numpy as np
import pytest

from edgejax.models import LoraConfig
from edgejax.train import TrainSettings
from edgejax.weights.load import load_model

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("peft")
from helpers import curves, oracle  # noqa: E402

STEPS, ROWS, T = 30, 4, 48
SETTINGS = TrainSettings(
    steps=STEPS,
    accumulate=2,
    learning_rate=1e-2,
    warmup=5,
    weight_decay=0.1,
    clip_norm=1.0,
    remat="attention",
)


def batches() -> list[tuple[np.ndarray, np.ndarray]]:
    """Sequences that count in steps of one to four with some noise, a fifth of them not counted."""
    random = np.random.default_rng(0)
    made = []
    for _ in range(STEPS):
        tokens = random.integers(300, size=(ROWS, 1)) + np.arange(T) * random.integers(1, 5, (ROWS, 1))
        tokens = np.where(random.random((ROWS, T)) < 0.1, random.integers(0, 300, (ROWS, T)), tokens % 300)
        made.append((tokens, np.where(random.random((ROWS, T)) < 0.2, curves.IGNORE, tokens)))
    return made


def test_thirty_steps_follow_torch(tmp_path):
    theirs, folder = oracle.saved_model("llama", tmp_path)
    model = load_model(folder, base="f32", need_tokenizer=False)
    wrapped = oracle.with_peft(theirs, rank=4, alpha=8.0, b_std=0.0)
    start = oracle.adapters_of(wrapped)
    expected, expected_norms, expected_end = curves.their_run(wrapped, SETTINGS, batches())
    lora = LoraConfig(rank=4, alpha=8.0)
    losses, norms, end = curves.our_run(model.config, model.params, start, lora, SETTINGS, batches())
    assert len(losses) == STEPS
    # Measured: 6e-7, 3e-6 and 9e-6.
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    np.testing.assert_allclose(norms, expected_norms, rtol=1e-4)
    assert curves.distance(end, expected_end, start) < 1e-3
    # It is a run in which something happens: gradients are clipped, and the loss falls.
    assert (norms > SETTINGS.clip_norm).any()
    assert (norms < SETTINGS.clip_norm).any()
    assert np.mean(losses[-5:]) < np.mean(losses[:5]) - 0.1
