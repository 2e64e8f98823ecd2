"""Train and held-out documents: apart by what they say, not by where they stand in a file."""

import hashlib
from collections.abc import Sequence

from edgejax.core.errors import ConfigError, DataError
from edgejax.data.documents import Document


def split_documents(
    documents: Sequence[Document], held_out_fraction: float, seed: int = 0
) -> tuple[list[Document], list[Document]]:
    """Put a fraction of the documents aside, by the hash of seed and content.

    The order of files and lines does not matter, and documents with the same content are on the same side.
    ``round(fraction * n)`` of the ``n`` different contents are held out.

    Returns:
      ``(train, held_out)``, each in the given order.

    Raises:
      ConfigError: a fraction outside (0, 1).
      DataError: a side would be empty.

    Example:
      >>> import numpy as np
      >>> documents = [Document(np.arange(n), np.ones(n, bool), f"{n} tokens") for n in range(2, 12)]
      >>> train, held_out = split_documents(documents, 0.2)
      >>> len(train), len(held_out)
      (8, 2)
    """
    if not 0 < held_out_fraction < 1:
        raise ConfigError(f"held-out fraction {held_out_fraction}: must be above 0 and below 1, like 0.1")
    contents = sorted(
        {document.digest for document in documents},
        key=lambda digest: hashlib.sha256(f"{seed}:{digest}".encode()).digest(),
    )
    n_held_out = round(held_out_fraction * len(contents))
    if not 0 < n_held_out < len(contents):
        side = "held-out" if n_held_out == 0 else "train"
        raise DataError(
            f"a held-out fraction of {held_out_fraction} of {len(contents)} different documents leaves the "
            f"{side} side empty; add documents, change the fraction, or give held-out files of their own"
        )
    chosen = set(contents[:n_held_out])
    train = [document for document in documents if document.digest not in chosen]
    return train, [document for document in documents if document.digest in chosen]


def check_disjoint(train: Sequence[Document], held_out: Sequence[Document]) -> None:
    """Refuse a document that is on both sides.

    Raises:
      DataError: naming the first such document at both of its places.
    """
    names = {document.digest: document.name for document in train}
    for document in held_out:
        if document.digest in names:
            raise DataError(
                f"{document.name} (held out) has the same content as {names[document.digest]} (training); "
                "a held-out loss would be flattered, remove one of them"
            )
