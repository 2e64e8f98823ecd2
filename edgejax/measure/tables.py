"""Tables in documents, made from result files and never by hand."""

from pathlib import Path


def newest(folder: Path) -> Path | None:
    """The newest result file of a folder, by its name; None where there is none."""
    return max(folder.glob("*.json"), default=None)


def with_table(document: str, table: str, name: str = "numbers") -> str:
    """A document in which what stands between ``<!-- name -->`` and ``<!-- /name -->`` is the table.

    >>> with_table("a <!-- numbers -->1<!-- /numbers --> z", "2")
    'a <!-- numbers -->\\n2\\n<!-- /numbers --> z'

    Raises:
      ValueError: it has no such place.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    head, _, rest = document.partition(begin)
    _, found, tail = rest.partition(end)
    if not found:
        raise ValueError(f"the document has no {begin} followed by {end}")
    return f"{head}{begin}\n{table}\n{end}{tail}"
