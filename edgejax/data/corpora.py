"""Texts that come with Python: real English without a download."""

import importlib
from collections.abc import Callable

from edgejax.core.errors import DataError
from edgejax.data.sources import TextRecord


def python_reference() -> list[TextRecord]:
    """Python's language reference as ``help()`` shows it: one document a topic, sorted by name.

    About half a megabyte of English, written by the Python documentation's authors (PSF licence). It differs between
    Python versions; a data set's fingerprint says which one was used.

    Raises:
      DataError: a Python that was packaged without ``pydoc_data``.

    Example:
      >>> {"assert", "lambda", "while"} <= {record.name for record in python_reference()}
      True
    """
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise DataError(
            "this Python comes without pydoc_data (the texts of help()); install the rest of its standard "
            "library, or name a text file instead of python-reference"
        ) from error
    return [TextRecord(name, topics[name]) for name in sorted(topics)]


CORPORA: dict[str, Callable[[], list[TextRecord]]] = {"python-reference": python_reference}
