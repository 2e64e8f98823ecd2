"""Tokens to text as they come: whatever the cuts, the pieces are the text."""

import functools

import pytest
from export_cases import byte_level_tokenizer, sentencepiece_tokenizer
from hypothesis import assume, given
from hypothesis import strategies as st

from edgejax.data import Tokenizer
from edgejax.models.text_stream import TextStream

pytestmark = pytest.mark.quick
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=24)


@functools.cache
def tokenizer(kind: str) -> Tokenizer:
    return (
        byte_level_tokenizer() if kind == "bytes" else sentencepiece_tokenizer(prefix=kind == "blank first")
    )


def stream(tok: Tokenizer, prompt: list[int], tokens: list[int]) -> list[str]:
    texts = TextStream(tok, prompt)
    return [*(texts.push(token) for token in tokens), texts.end()]


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "blank first"])
@given(prompt=TEXTS.filter(str.strip), text=TEXTS)
def test_pieces_of_a_text_are_whole_characters_and_joined_it(kind, prompt, text):
    """The tokens of one text, cut anywhere, the first part taken as the prompt."""
    tok = tokenizer(kind)
    tokens = tok.encode(prompt + text, add_bos=False, parse_special=False)
    first = len(tok.encode(prompt, add_bos=False, parse_special=False))
    before, whole = tok.decode(tokens[:first]), tok.decode(tokens)
    assume("\ufffd" not in before and whole.startswith(before))  # no character lies on both sides
    pieces = stream(tok, tokens[:first], tokens[first:])
    assert "".join(pieces) == whole[len(before) :]
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_prompt_longer_than_what_is_decoded_along_may_be_cut_inside_a_character():
    """Byte fallback reads bytes that begin with half a character as nothing but errors."""
    tok = tokenizer("sentencepiece")
    prompt, both = (
        tok.encode(text, add_bos=False) for text in ("\u4e00\u4e8c\u4e09", "\u4e00\u4e8c\u4e09\u56db")
    )
    assert len(prompt) == 9  # three bytes each, none in the vocabulary
    assert "".join(stream(tok, prompt, both[9:])) == "\u56db"


@given(st.lists(st.integers(0, 330), max_size=40))
def test_bytes_that_are_no_characters_come_out_as_decoding_all_at_once_has_them(tokens):
    tok = tokenizer("bytes")
    pieces = stream(tok, tok.encode("fox"), tokens)
    assert "".join(pieces) == tok.decode(tokens)
    assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_a_character_comes_with_its_last_token_and_nothing_is_held_back_longer():
    tok = tokenizer("bytes")
    tokens = tok.encode("a\u20acb")
    assert len(tokens) == 5  # the euro sign is three bytes
    assert stream(tok, tok.encode("fox"), tokens) == ["a", "", "", "\u20ac", "b", ""]
    assert stream(tok, tok.encode("fox"), tokens[:3]) == ["a", "", "", "\ufffd"]


def test_the_blank_between_prompt_and_answer_stays():
    """SentencePiece decoders drop a blank that begins a text."""
    tok = tokenizer("blank first")
    prompt, answer = tok.encode("the quick"), tok.encode("the quick brown")[len(tok.encode("the quick")) :]
    assert tok.decode(answer) == "brown"
    assert "".join(stream(tok, prompt, answer)) == " brown"


def test_each_step_decodes_a_few_tokens_only():
    """A text of n tokens would otherwise take n squared."""
    lengths = []

    class Counting(Tokenizer):
        def decode(self, ids, skip_special=True):
            lengths.append(len(ids))
            return super().decode(ids, skip_special)

    tok = Counting(tokenizer("bytes").backend)
    tokens = tok.encode("the quick brown fox " * 20)
    assert "".join(stream(tok, tokens, tokens)) == "the quick brown fox " * 20
    assert len(tokens) > 100
    assert max(lengths) <= 12
