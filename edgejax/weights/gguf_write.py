"""Arrays for ``gguf.GGUFWriter`` that notice a full disk.

The writer calls ``tofile``, and numpy's keeps the end of an array in a buffer of C's whose last write nobody checks: on
a full disk arrays of a few kilobytes are lost without an error, and the file is cut short.
"""

import io

import numpy as np


class FileArray(np.ndarray):
    """An array whose ``tofile`` writes through Python's file, which reports every error."""

    def tofile(self, file: io.BufferedWriter) -> None:  # type: ignore[override]
        file.write(np.ascontiguousarray(self).view(np.uint8).data)


def file_array(values: np.ndarray) -> FileArray:
    """The same values as a ``FileArray``, without a copy where they are contiguous.

    >>> file = io.BytesIO()
    >>> file_array(np.arange(3, dtype=np.uint8)).tofile(file)
    >>> file.getvalue()
    b'\\x00\\x01\\x02'
    """
    return np.ascontiguousarray(values).view(FileArray)
