"""A decoder, data and a run small enough to be made in a moment; shared by the tests of this folder."""

import dataclasses
import hashlib

import jax
import numpy as np

from edgejax.data import Document, PackedDataset, pack_documents
from edgejax.models import Decoder, LoraConfig, ModelConfig
from edgejax.train import TrainSettings

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    d_model=16,
    n_layers=2,
    n_heads=2,
    n_kv_heads=1,
    head_dim=8,
    d_ff=24,
    max_position=64,
)
LORA = LoraConfig(rank=2, alpha=4.0)
# Matrices of a layer are large enough for narrow moments.
WIDER = dataclasses.replace(CONFIG, d_model=64, d_ff=96, n_heads=4, head_dim=16)


@dataclasses.dataclass(frozen=True)
class Source:
    name: str = "tiny"
    path: str = "made by a test"
    format: str = "huggingface"
    sha256: str = hashlib.sha256(b"tiny").hexdigest()
    base: str = "f32"


@dataclasses.dataclass(frozen=True)
class Model:
    config: ModelConfig
    params: dict
    source: Source = dataclasses.field(default_factory=Source)
    notes: tuple[str, ...] = ()


def make_model(seed: int = 7, config: ModelConfig = CONFIG, **source) -> Model:
    """Seeded weights, made by numpy: the same in every process, and nothing to compile."""
    shapes = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0)))
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        is_scale = path[-1].key == "scale"
        values = np.ones(leaf.shape) if is_scale else 0.3 * random.standard_normal(leaf.shape)
        return values.astype(np.float32)

    return Model(config, jax.tree_util.tree_map_with_path(fill, shapes), Source(**source))


def make_rows(seed: int = 0, n_documents: int = 12) -> PackedDataset:
    """Counting sequences with some noise: there is something to learn in few steps."""
    random = np.random.default_rng(seed)
    documents = []
    for i in range(n_documents):
        length = int(random.integers(6, 30))
        tokens = (random.integers(61) + np.arange(length) * random.integers(1, 3)) % 61
        documents.append(Document(tokens.astype(np.int32), np.ones(length, bool), f"{seed}:{i}"))
    return pack_documents(documents, seq_length=16)


def make_settings(**changes) -> TrainSettings:
    values = {
        "steps": 12, "batch_size": 2, "accumulate": 2, "learning_rate": 1e-2, "warmup": 2, "remat": "none",
        "checkpoint_every": 4, "eval_every": 6,
    }  # fmt: skip
    return TrainSettings(**{**values, **changes})
