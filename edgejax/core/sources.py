"""Which edgejax this is: the hash of its source files."""

import hashlib
import importlib.util
from collections.abc import Collection
from pathlib import Path


def sources_sha256(without: Collection[str] = ()) -> str:
    """SHA-256 of edgejax's Python files as they are installed, kernels included: other sources, other programs.

    Args:
      without: rooms that are left out.

    >>> len(sources_sha256()), sources_sha256() == sources_sha256(without=["cli"])
    (64, False)
    """
    digest = hashlib.sha256()
    for package in ("edgejax", "edgejax.kernels"):
        spec = importlib.util.find_spec(package)
        assert spec is not None
        folder = Path(next(iter(spec.submodule_search_locations or ())))
        for path in sorted(folder.rglob("*.py")):
            name = path.relative_to(folder)
            if name.parts[0] not in without:
                digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()
