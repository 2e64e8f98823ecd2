"""A model from a file, a folder or a preset's name: configuration, parameters, tokenizer."""

import dataclasses
import hashlib
from pathlib import Path
from typing import Literal

import jax

from edgejax.core.arrays import PyTree
from edgejax.core.errors import WeightsError
from edgejax.data.tokenizer import Tokenizer
from edgejax.models.config import ModelConfig
from edgejax.weights.gguf_read import GgufSource
from edgejax.weights.gguf_tokenizer import gguf_tokenizer
from edgejax.weights.hf_read import HfSource
from edgejax.weights.hf_tokenizer import hf_tokenizer
from edgejax.weights.leaves import Base, check_base
from edgejax.weights.packed_decode import is_packed
from edgejax.weights.packed_file import PackedFile, open_packed
from edgejax.weights.params import LeafReader as LeafReader
from edgejax.weights.params import abstract_params as abstract_params
from edgejax.weights.params import load_params as load_params
from edgejax.weights.presets import check_known_hash, resolve


@dataclasses.dataclass(frozen=True)
class ModelSource:
    """Where a model came from, for records and for refusing a checkpoint of another one.

    Attributes:
      name: what was asked for.
      path: the file or folder it was read from.
      format: ``"gguf"``, ``"huggingface"`` or ``"packed"``.
      sha256: of the weight file; of several, of their hashes in order; of a packed file, of its header, which holds
        the hashes of the rest.
      base: the form asked for (``"auto"``, ``"int8"``, ...).
    """

    name: str
    path: str
    format: Literal["gguf", "huggingface", "packed"]
    sha256: str
    base: str


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
      config: the decoder.
      params: the parameter tree; leaves are jax arrays and ``QuantizedArray``s (numpy ones with ``on_host``).
      tokenizer: None only where ``need_tokenizer=False`` was given.
      source: where it came from.
      notes: what a person should know: leaves held otherwise than asked, unknown settings that were passed over.
    """

    config: ModelConfig
    params: PyTree
    tokenizer: Tokenizer | None
    source: ModelSource
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class OpenedModel:
    """A model whose files were opened and checked, and whose weights are not in memory yet.

    A training step can be compiled for it, which takes several times the weights' memory for a moment, before they
    are read.

    Attributes:
      config: the decoder.
      tokenizer: None only where ``need_tokenizer=False`` was given.
      source: where it comes from.
      reader: the opened files.
    """

    config: ModelConfig
    tokenizer: Tokenizer | None
    source: ModelSource
    reader: GgufSource | HfSource | PackedFile

    def abstract_params(self) -> PyTree:
        """The parameter tree of ``load()`` as ``jax.ShapeDtypeStruct``s."""
        return abstract_params(self.reader, check_base(self.source.base))

    def load(self, *, on_host: bool = False) -> LoadedModel:
        """Read the weights; see ``load_model``."""
        notes: list[str] = list(self.reader.notes)
        params = load_params(self.reader, check_base(self.source.base), notes)
        if not on_host:
            params = jax.device_put(params)
        return LoadedModel(self.config, params, self.tokenizer, self.source, tuple(dict.fromkeys(notes)))


def open_model(name_or_path: str | Path, *, base: Base = "auto", need_tokenizer: bool = True) -> OpenedModel:
    """Find and check a model, read its configuration and tokenizer, and leave its weights on the disk.

    Args and errors are those of ``load_model``; damage that only the weights' own values show is found by ``load()``.

    Example:
      >>> opened = open_model("smollm2-135m")  # doctest: +SKIP
      >>> opened.abstract_params()["embed"]["table"].shape  # doctest: +SKIP
      (49152, 576)
    """
    base = check_base(base)
    path = resolve(name_or_path)
    reader: HfSource | GgufSource | PackedFile
    if path.is_dir():
        reader = HfSource(path)
        sha256 = fingerprint(reader.weight_files)
    elif is_packed(path):
        reader = open_packed(path)
        reader.check_base(base)
        sha256 = reader.sha256
    else:
        sha256 = fingerprint([path])
        check_known_hash(name_or_path, path, sha256)  # before anything is believed of it
        reader = GgufSource(path)
    tokenizer = _tokenizer(reader) if need_tokenizer else None
    source = ModelSource(str(name_or_path), str(path), reader.format, sha256, base)
    return OpenedModel(reader.config, tokenizer, source, reader)


def load_model(
    name_or_path: str | Path, *, base: Base = "auto", need_tokenizer: bool = True, on_host: bool = False
) -> LoadedModel:
    """Read a model leaf by leaf; beside the leaves as they will be held, only a few megabytes exist at a time.

    Args:
      name_or_path: a preset (``edgejax models`` lists them), a ``.gguf`` file, a Hugging Face folder, or a file that
        ``edgejax pack`` made.
      base: how matrices are held: ``"auto"`` exactly as the file has them, or ``"int8"``, ``"int4"``, ``"ternary"``
        (tables that are not in codes already in 8 bits; for models that were trained so), ``"bf16"``, ``"f32"``. Matrices
        that already have the bits asked for, or are ternary where other codes are asked for, stay as they are. Norms and
        biases are float32. A packed file is what it is: it takes ``"auto"``, or what its weights have already.
      need_tokenizer: False leaves the tokenizer unread (a benchmark on made-up tokens needs none).
      on_host: leave numpy arrays; otherwise leaves are put on the default device, on the CPU without a copy.

    Raises:
      WeightsError: anything about the files: missing, truncated, damaged, of an unsupported kind.
      ConfigError: an unknown ``base``, or one that a packed file does not have.

    Example:
      >>> model = load_model("smollm2-135m", base="auto")  # doctest: +SKIP
      >>> model.config.n_layers, model.params["blocks"]["q_proj"]["kernel"].bits  # doctest: +SKIP
      (30, 4)
    """
    return open_model(name_or_path, base=base, need_tokenizer=need_tokenizer).load(on_host=on_host)


def fingerprint(files: list[Path]) -> str:
    """sha256 of a file, or of several files' hashes in order."""
    hashes = []
    for path in files:
        try:
            with open(path, "rb", buffering=0) as file:
                hashes.append(hashlib.file_digest(file, "sha256").hexdigest())
        except OSError as error:
            raise WeightsError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def _tokenizer(source: GgufSource | HfSource | PackedFile) -> Tokenizer:
    if isinstance(source, GgufSource):
        tokenizer = gguf_tokenizer(source.file)
    else:
        tokenizer = source.tokenizer() if isinstance(source, PackedFile) else hf_tokenizer(source.path)
    if tokenizer.vocab_size > source.config.vocab_size:
        raise WeightsError(
            f"{source.path}: the tokenizer has {tokenizer.vocab_size} tokens, the embedding table "
            f"{source.config.vocab_size} rows; they do not belong together"
        )
    return tokenizer
