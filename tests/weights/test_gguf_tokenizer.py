"""Tokenizers rebuilt from GGUF metadata."""

import dataclasses

import gguf
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers
from weight_files import add_tokenizer, gguf_tensors, tiny, write_gguf

from edgejax.core.errors import WeightsError
from edgejax.weights.gguf_file import open_gguf
from edgejax.weights.gguf_tokenizer import PRE_TOKENIZERS, gguf_tokenizer

pytestmark = pytest.mark.quick
CONFIG = tiny("llama")


def with_tokenizer(path, write):
    file = write_gguf(path / "m.gguf", CONFIG, gguf_tensors(CONFIG), tokenizer=False, extra=write)
    return gguf_tokenizer(open_gguf(file))


def byte_level(pre, texts=("x",), **changes):
    """All 256 byte symbols and a few merges."""

    def write(writer):
        symbols = sorted(pre_tokenizers.ByteLevel.alphabet())
        tokens = ["<|end|>", *symbols, "12", "34", "ab", "\u0120a"]
        writer.add_tokenizer_model("gpt2")
        if pre is not None:
            writer.add_tokenizer_pre(pre)
        writer.add_token_list(tokens)
        writer.add_token_types([3, *([1] * (len(tokens) - 1))])
        writer.add_token_merges(["1 2", "3 4", "a b", "\u0120 a"])
        writer.add_eos_token_id(0)
        for key, value in changes.items():
            getattr(writer, key)(value)

    return write


def pieces(tokenizer, text):
    return [tokenizer.decode([i], skip_special=False) for i in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["12", "34", " ", "ab"]),
        ("smollm", ["1", "2", "3", "4", " ", "ab"]),  # every digit by itself
        ("qwen2", ["1", "2", "3", "4", " ", "ab"]),
        ("llama-bpe", ["12", "3", "4", " ", "ab"]),  # digits in threes
        (None, ["12", "3", "4", " ", "ab"]),  # llama.cpp's default: digits in threes too
    ],
)
def test_the_pre_tokenizer_cuts_first(pre, expected, tmp_path):
    assert pieces(with_tokenizer(tmp_path, byte_level(pre)), "1234 ab") == expected


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_any_text_comes_back(pre, tmp_path):
    tokenizer = with_tokenizer(tmp_path, byte_level(pre))
    text = "na\u00efve \u6771\u4eac \U0001f642\r\n\n\tdef f(a):  return 12345 <|end|> don't"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text
    assert tokenizer.encode("<|end|>") == [0]
    assert len(tokenizer.encode("<|end|>", parse_special=False)) > 1


def test_smollm_digits_are_those_of_its_own_tokenizer(tmp_path):
    """tokenizer.json of SmolLM2 has Digits(individual_digits) then ByteLevel; GGUF names them 'smollm'."""
    ours = with_tokenizer(tmp_path, byte_level("smollm"))
    vocab = ours.backend.get_vocab()
    merges = [("1", "2"), ("3", "4"), ("a", "b"), ("\u0120", "a")]
    theirs = Backend(models.BPE(vocab, merges))
    theirs.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    for text in ("1234 ab", "x  12\n\n 3", "\u0661\u0662 \u00bd", " ab 's ab", "\ttab  ab   "):
        assert ours.encode(text) == theirs.encode(text).ids


def sentencepiece(**fields):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types, scores = [2, 3, 3, *([6] * 256)], [0.0] * 259
    for i, piece in enumerate(
        ["\u2581t", "he", "\u2581the", "\u2581", "t", "h", "e", "c", "a", "\u2581ca", "\n\n"]
    ):
        tokens.append(piece)
        types.append(4 if piece == "\n\n" else 1)
        scores.append(-float(i))

    def write(writer):
        writer.add_tokenizer_model("llama")
        writer.add_token_list(tokens)
        writer.add_token_types(types)
        writer.add_token_scores(scores)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        for key, value in fields.items():
            getattr(writer, key)(value)

    return write


def test_sentencepiece_merges_by_score_and_falls_back_to_bytes(tmp_path):
    tokenizer = with_tokenizer(tmp_path, sentencepiece())
    vocab = tokenizer.backend.get_vocab()
    assert tokenizer.add_bos
    assert tokenizer.encode("the ca") == [1, vocab["\u2581the"], vocab["\u2581"], vocab["c"], vocab["a"]]
    assert tokenizer.encode("\u00e9", add_bos=False) == [vocab["\u2581"], vocab["<0xC3>"], vocab["<0xA9>"]]
    assert tokenizer.decode(tokenizer.encode("the \u00e9 ca")) == "the \u00e9 ca"
    assert vocab["\n\n"] in tokenizer.encode("the\n\nca")
    assert tokenizer.stop_ids == (2,)


def test_sentencepiece_without_a_space_in_front(tmp_path):
    """Gemma's way."""
    tokenizer = with_tokenizer(tmp_path, sentencepiece(add_add_space_prefix=False))
    vocab = tokenizer.backend.get_vocab()
    assert tokenizer.encode("the", add_bos=False) == [vocab["t"], vocab["he"]]
    assert tokenizer.decode(tokenizer.encode(" the ca")) == " the ca"


def test_turn_ends_stop_generation_and_plain_text_that_looks_so_does_not(tmp_path):
    def write(writer):
        add_tokenizer(writer)  # <|im_end|> is control, EOS is the same
        writer.add_eot_token_id(5)

    assert with_tokenizer(tmp_path, write).stop_ids == (0, 5)


def test_the_template_and_the_names_in_it(tmp_path):
    tokenizer = with_tokenizer(tmp_path, add_tokenizer)
    assert tokenizer.render_chat([{"role": "user", "content": "hi"}], True) == "hi<|im_end|>"
    assert tokenizer.special["eos_token"] == "<|im_end|>"


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (byte_level("tekken"), "pre-tokenizer 'tekken' is not supported; supported: gpt-2, smollm"),
        (byte_level("gpt-2", add_token_types=[1, 1]), "2 token types for 261 tokens"),
        (byte_level("gpt-2", add_token_merges=["x yz"]), r"merges names \('x', 'yz'\)"),
        (byte_level("gpt-2", add_eos_token_id=9999), "eos_id is 9999"),
        (sentencepiece(add_token_scores=[0.5]), "1 scores for 270 tokens"),
        (lambda w: w.add_tokenizer_model("bert"), "tokens is missing"),
        (lambda w: [w.add_tokenizer_model("bert"), w.add_token_list(["a", "b"])], "'bert' is not supported"),
        (lambda w: [w.add_tokenizer_model("gpt2"), w.add_token_list(["a", "a"])], "names a token twice"),
    ],
)
def test_tokenizers_that_cannot_be_rebuilt(write, message, tmp_path, monkeypatch):
    def replace(self, key, value, *args, **kwargs):  # the writer refuses a second value for a key
        self.kv_data[0].pop(key, None)
        return add(self, key, value, *args, **kwargs)

    add = gguf.GGUFWriter.add_key_value
    monkeypatch.setattr(gguf.GGUFWriter, "add_key_value", replace)
    with pytest.raises(WeightsError, match=message):
        with_tokenizer(tmp_path, write)


def test_a_vocabulary_that_is_not_utf8(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", CONFIG, gguf_tensors(CONFIG))
    data = bytearray(file.read_bytes())
    data[data.index(b"<|im_end|>")] = 0xFF
    file.write_bytes(data)
    with pytest.raises(WeightsError, match=r"entry 0 of tokenizer\.ggml\.tokens is not UTF-8"):
        gguf_tokenizer(open_gguf(file))


def test_a_missing_list_of_merges(tmp_path):
    file = write_gguf(tmp_path / "m.gguf", CONFIG, gguf_tensors(CONFIG))
    opened = open_gguf(file)
    without = {k: v for k, v in opened.metadata.items() if not k.endswith("merges")}
    with pytest.raises(WeightsError, match="merges is missing"):
        gguf_tokenizer(dataclasses.replace(opened, metadata=without))
