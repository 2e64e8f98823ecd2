"""What the benchmark trains on: real weights and text, or random ones of a known shape."""

import dataclasses
import hashlib
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from edgejax.cli.bench_settings import BenchSettings
from edgejax.core.arrays import PyTree
from edgejax.core.cache import cache_dir
from edgejax.core.errors import ConfigError, WeightsError
from edgejax.data import Batch
from edgejax.data.corpora import python_reference
from edgejax.data.dataset import micro_batches, pack_documents
from edgejax.data.documents import Document, encode_records
from edgejax.data.tokenizer import Tokenizer
from edgejax.models import ModelConfig
from edgejax.models.shapes import find_shape
from edgejax.weights.leaves import check_base
from edgejax.weights.load import abstract_params, load_params, open_model
from edgejax.weights.packed_file import open_packed
from edgejax.weights.random import RandomSource

TEXT = "python-reference"


class BenchInputs(NamedTuple):
    """A model and the batches it is timed on.

    Attributes:
      config: the decoder's.
      abstract_params: shapes and dtypes of the base as it is held; with the schedule streamed, the packed file.
      load: reads or makes the base.
      batch_at: leaves ``[A, B, T]`` of a step, by its number; every position holds a token that counts.
      hashes: SHA-256 of the model's file and of the tokens.
    """

    config: ModelConfig
    abstract_params: PyTree
    load: Callable[[], PyTree]
    batch_at: Callable[[int], Batch]
    hashes: dict[str, str]


def open_inputs(settings: BenchSettings) -> BenchInputs:
    """Batches of a benchmark, and its model before its weights are read.

    Raises:
      ConfigError, WeightsError, DataError: what cannot be loaded.
    """
    base = "f32" if settings.mode == "full" and not settings.bfloat16 else settings.base
    if settings.schedule == "streamed":
        return _packed_inputs(settings)
    if settings.random_weights:
        return _random_inputs(settings, base)
    model = open_model(settings.model, base=check_base(base))
    _check_length(settings, model.config)
    if model.tokenizer is None:
        raise WeightsError(f"{model.source.path} has no tokenizer to read text with; try --random-weights")
    tokens = _text_tokens(model.tokenizer, settings)
    batch_at = _batches(tokens, settings)
    hashes = {"model": model.source.sha256, TEXT: _sha256(tokens)}
    model = dataclasses.replace(model, tokenizer=None)  # some ten megabytes that training does not need
    return BenchInputs(model.config, model.abstract_params(), lambda: model.load().params, batch_at, hashes)


def _random_inputs(settings: BenchSettings, base: str) -> BenchInputs:
    config = find_shape(settings.model)
    _check_length(settings, config)
    n_tokens = _tokens_needed(settings)
    tokens = np.random.default_rng(settings.seed).integers(0, config.vocab_size, n_tokens, dtype=np.int32)
    source = RandomSource(config, settings.seed)

    def make() -> PyTree:  # leaf by leaf, as a file is read
        return jax.device_put(load_params(source, check_base(base), []))

    shapes = abstract_params(source, check_base(base))
    return BenchInputs(config, shapes, make, _batches(tokens, settings), {"tokens": _sha256(tokens)})


def _packed_inputs(settings: BenchSettings) -> BenchInputs:
    """A packed file: the one that is named, or one made of the model in a process of its own, and kept."""
    path = Path(settings.model)
    if settings.random_weights or not path.is_file():
        path = cache_dir() / "packed" / f"{path.name}-{settings.base}-{settings.seed}.ejx"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            random = ["--random-weights", "--seed", str(settings.seed)] if settings.random_weights else []
            named = ["--model", settings.model, "--base", settings.base, "--out", str(path)]
            command = [sys.executable, "-m", "edgejax", "pack", *named, *random]
            if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
                raise WeightsError(f"{settings.model} could not be packed to {path}")
    source = open_packed(path)
    _check_length(settings, source.config)
    tokens = np.random.default_rng(settings.seed).integers(
        0, source.config.vocab_size, _tokens_needed(settings), dtype=np.int32
    )
    hashes = {"model": source.sha256, "tokens": _sha256(tokens)}
    return BenchInputs(source.config, source, lambda: source, _batches(tokens, settings), hashes)


def _check_length(settings: BenchSettings, config: ModelConfig) -> None:
    if settings.seq > config.max_position:
        raise ConfigError(
            f"--seq {settings.seq} is beyond the model's context of {config.max_position} tokens"
        )


def _tokens_needed(settings: BenchSettings) -> int:
    return settings.tokens_per_step * (1 + settings.warmup + settings.repeats) + 1


def _text_tokens(tokenizer: Tokenizer, settings: BenchSettings) -> np.ndarray:
    """Enough of the corpus for every step; all of it if it is shorter, then steps see it again."""
    needed, n_tokens = _tokens_needed(settings), 0
    parts: list[np.ndarray] = []
    for record in python_reference():
        parts.extend(document.tokens for document in encode_records([record], tokenizer))
        n_tokens += len(parts[-1])
        if n_tokens >= needed:
            break
    return np.concatenate(parts)[:needed]


def _batches(tokens: np.ndarray, settings: BenchSettings) -> Callable[[int], Batch]:
    """One document without an end, so that rows are full: cut to whole rows and packed."""
    n_rows = (len(tokens) - 1) // settings.seq
    if n_rows == 0:
        raise ConfigError(f"the text has {len(tokens)} tokens, fewer than a row of --seq {settings.seq}")
    tokens = tokens[: n_rows * settings.seq + 1]
    document = Document(tokens, np.ones(len(tokens), bool), "benchmark")
    rows = pack_documents([document], settings.seq)
    return lambda step: micro_batches(rows, step, settings.accumulate, settings.batch, settings.seed)


def _sha256(tokens: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(tokens, "<i4").tobytes()).hexdigest()
