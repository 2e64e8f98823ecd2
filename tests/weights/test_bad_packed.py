"""Packed files that are damaged, foreign, hostile or changed while in use: always a ``WeightsError`` that says so."""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from weight_files import gguf_tensors, tiny, write_gguf

from edgejax.core.errors import ConfigError, WeightsError
from edgejax.quant import QuantizedArray
from edgejax.weights import Origin, load_model, open_model, open_packed, write_packed
from edgejax.weights.names import leaf_names
from edgejax.weights.packed_layout import Part
from edgejax.weights.packed_leaves import _checked_form
from edgejax.weights.random import RandomSource

pytestmark = pytest.mark.quick
CONFIG = tiny("qwen2")
NESTED = ("config", "origin", "notes", "sections", "tokenizer")  # JSON in the texts of __metadata__


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    opened = open_model(write_gguf(folder / "m.gguf", tiny("llama"), gguf_tensors(tiny("llama"))))
    origin = Origin(name="m.gguf", format="gguf", sha256=opened.source.sha256, base="int4")
    write_packed(folder / "m.ejx", opened.reader, origin=origin, base="int4", tokenizer=opened.tokenizer)
    return folder / "m.ejx"


def use_all(path) -> None:
    """Everything that reads the file."""
    file = open_packed(path)
    file.load()
    file.abstract_params()
    for i in range(file.config.n_layers):
        for leaf in file.layer(i).values():
            assert all(np.asarray(x).size for x in leaf.values() if isinstance(x, np.ndarray))
        file.release(i)
    file.tables()
    file.tokenizer()
    file.verify()


def read_header(path) -> dict:
    raw = path.read_bytes()
    content = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    content["__metadata__"] |= {key: json.loads(content["__metadata__"][key]) for key in NESTED}
    return content


def with_header(path, out, content: dict):
    """The file with another header, sealed as if it had been written so."""
    raw = path.read_bytes()
    data = raw[8 + int.from_bytes(raw[:8], "little") + 32 :]
    metadata = content.get("__metadata__")
    if isinstance(metadata, dict):
        texts = {key: json.dumps(value) if key in NESTED else value for key, value in metadata.items()}
        content = content | {"__metadata__": texts}
    text = json.dumps(content, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text) + 32) % 4096)
    sealed = len(text).to_bytes(8, "little") + text
    out.write_bytes(sealed + hashlib.sha256(sealed).digest() + data)
    return out


# Accidents.


@given(st.data())
def test_a_file_cut_anywhere(whole, data):
    raw = whole.read_bytes()
    ends = [section.stop for section in open_packed(whole).sections.values()]
    near = st.sampled_from([0, 1, 7, 8, 60, 4095, 4096, *ends, len(raw)]).flatmap(
        lambda at: st.integers(max(0, at - 2), min(len(raw) - 1, at + 2))
    )
    cut = whole.with_name("cut.ejx")
    cut.write_bytes(raw[: data.draw(st.integers(0, len(raw) - 1) | near)])
    with pytest.raises(WeightsError, match=r"cut\.ejx"):
        open_packed(cut)
    with pytest.raises(WeightsError, match=r"cut\.ejx"):
        load_model(cut)


def test_a_file_that_goes_on(whole, tmp_path):
    (tmp_path / "m.ejx").write_bytes(whole.read_bytes() + bytes(4096))
    with pytest.raises(WeightsError, match="4096 bytes follow its last section"):
        open_packed(tmp_path / "m.ejx")


@given(st.data())
def test_a_changed_byte_anywhere_is_noticed(whole, data):
    """Every byte is under a hash: of the header by the seal, of weights, tables, tokenizer and padding by a section's."""
    raw = bytearray(whole.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, 200) | st.integers(4090, 8200))
    raw[at] ^= data.draw(st.integers(1, 255))
    bad = whole.with_name("flipped.ejx")
    bad.write_bytes(raw)
    with pytest.raises(WeightsError, match=r"flipped\.ejx"):
        open_packed(bad, verify="all")
    with pytest.raises(WeightsError, match=r"flipped\.ejx"):
        use_all(bad)


@pytest.mark.parametrize("section", ["embed", "layer.0", "layer.1", "final_norm", "tokenizer"])
def test_the_section_that_changed_is_named_before_it_is_used(section, whole, tmp_path):
    place = open_packed(whole).sections[section]
    raw = bytearray(whole.read_bytes())
    start = len(raw) - list(open_packed(whole).sections.values())[-1].stop
    raw[start + place.stop - 1] ^= 1  # padding counts too
    bad = tmp_path / "m.ejx"
    bad.write_bytes(raw)
    message = rf"m\.ejx: the SHA-256 of section '{section}' is \w{{64}}, its header says {place.sha256}.*pack"
    with pytest.raises(WeightsError, match=message):
        open_packed(bad, verify="all")
    with pytest.raises(WeightsError, match=message):
        open_packed(bad).verify_section(section)
    with pytest.raises(WeightsError, match=message):
        load_model(bad)
    file = open_packed(bad)
    uses = {"layer.0": lambda: file.layer(0), "layer.1": lambda: file.layer(1), "tokenizer": file.tokenizer}
    for name, use in uses.items():
        with pytest.raises(WeightsError, match=message) if name == section else contextlib.nullcontext():
            use()
    trusting = open_packed(bad, verify="none")
    trusting.layer(0), trusting.layer(1), trusting.tables(), trusting.tokenizer(), trusting.load()


def test_a_section_is_hashed_once(whole, monkeypatch):
    file = open_packed(whole)
    hashed = []
    sha256 = file._file.sha256
    monkeypatch.setattr(file._file, "sha256", lambda a, b: hashed.append(a) or sha256(a, b))
    for _ in range(2):
        file.layer(0), file.tables(), file.load()
    assert len(hashed) == len(set(hashed)) == 4


def test_an_unknown_way_to_verify(whole):
    with pytest.raises(ConfigError, match=r"'sometimes'.*first_use, all, none"):
        open_packed(whole, verify="sometimes")


# What is no packed file.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"GGUF\x03\x00\x00\x00 and so on, for more than a few bytes of it", "not a packed model.*GGUF"),
        (b"\x00" * 5000, "not a packed model"),
        ((64).to_bytes(8, "little") + b'{"__metadata__":{"format":"pt"}}'.ljust(64), "not a packed model"),
    ],
)  # fmt: skip
def test_what_is_no_packed_file(content, message, tmp_path):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        open_packed(tmp_path / "x")
    with pytest.raises(WeightsError):
        load_model(tmp_path / "x")


def test_what_is_no_file(tmp_path):
    with pytest.raises(WeightsError, match="No such file"):
        open_packed(tmp_path / "nothing")
    with pytest.raises(WeightsError, match="not a file"):
        open_packed(tmp_path)


def test_another_version(whole, tmp_path):
    raw = whole.read_bytes().replace(b'"version":"1"', b'"version":"9"', 1)
    (tmp_path / "m.ejx").write_bytes(raw)
    for read in (open_packed, load_model):
        with pytest.raises(WeightsError, match=r"version '9' are not supported \(supported: 1\)"):
            read(tmp_path / "m.ejx")


@pytest.mark.parametrize("n_bytes", [0, 1, 4056, 2**20, 2**24 + 1, 2**40 - 40, 2**63, 2**64 - 1])
def test_a_header_of_another_length_than_it_says(whole, n_bytes, tmp_path):
    raw = whole.read_bytes()
    (tmp_path / "m.ejx").write_bytes(n_bytes.to_bytes(8, "little") + raw[8:])
    with pytest.raises(WeightsError, match=rf"header of {n_bytes}|its seal says"):
        open_packed(tmp_path / "m.ejx")


# Headers that were made to do harm: their seal fits.


def move(content, name, by, length=None):
    begin, end = content[name]["data_offsets"]
    content[name]["data_offsets"] = [begin + by, (end if length is None else begin + length) + by]


def shift_final_norm(content, by):
    """The last array of its section, moved into the padding behind it."""
    begin, end = content["final_norm.scale"]["data_offsets"]
    behind = next(entry for entry in content.values() if entry.get("data_offsets", [0])[0] == end)
    move(content, "final_norm.scale", by)
    behind.update(shape=[behind["shape"][0] - by], data_offsets=[end + by, behind["data_offsets"][1]])
    content["pad.x"] = {"dtype": "U8", "shape": [by], "data_offsets": [begin, begin + by]}


Q = "layer.1.q_proj.kernel"
HOSTILE = {
    "a leaf is missing": (lambda c: c.pop(f"{Q}.scale"), r"layer\.1\.q_proj\.kernel is missing|begins at"),
    "no array at all": (lambda c: [c.pop(k) for k in list(c) if k != "__metadata__"], "its arrays end at"),
    "under another name": (lambda c: c.update({"x": c.pop(f"{Q}.scale")}), r"kernel is missing.*kernel\.scale"),
    "one array too many": (lambda c: c.update({"x": {"dtype": "U8", "shape": [0], "data_offsets": [32, 32]}}), r"holds \d+ arrays, \d+ of which"),
    "before the file": (lambda c: move(c, f"{Q}.codes", -(10**9)), "lies from -"),
    "behind the file": (lambda c: move(c, f"{Q}.codes", 10**9), "begins at byte"),
    "far behind the file": (lambda c: move(c, f"{Q}.codes", 2**63), "begins at byte"),
    "over another": (lambda c: move(c, f"{Q}.codes", -64), "begins at byte"),
    "in the seal": (lambda c: move(c, "embed.table.codes", -32), "begins at byte|lies from"),
    "longer than its shape": (lambda c: c[f"{Q}.codes"]["data_offsets"].__setitem__(1, 10**6), "lies from"),
    "backwards": (lambda c: c[f"{Q}.codes"]["data_offsets"].reverse(), "lies from"),
    "another shape": (lambda c: c[f"{Q}.codes"].update(shape=[8, 64]), "cannot be held as"),
    "a negative shape": (lambda c: c[f"{Q}.codes"].update(shape=[-64, -8]), r"shape \[-64, -8\]"),
    "a shape beyond counting": (lambda c: c[f"{Q}.codes"].update(shape=[2**62, 2**62]), "lies from"),
    "a shape of fractions": (lambda c: c[f"{Q}.codes"].update(shape=[64.0, 8]), r"shape \[64\.0"),
    "a shape of truths": (lambda c: c["pad.0"].update(shape=[True]) if "pad.0" in c else c["seal"].update(shape=[True] * 32), r"shape \[True"),
    "where it must be copied": (lambda c: shift_final_norm(c, 4), "begins at byte .*no multiple of 64"),
    "an unknown type": (lambda c: c[f"{Q}.codes"].update(dtype="F64"), "type 'F64'"),
    "codes of another type": (lambda c: c[f"{Q}.codes"].update(dtype="F32"), "cannot be held as"),
    "scales of another type": (lambda c: c[f"{Q}.scale"].update(dtype="BF16"), "cannot be held as"),
    "norms of another type": (lambda c: c["layer.0.attn_norm.scale"].update(dtype="U32"), "cannot be held as"),
    "layers that differ": (lambda c: [c[f"{Q}.{k}"].update(dtype="F32", shape=[64, 1]) for k in ("scale", "minimum")], "cannot be held as"),
    "no metadata": (lambda c: c["__metadata__"].pop("config"), "cannot be understood"),
    "no sections": (lambda c: c["__metadata__"].update(sections=[]), "bytes follow its last section"),
    "a section of text": (lambda c: c["__metadata__"]["sections"][1].__setitem__(1, "0"), "section 'layer.0' lies"),
    "sections that overlap": (lambda c: c["__metadata__"]["sections"][1].__setitem__(1, 0), "section 'layer.0' lies"),
    "a section that ends late": (lambda c: c["__metadata__"]["sections"][0].__setitem__(2, 8192), "section 'layer.0' lies"),
    "a section that ends inside a page": (lambda c: c["__metadata__"]["sections"][0].__setitem__(2, 64), "section 'embed' lies"),
    "a section beyond the file": (lambda c: c["__metadata__"]["sections"][-1].__setitem__(2, 2**80), "truncated"),
    "two sections of one name": (lambda c: c["__metadata__"]["sections"][1].__setitem__(0, "embed"), "one name"),
    "layers exchanged": (lambda c: c["__metadata__"].update(sections=[[{"layer.0": "layer.1", "layer.1": "layer.0"}.get(n, n), *rest] for n, *rest in c["__metadata__"]["sections"]]), "does not lie in section"),
    "no layers": (lambda c: c["__metadata__"]["config"].update(n_layers=0), "n_layers = 0"),
    "more layers": (lambda c: c["__metadata__"]["config"].update(n_layers=3), r"layer\.2\.attn_norm\.scale is missing"),
    "fewer layers": (lambda c: c["__metadata__"]["config"].update(n_layers=1), "of which its configuration"),
    "too many layers": (lambda c: c["__metadata__"]["config"].update(n_layers=10**9), "n_layers = 1000000000"),
    "layers as text": (lambda c: c["__metadata__"]["config"].update(n_layers="2"), "n_layers = '2'"),
    "no heads": (lambda c: c["__metadata__"]["config"].update(n_heads=0, n_kv_heads=0), "n_heads = 0|cannot be"),
    "a vocabulary beyond counting": (lambda c: c["__metadata__"]["config"].update(vocab_size=2**40), "vocab_size"),
    "another family": (lambda c: c["__metadata__"]["config"].update(family="mamba"), "configuration cannot be.*mamba"),
    "an unknown setting": (lambda c: c["__metadata__"]["config"].update(moe=True), "cannot be understood.*moe"),
    "a base of NaN": (lambda c: c["__metadata__"]["config"].update(rope_theta=float("nan")), "rope_theta = nan"),
    "a number for a name": (lambda c: c["__metadata__"]["origin"].update(name=7), "where text must be"),
    "a list for a tokenizer": (lambda c: c["__metadata__"].update(tokenizer=[1]), "where text must be"),
    "an endless list": (lambda c: c["__metadata__"].update(version="1", x="[" * 100_000), "cannot be understood"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_a_header_made_to_do_harm(name, whole, tmp_path):
    change, message = HOSTILE[name]
    content = read_header(whole)
    change(content)
    bad = with_header(whole, tmp_path / "m.ejx", content)
    with pytest.raises(WeightsError, match=message):
        open_packed(bad, verify="none")


def test_blocks_that_do_not_divide_a_row():
    leaf = next(leaf for leaf in leaf_names(CONFIG) if leaf.kind == "linear" and leaf.shape[1] == 64)
    for columns, is_good in ((2, True), (3, False), (0, False)):
        codes = Part("codes", np.dtype(np.uint32), (leaf.shape[0], 8), 0)
        scale = Part("scale", np.dtype(np.float16), (leaf.shape[0], columns), 0)
        assert (_checked_form(leaf, QuantizedArray(codes, scale, None, bits=4)) is not None) is is_good


@pytest.mark.parametrize(
    ("width", "n_words", "bits", "minimum", "is_good"),
    [
        (64, 8, 4, True, True),
        (64, 4, 2, False, True),
        (64, 4, 2, True, False),  # which one product would add and another not
        (72, 4, 2, False, False),  # the last words are not full
        (68, 8, 4, False, False),
    ],
)
def test_codes_that_do_not_fill_a_row(width, n_words, bits, minimum, is_good):
    leaf = next(leaf for leaf in leaf_names(CONFIG) if leaf.kind == "linear" and leaf.shape[1] == 64)
    leaf = dataclasses.replace(leaf, shape=(leaf.shape[0], width))
    codes = Part("codes", np.dtype(np.uint32), (leaf.shape[0], n_words), 0)
    scale = Part("scale", np.dtype(np.float16), (leaf.shape[0], 2), 0)
    held = QuantizedArray(codes, scale, scale if minimum else None, bits=bits)
    assert (_checked_form(leaf, held) is not None) is is_good


def test_the_helper_makes_good_files(whole, tmp_path):
    use_all(with_header(whole, tmp_path / "m.ejx", read_header(whole)))


def test_a_tokenizer_made_to_do_harm(whole, tmp_path):
    for settings in ({"bos_id": 10**6}, {"no_such": 1}, {"stop_ids": 3}):
        content = read_header(whole)
        content["__metadata__"]["tokenizer"] |= settings
        with pytest.raises(WeightsError, match="its tokenizer cannot be read"):
            load_model(with_header(whole, tmp_path / "m.ejx", content))


def places_in(node, path=()):
    if isinstance(node, dict | list):
        for key, value in node.items() if isinstance(node, dict) else enumerate(node):
            yield (*path, key)
            yield from places_in(value, (*path, key))


STRANGE = st.sampled_from(
    [
        None,
        True,
        0,
        1,
        -1,
        3,
        64,
        2**31,
        2**64,
        -(2**70),
        0.5,
        float("inf"),
        "",
        "F32",
        "x",
        [],
        {},
        [0, 0],
        {"a": 1},
    ]
)


@given(st.data())
def test_anything_anywhere_in_the_header(whole, data):
    """An error that says what is wrong, or a file that can be used; never another error or a read outside."""
    content = read_header(whole)
    for _ in range(data.draw(st.integers(1, 2))):
        *path, last = data.draw(st.sampled_from(list(places_in(content))))
        node = content
        for key in path:
            node = node[key]
        if data.draw(st.booleans()) or isinstance(node, list):
            node[last] = data.draw(STRANGE)
        else:
            del node[last]
    bad = with_header(whole, whole.with_name("strange.ejx"), content)
    with contextlib.suppress(WeightsError):
        use_all(bad)


# Changes while it is in use.


@pytest.fixture
def in_use(whole, tmp_path):
    path = shutil.copy(whole, tmp_path / "m.ejx")
    file = open_packed(path)
    file.layer(0)
    file.check_unchanged()
    return file


def replace(path):
    shutil.copy(path, path.with_name("other"))
    os.replace(path.with_name("other"), path)


def write_into(path):
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\xff")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (replace, r"was replaced or written to.*inode was \d+, is \d+"),
        (write_into, "was replaced or written to.*time of change"),
        (lambda path: os.truncate(path, 4096), r"was replaced or written to.*size in bytes was \d+, is 4096"),
        (lambda path: path.unlink(), "is not any more.*put it back"),
    ],
    ids=["replaced", "written to", "shortened", "removed"],
)
def test_a_file_that_changes_while_it_is_in_use(change, message, in_use):
    os.utime(in_use.path, ns=(0, 0))  # so that a change of the same moment is one
    file = open_packed(in_use.path)
    file.check_unchanged()
    change(in_use.path)
    with pytest.raises(WeightsError, match=message):
        file.check_unchanged()
    with pytest.raises(WeightsError, match=r"m\.ejx"):
        in_use.check_unchanged()


def test_a_section_that_changes_before_its_first_use_is_explained(in_use):
    os.utime(in_use.path, ns=(0, 0))
    file = open_packed(in_use.path)
    write_into(in_use.path)
    with pytest.raises(WeightsError, match="was replaced or written to while in use"):
        file.verify()
    os.truncate(in_use.path, 8192)
    with pytest.raises(WeightsError, match=r"ends \d+ bytes early"):
        file.verify_section("tokenizer")


def test_a_file_that_was_removed_can_be_read_to_the_end(in_use):
    """Only the name is gone; whoever goes on after ``check_unchanged`` complained reads what was there."""
    in_use.path.unlink()
    in_use.verify()
    in_use.load()


def test_the_folder_may_change(whole, tmp_path, monkeypatch):
    shutil.copy(whole, tmp_path / "m.ejx")
    monkeypatch.chdir(tmp_path)
    file = open_packed("m.ejx")
    monkeypatch.chdir("/")
    file.check_unchanged()
    file.verify()


def test_values_that_are_not_finite_are_not_packed(tmp_path):
    class Broken(RandomSource):
        def rows(self, leaf, layer, start, stop):
            values = super().rows(leaf, layer, start, stop)
            return values * np.float32(np.nan) if leaf.path[1] == "down_proj" and layer else values

    origin = Origin(name="x", format="random", sha256="", base="int4")
    with pytest.raises(WeightsError, match=r"down_proj.*layer 1.*not finite"):
        write_packed(tmp_path / "m.ejx", Broken(CONFIG, 0), origin=origin, base="int4")
    assert os.listdir(tmp_path) == []
