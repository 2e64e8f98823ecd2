"""Files: what is read, and every way a file can be wrong, with its place."""

import json

import pytest

from edgejax.core.errors import DataError
from edgejax.data import ChatRecord, CompletionRecord, TextRecord, read_records

pytestmark = pytest.mark.quick
GOOD = b'{"text": "fine"}'


def write(path, content: bytes):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfOne.\r\n\r\nTwo \xc3\xa9.\n")
    assert list(read_records(path)) == [TextRecord(str(path), "One.\r\n\r\nTwo é.\n")]


def test_lines_of_all_kinds_may_be_mixed(tmp_path):
    messages = [{"role": "user", "content": ""}, {"role": "assistant", "content": "Hi"}]
    lines = [{"text": "a"}, {"prompt": "", "completion": "c"}, {"messages": messages}]
    path = tmp_path / "mixed.jsonl"
    write(path, b"\n\r\n".join(json.dumps(line).encode() for line in lines) + b"\n")
    assert list(read_records(path)) == [
        TextRecord(f"{path}:1", "a"),
        CompletionRecord(f"{path}:3", "", "c"),
        ChatRecord(f"{path}:5", tuple(messages)),
    ]


def test_a_folder_is_read_by_name_without_hidden_and_other_files(tmp_path):
    for name in ("b.md", "a/z.txt", "a/y.JSONL", ".git/x.txt", "a/.hidden.txt", "code.py"):
        write(tmp_path / name, GOOD)
    names = [record.name.removeprefix(f"{tmp_path}/") for record in read_records(tmp_path)]
    assert names == ["a/y.JSONL:1", "a/z.txt", "b.md"]


def test_several_paths_keep_their_order(tmp_path):
    paths = [write(tmp_path / name, GOOD) for name in ("b.txt", "a.txt")]
    assert [record.name for record in read_records([paths[0], str(paths[1])])] == [str(p) for p in paths]


def test_fields_to_ignore(tmp_path):
    path = write(tmp_path / "a.jsonl", b'{"text": "a", "id": 3, "prompt": null}')
    (record,) = read_records(path, ignore_fields=["id", "prompt"])
    assert record == TextRecord(f"{path}:1", "a")


LINES = {
    b"{'text': 1}": "not JSON: .* at column 2",
    b'{"text": "a"': "not JSON",
    b'{"text": "a"} {"text": "b"}': "not JSON: Extra data at column 15",
    b'{"text": ' + b"[" * 100_000: "cannot be read",
    b'{"text": ' + b"9" * 5000 + b"}": "cannot be read",
    b'{"text": "\xff"}': r"not UTF-8 \(byte 0xff",
    b'["text"]': "object was expected, got a list",
    b"null": "object was expected, got null",
    b"{}": "one of `text`.* the line has no field",
    b'{"txt": "a", "id": 1}': "one of `text`.* the line has `txt`, `id`",
    b'{"text": "a", "prompt": "b", "completion": "c"}': "only one of",
    b'{"prompt": "a"}': "field `completion` is missing beside `prompt`",
    b'{"completion": "a", "promt": "b"}': "field `prompt` is missing beside `completion`, `promt`",
    b'{"text": "a", "id": 1}': "unknown field `id` beside `text`; remove it, or name it",
    b'{"text": 3}': "`text` must be a string, got a number",
    b'{"text": true}': "`text` must be a string, got a boolean",
    b'{"text": null}': "`text` must be a string, got null",
    b'{"text": " \\n"}': "`text` is empty",
    b'{"text": "a\\ud800b"}': "`text` holds half a surrogate pair at character 1",
    b'{"prompt": "a", "completion": ""}': "`completion` is empty, so there is nothing to learn",
    b'{"prompt": ["a"], "completion": "b"}': "`prompt` must be a string, got a list",
    b'{"messages": "Hi"}': "list of at least one message, got a string",
    b'{"messages": []}': "list of at least one message, got an empty list",
    b'{"messages": ["Hi"]}': r"messages\[0\]: an object with",
    b'{"messages": [{"role": "user"}]}': r"messages\[0\]: the field `content` is missing beside `role`",
    b'{"messages": [{"from": "a", "value": "b"}]}': "`role`, `content` is missing beside `from`, `value`",
    b'{"messages": [{"role": "assistant", "content": null}]}': "`content` must be a string, got null",
    b'{"messages": [{"role": "assistant", "content": [{"type": "text"}]}]}': "must be a string, got a list",
    b'{"messages": [{"role": "assistant", "content": ""}]}': r"messages\[0\]: `content` is empty",
    b'{"messages": [{"role": "assistant", "content": "a", "name": "b"}]}': "unknown field `name`; only",
    b'{"messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}': (
        "no message has the role `assistant`.*roles: `user`, `bot`"
    ),
}


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[:60].decode("latin-1"))
def test_a_line_that_cannot_be_used_is_named_with_its_place(tmp_path, line):
    path = write(tmp_path / "bad.jsonl", GOOD + b"\n\n" + line + b"\n" + GOOD)
    with pytest.raises(DataError, match=LINES[line]) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(f"{path}:3: ")


FILES = {
    "blank.txt": (b" \n\t\n", "{path}: the file holds no text"),
    "empty.md": (b"", "{path}: the file holds no text"),
    "empty.jsonl": (b"\n\n", "{path}: the file holds no line"),
    "binary.txt": (b"one\ntwo\0\n", "{path}:2: a zero byte, so this is no text but binary data"),
    "latin.txt": (b"one\ntwo\nthr\xe9e\n", "{path}:3: not UTF-8 (byte 0xe9"),
    "data.json": (b"{}", "{path}: not a kind of file that is read; rename it to one of .txt, .md, .jsonl"),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_used_is_named(tmp_path, name):
    content, reason = FILES[name]
    path = write(tmp_path / name, content)
    with pytest.raises(DataError) as caught:
        list(read_records(path))
    assert str(caught.value).startswith(reason.format(path=path))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(DataError, match=r"nowhere.txt: there is no such file or folder"):
        list(read_records(tmp_path / "nowhere.txt"))


def test_a_folder_with_nothing_to_read(tmp_path):
    write(tmp_path / "code.py", b"pass")
    with pytest.raises(DataError, match=r"holds no .txt, .md, .jsonl file"):
        list(read_records(tmp_path))


def test_no_path_at_all():
    with pytest.raises(DataError, match="list of files is empty"):
        list(read_records([]))


@pytest.mark.parametrize("paths", ["", ["a.txt", ""]])
def test_an_empty_name_does_not_mean_the_current_folder(paths):
    with pytest.raises(DataError, match="the name of a file is empty"):
        list(read_records(paths))


def test_a_name_longer_than_any_file_is_one_that_is_not_there():
    with pytest.raises(DataError, match="there is no such file or folder"):
        list(read_records("x" * 300))


def test_a_file_named_twice_would_count_double(tmp_path):
    path = write(tmp_path / "a.txt", GOOD)
    with pytest.raises(DataError, match=r"a.txt: named twice"):
        list(read_records([path, tmp_path]))


def test_a_file_that_may_not_be_read_is_a_data_error(tmp_path, monkeypatch):
    def refuse(self):
        raise PermissionError(13, "Permission denied")

    path = write(tmp_path / "a.txt", GOOD)
    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(DataError, match=r"a.txt: cannot be read: Permission denied"):
        list(read_records(path))
