"""Records from files: plain text and JSON lines, checked before anything is tokenised.

- ``.txt``, ``.md``: one document a file.
- ``.jsonl``: one record a line, by its fields: ``text``; or ``prompt`` and ``completion``; or ``messages``,
  a conversation of ``{"role": ..., "content": ...}``. Lines of different kinds may be mixed.
- a folder: all such files in it and below, by name; other files and hidden ones are not read.

Whatever cannot be used is a ``DataError`` with file and line. A field nobody knows is an error too, for a
misspelt ``completion`` would otherwise train on something else than was meant; name it in ``ignore_fields``.
"""

import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from edgejax.core.errors import DataError

TEXT_SUFFIXES = (".txt", ".md")
JSONL_SUFFIXES = (".jsonl",)


class TextRecord(NamedTuple):
    """A text to learn from beginning to end. ``name`` says where it came from, as ``file`` or ``file:line``."""

    name: str
    text: str


class CompletionRecord(NamedTuple):
    """A prompt that is given and a completion that is learned; nothing is put between the two."""

    name: str
    prompt: str
    completion: str


class ChatRecord(NamedTuple):
    """A conversation; the assistant's turns are learned."""

    name: str
    messages: tuple[dict[str, str], ...]


Record: TypeAlias = TextRecord | CompletionRecord | ChatRecord
Paths: TypeAlias = str | Path | Sequence[str | Path]

_KINDS = (("text",), ("prompt", "completion"), ("messages",))


def read_records(paths: Paths, *, ignore_fields: Collection[str] = ()) -> Iterator[Record]:
    """The records of files and folders, in the order given; inside a folder by name.

    Args:
      paths: a file or folder, or several.
      ignore_fields: fields of JSON lines that are neither used nor complained about, like an ``id``.

    Raises:
      DataError: a path that is not there, nothing to read, or a record that cannot be used.

    Example:
      >>> import pathlib, tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = pathlib.Path(folder, "two.jsonl")
      ...     _ = path.write_text('{"text": "One."}\\n{"prompt": "1 + 1 = ", "completion": "2"}\\n')
      ...     [type(record).__name__ for record in read_records(path)]
      ['TextRecord', 'CompletionRecord']
    """
    for path in _files(paths):
        if path.suffix.lower() in JSONL_SUFFIXES:
            yield from _read_jsonl(path, frozenset(ignore_fields))
        else:
            yield _read_text(path)


def _files(paths: Paths) -> list[Path]:
    listed = [paths] if isinstance(paths, str | Path) else paths
    if "" in listed:
        raise DataError("no data: the name of a file is empty; name a file or folder (. is the current one)")
    given = [Path(p) for p in listed]
    if not given:
        raise DataError("no data: the list of files is empty; name a file or folder")
    files = [
        file for path in given for file in (_folder_files(path) if os.path.isdir(path) else [_one_file(path)])
    ]
    seen: set[Path] = set()
    for file in files:
        if file.resolve() in seen:
            raise DataError(f"{file}: named twice; its documents would count double, name it once")
        seen.add(file.resolve())
    return files


def _one_file(path: Path) -> Path:
    known = TEXT_SUFFIXES + JSONL_SUFFIXES
    if not os.path.exists(path):
        raise DataError(f"{path}: there is no such file or folder (looked from {Path.cwd()})")
    if path.suffix.lower() not in known:
        raise DataError(f"{path}: not a kind of file that is read; rename it to one of {', '.join(known)}")
    return path


def _folder_files(folder: Path) -> list[Path]:
    known = TEXT_SUFFIXES + JSONL_SUFFIXES
    files = sorted(
        p
        for p in folder.rglob("*")
        if p.suffix.lower() in known
        and p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
    )
    if not files:
        raise DataError(f"{folder}: the folder holds no {', '.join(known)} file; put the text there")
    return files


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes().removeprefix(b"\xef\xbb\xbf")  # the byte order mark some editors write
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from error


def _read_text(path: Path) -> TextRecord:
    raw = _read_bytes(path)
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: {_not_utf8(error)}") from error
    if not text.strip():
        raise DataError(f"{path}: the file holds no text; remove it or write some")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise DataError(f"{path}:{line}: a zero byte, so this is no text but binary data; name a text file")
    return TextRecord(str(path), text)


def _not_utf8(error: UnicodeDecodeError) -> str:
    value = error.object[error.start]
    return f"not UTF-8 (byte 0x{value:02x}, {error.reason}); convert the file, for example with iconv"


def _read_jsonl(path: Path, ignore_fields: frozenset[str]) -> Iterator[Record]:
    n_records = 0
    for number, raw in enumerate(_read_bytes(path).split(b"\n"), start=1):
        if raw.strip():
            n_records += 1
            yield _parse_line(raw, f"{path}:{number}", ignore_fields)
    if not n_records:
        raise DataError(f"{path}: the file holds no line; remove it or write some")


def _parse_line(raw: bytes, where: str, ignore_fields: frozenset[str]) -> Record:
    try:
        value = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: {_not_utf8(error)}") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not JSON: {error.msg} at column {error.colno}") from error
    except (ValueError, RecursionError) as error:  # numbers of thousands of digits, brackets as deep
        raise DataError(f"{where}: JSON that cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise DataError(f"{where}: a JSON object was expected, got {_kind(value)}")
    fields = {k: v for k, v in value.items() if k not in ignore_fields}
    kind = _which_kind(fields, where)
    if kind == ("text",):
        return TextRecord(where, _string(fields, "text", where, may_be_empty=False))
    if kind == ("messages",):
        return ChatRecord(where, _messages(fields["messages"], where))
    prompt = _string(fields, "prompt", where, may_be_empty=True)
    return CompletionRecord(where, prompt, _string(fields, "completion", where, may_be_empty=False))


def _which_kind(fields: dict[str, Any], where: str) -> tuple[str, ...]:
    wanted = "`text`, or `prompt` and `completion`, or `messages`"
    found = [kind for kind in _KINDS if any(field in fields for field in kind)]
    if not found:
        raise DataError(f"{where}: one of {wanted} was expected, the line has {_listed(fields)}")
    if len(found) > 1:
        raise DataError(f"{where}: the line has {_listed(fields)}; only one of {wanted} can be used")
    missing = [field for field in found[0] if field not in fields]
    if missing:
        raise DataError(f"{where}: the field {_listed(missing)} is missing beside {_listed(fields)}")
    unknown = [field for field in fields if field not in found[0]]
    if unknown:
        raise DataError(
            f"{where}: unknown field {_listed(unknown)} beside {_listed(found[0])}; "
            "remove it, or name it among the fields to ignore"
        )
    return found[0]


def _messages(value: Any, where: str) -> tuple[dict[str, str], ...]:
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: `messages` must be a list of at least one message, got {_kind(value)}")
    for index, message in enumerate(value):
        at = f"{where}: messages[{index}]"
        if not isinstance(message, dict):
            raise DataError(f"{at}: an object with `role` and `content` was expected, got {_kind(message)}")
        missing = [field for field in ("role", "content") if field not in message]
        unknown = [field for field in message if field not in ("role", "content")]
        if missing:
            raise DataError(f"{at}: the field {_listed(missing)} is missing beside {_listed(message)}")
        if unknown:
            raise DataError(f"{at}: unknown field {_listed(unknown)}; only `role` and `content` are used")
        _string(message, "role", at, may_be_empty=False)
        _string(message, "content", at, may_be_empty=message["role"] != "assistant")
    if not any(message["role"] == "assistant" for message in value):
        roles = _listed(dict.fromkeys(message["role"] for message in value))
        raise DataError(
            f"{where}: no message has the role `assistant`, so nothing is learned; roles: {roles}"
        )
    return tuple(value)


def _string(fields: dict[str, Any], field: str, where: str, *, may_be_empty: bool) -> str:
    value = fields[field]
    if not isinstance(value, str):
        raise DataError(f"{where}: `{field}` must be a string, got {_kind(value)}")
    if not may_be_empty and not value.strip():
        raise DataError(f"{where}: `{field}` is empty, so there is nothing to learn; remove the line")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: `{field}` holds half a surrogate pair at character {error.start}"
        ) from error
    return value


def _listed(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names) or "no field"


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")
