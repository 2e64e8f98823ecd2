"""A packed file, opened: frozen weights that are mapped and need never be in memory at once.

``packed_layout`` explains the format, ``packed_write.write_packed`` makes one.
"""

import os
from typing import Any, Literal

import jax
import numpy as np
from tokenizers import Tokenizer as Backend

from edgejax.core.arrays import PyTree
from edgejax.core.errors import ConfigError, WeightsError
from edgejax.data.tokenizer import Tokenizer
from edgejax.quant import QuantizedArray
from edgejax.weights.form import Form, form_of
from edgejax.weights.leaves import Base, plan_matrix
from edgejax.weights.mapped_file import MappedFile
from edgejax.weights.names import LeafName, leaf_names
from edgejax.weights.packed_decode import Complaint, decode
from edgejax.weights.packed_layout import TOKENIZER, Part, Section
from edgejax.weights.packed_leaves import checked_leaves, section_of
from edgejax.weights.params import abstract_params, load_params, tree_of

Verify = Literal["first_use", "all", "none"]
VERIFY: tuple[Verify, ...] = ("first_use", "all", "none")


def open_packed(path: str | os.PathLike, *, verify: Verify = "first_use") -> "PackedFile":
    """Open and check a packed file; no weights are read yet.

    Args:
      path: a file that ``edgejax pack`` or ``write_packed`` made.
      verify: when sections are compared with their hashes: each before its first use, all now, or never.

    Raises:
      WeightsError: no packed file, another version, truncated, damaged, or inconsistent.
      ConfigError: an unknown ``verify``.

    Example:
      >>> packed = open_packed("smollm2-135m.ejx")  # doctest: +SKIP
      >>> for i in range(packed.config.n_layers):  # doctest: +SKIP
      ...     h = block(packed.layer(i), h)
      ...     packed.release(i)
    """
    if verify not in VERIFY:
        raise ConfigError(f"verify {verify!r} is unknown; there are: {', '.join(VERIFY)}")
    packed = PackedFile(MappedFile(path), verify_first=verify == "first_use")
    if verify == "all":
        packed.verify()
    return packed


class PackedFile:
    """A model in a packed file, made by ``open_packed``; as a ``LeafReader`` it is loaded like any other source.

    A section is a layer, meant by its number, or one of ``"embed"``, ``"final_norm"``, ``"head"`` (where it is not
    tied) and ``"tokenizer"``.

    Attributes:
      path: the file.
      n_bytes: of the file.
      sha256: what the file is known by: the hash of its header, which holds those of all sections.
      config: the decoder.
      leaves: the leaves of its parameter tree.
      origin: what it was packed from.
      notes: what a person should know, as of the packing.
      sections: positions and hashes by name: ``"embed"``, ``"layer.0"``, ...
    """

    format: Literal["gguf", "huggingface", "packed"] = "packed"

    def __init__(self, file: MappedFile, *, verify_first: bool):
        header, self._data_start, self.sha256 = decode(file)
        self._file, self._verify_first = file, verify_first
        self.path, self.n_bytes = file.path, file.n_bytes
        self.config, self.origin, self.notes = header.config, header.origin, list(header.notes)
        self.sections = header.sections
        self.leaves = leaf_names(self.config)
        self._parts = checked_leaves(header, Complaint(file.path))
        self._tokenizer = header.tokenizer, header.parts.get(TOKENIZER)
        self._verified: set[str] = set()

    def layer(self, i: int) -> PyTree:
        """The parameters of layer ``i``: ``params["blocks"]`` without the leading axis.

        Leaves are read-only numpy arrays over the mapped file, and ``QuantizedArray``s of them, which
        ``jax.device_put`` takes on the CPU without a copy.
        """
        self._section(i)
        leaves = tuple(leaf for leaf in self.leaves if leaf.stacked)
        return tree_of(leaves, lambda leaf: self._view(leaf, i))["blocks"]

    def tables(self) -> PyTree:
        """All other parameters, ``{"embed": ..., "final_norm": ..., "head": ...}``; leaves as in ``layer``."""
        leaves = tuple(leaf for leaf in self.leaves if not leaf.stacked)
        return tree_of(leaves, lambda leaf: self._view(leaf, 0))

    def prefetch(self, section: int | str) -> None:
        """Have the kernel read a section in the background."""
        self._file.prefetch(*self._span(self._section(section)))

    def release(self, section: int | str) -> None:
        """Give the pages of a section back; views of it stay valid, and are read again when touched."""
        self._file.drop(*self._span(self._section(section)))

    def verify_section(self, section: int | str) -> None:
        """Compare a section with its hash; nothing of it stays in this process.

        Raises:
          WeightsError: they differ.
        """
        wanted = self._section(section)
        found = self._file.sha256(*self._span(wanted))
        if found != wanted.sha256:
            self.check_unchanged()  # says more where it is that
            Complaint(self.path)(
                f"the SHA-256 of section {wanted.name!r} is {found}, its header says {wanted.sha256}"
            )
        self._verified.add(wanted.name)

    def verify(self) -> None:
        """``verify_section`` for every section."""
        for name in self.sections:
            self.verify_section(name)

    def check_unchanged(self) -> None:
        """Compare the file's size, inode and time of change with those at opening; takes microseconds.

        Raises:
          WeightsError: it was replaced, removed or written to.
        """
        self._file.check_unchanged()

    def abstract_params(self) -> PyTree:
        """The parameter tree of ``load()`` as ``jax.ShapeDtypeStruct``s."""
        return abstract_params(self, "auto")

    def load(self) -> PyTree:
        """The whole parameter tree, stacked, copied into host memory: bit for bit what was packed."""
        return load_params(self, "auto", [])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template that were packed.

        Raises:
          WeightsError: there is none, or it is damaged.
        """
        settings, part = self._tokenizer
        if settings is None or part is None:
            raise WeightsError(
                f"{self.path}: no tokenizer was packed, and text cannot be read or written without one; pack the model "
                "from a source that has one"
            )
        self._use("tokenizer")
        text = self._file.read(self._data_start + part.start, part.stop - part.start)
        try:
            return Tokenizer(Backend.from_str(text.decode()), **settings)
        except Exception as error:  # tokenizers raises plain Exception for every malformed text
            Complaint(self.path)(f"its tokenizer cannot be read ({error!s:.200})")

    def check_base(self, base: Base) -> None:
        """Refuse a form that the weights do not have: they got theirs when they were packed.

        Raises:
          ConfigError: a matrix would have to change.
        """
        for leaf in self.leaves:
            if leaf.kind in ("norm", "bias"):
                continue
            held = self.form(leaf, 0)
            if plan_matrix(self, leaf, range(1), base, []).form != held:
                raise ConfigError(
                    f"{self.path}: {'.'.join(leaf.path)} was packed as {held} (--base {self.origin.base}) and is not "
                    f"changed to {base}; use --base auto, or pack {self.origin.name} again with --base {base}"
                )

    def shape(self, leaf: LeafName, layer: int) -> tuple[int, ...]:
        return leaf.shape  # compared with the configuration when the file was opened

    def form(self, leaf: LeafName, layer: int) -> Form:
        return form_of(self._parts[leaf.path, layer])

    def type_name(self, leaf: LeafName, layer: int) -> str:
        return str(self.form(leaf, layer))

    def rows(self, leaf: LeafName, layer: int, start: int, stop: int) -> QuantizedArray | np.ndarray:
        self._use(section_of(leaf, layer))
        n_rows = leaf.shape[0] if len(leaf.shape) > 1 else 1  # a vector is one row

        def read(part: Part) -> np.ndarray:
            row_bytes = (part.stop - part.start) // n_rows
            at = self._data_start + part.start + start * row_bytes
            data = self._file.read(at, (stop - start) * row_bytes)
            return np.frombuffer(data, part.dtype).reshape(stop - start, part.shape[-1])

        return jax.tree.map(read, self._parts[leaf.path, layer])

    def row_order(self, leaf: LeafName) -> None:
        return None

    def offset(self, leaf: LeafName) -> float:
        return 0.0

    def _section(self, section: int | str) -> Section:
        name = section if isinstance(section, str) else f"layer.{section}"
        if name not in self.sections:
            raise IndexError(f"{self.path}: no section {name!r}; there are: {', '.join(self.sections)}")
        return self.sections[name]

    def _span(self, section: Section) -> tuple[int, int]:
        return self._data_start + section.start, self._data_start + section.stop

    def _use(self, section: str) -> None:
        if self._verify_first and section not in self._verified:
            self.verify_section(section)

    def _view(self, leaf: LeafName, layer: int) -> Any:
        self._use(section_of(leaf, layer))
        return jax.tree.map(
            lambda part: self._file.view(self._data_start + part.start, part.shape, part.dtype),
            self._parts[leaf.path, layer],
        )
