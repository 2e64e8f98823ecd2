"""Footprints that were compiled once, kept by all that they depend on."""

import hashlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import jax

from edgejax.core.arrays import PyTree
from edgejax.core.cache import cache_dir
from edgejax.core.host import package_versions
from edgejax.core.sources import sources_sha256
from edgejax.models import ModelConfig
from edgejax.plan.candidate import Candidate
from edgejax.plan.footprint import Footprint


class FootprintStore:
    """A folder of JSON files, one a footprint.

    Args:
      target: what is compiled for, in all its figures; the compiler's version included.
      folder: default: ``plans`` in the cache.
      note: told of an entry that cannot be read; it is compiled again.
      without: rooms of edgejax that footprints do not depend on.
    """

    def __init__(
        self,
        target: Any,
        folder: Path | None = None,
        *,
        note: Callable[[str], object] = lambda text: None,
        without: Collection[str] = ("cli",),
    ):
        self.folder = folder or cache_dir() / "plans"
        self._note = note
        self._common = [target, package_versions(), sources_sha256(without=without)]

    def path(self, candidate: Candidate, config: ModelConfig, params: PyTree) -> Path:
        """Where the footprint of a candidate is, or would be."""
        leaves = [
            (str(path), leaf.shape, str(leaf.dtype))
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        ]
        key = json.dumps(
            [self._common, candidate.to_json(), repr(config), leaves], default=repr, sort_keys=True
        )
        return self.folder / f"{hashlib.sha256(key.encode()).hexdigest()}.json"

    def get(self, path: Path) -> Footprint | None:
        """What is kept there; None where there is nothing, or nothing that can be read."""
        try:
            return Footprint.from_json(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            self._note(f"the kept plan {path} cannot be read ({error}); it is made again")
            return None

    def put(self, path: Path, footprint: Footprint) -> None:
        """Keep one; where that cannot be done, a note says so."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished")
            unfinished.write_text(json.dumps(footprint.to_json()), encoding="utf-8")
            unfinished.replace(path)
        except OSError as error:
            self._note(f"the plan cannot be kept in {self.folder}: {error.strerror or error}")
