"""A LoRA fine-tuning made twice over the same batches: by torch and ``peft``, and by edgejax.

Needs torch and peft; tests import this file only after ``pytest.importorskip``.
"""

import math

import jax
import numpy as np
import torch

from edgejax.data import Batch
from edgejax.models import Decoder, LoraConfig
from edgejax.train import TrainSettings, init_state, make_optimizer, make_schedule, make_train_step
from helpers import oracle

IGNORE = -100  # the label that transformers leaves out


def packed_batch(tokens: np.ndarray, labels: np.ndarray, micro_batches: int) -> Batch:
    """Rows ``[A * B, T]`` in transformers' form as a step of ours: ``[A, B, T]``, targets one to the left."""
    targets = np.concatenate([labels[:, 1:], np.full((len(labels), 1), IGNORE)], axis=1)
    positions = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    leaves = (tokens, np.maximum(targets, 0), targets != IGNORE, np.ones_like(tokens), positions)
    shape = (micro_batches, len(tokens) // micro_batches, tokens.shape[1])
    return Batch(*(x.reshape(shape).astype(bool if x.dtype == bool else np.int32) for x in leaves))


def our_run(config, params, adapters, lora: LoraConfig, settings: TrainSettings, batches):
    """(losses, gradient norms, adapters at the end); ``batches``: pairs of tokens and labels ``[A * B, T]``."""
    schedule = make_schedule("cosine", settings.learning_rate, steps=settings.steps, warmup=settings.warmup)
    optimizer = make_optimizer(
        "adamw", schedule, weight_decay=settings.weight_decay, clip_norm=settings.clip_norm
    )
    step = make_train_step(Decoder(config, lora), optimizer, mode="lora", remat=settings.remat)
    state, figures = init_state(jax.tree.map(jax.numpy.array, adapters), optimizer), []
    for tokens, labels in batches:
        state, metrics = step(state, params, packed_batch(tokens, labels, settings.accumulate))
        figures.append((float(metrics["loss"]), float(metrics["grad_norm"])))
    return *np.transpose(figures), jax.device_get(state.trainable)


def their_run(wrapped, settings: TrainSettings, batches):
    """The same by ``torch.optim.AdamW`` on a ``peft`` model, which is changed."""
    n, warmup = settings.steps, settings.warmup

    def share_of_the_peak(i: int) -> float:
        return (i + 1) / warmup if i < warmup else (1 + math.cos(math.pi * (i - warmup) / (n - warmup))) / 2

    trained = [values for values in wrapped.parameters() if values.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=settings.weight_decay)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_the_peak)
    figures = []
    for tokens, labels in batches:
        optimizer.zero_grad()
        loss = wrapped(torch.as_tensor(tokens), labels=torch.as_tensor(labels)).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.step()
        schedule.step()
        figures.append((loss.item(), norm.item()))
    return *np.transpose(figures), oracle.adapters_of(wrapped)


def distance(ours, theirs, start) -> float:
    """How far two trained trees are apart, as a share of the way that theirs went from the start."""

    def flat(tree) -> np.ndarray:
        return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])

    return float(np.linalg.norm(flat(ours) - flat(theirs)) / np.linalg.norm(flat(theirs) - flat(start)))
