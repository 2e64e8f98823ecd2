"""The tokenizer's own promises, and the sandbox that chat templates run in."""

import datetime

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejax.core.errors import DataError, WeightsError
from edgejax.data.template import FIXED_DATE, render_template

pytestmark = pytest.mark.quick
HI = [{"role": "user", "content": "Hi"}]
any_text = st.text(st.characters(codec="utf-8"), max_size=60)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_text)
def test_decode_inverts_encode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, parse_special=False)) == text


def test_bos_is_added_as_the_model_says_unless_told(make_tokenizer):
    with_bos = make_tokenizer(bos_id=1, add_bos=True)
    plain = with_bos.encode("the fox", add_bos=False)
    assert with_bos.encode("the fox") == [1, *plain]
    assert make_tokenizer(bos_id=1).encode("the fox") == plain
    ids, offsets = with_bos.encode_with_offsets("the fox")
    assert ids == [1, *plain]
    assert offsets[0] == (0, 0)
    assert offsets[-1][1] == len("the fox")


def test_special_tokens_in_text_are_read_or_taken_as_characters(tokenizer):
    assert tokenizer.encode("<|im_end|>") == [2]
    as_characters = tokenizer.encode("<|im_end|>", parse_special=False)
    assert len(as_characters) > 1
    assert tokenizer.decode(as_characters) == "<|im_end|>"
    assert tokenizer.encode("<|im_end|>") == [2]  # the switch does not stay
    assert tokenizer.decode([2]) == ""
    assert tokenizer.decode([2], skip_special=False) == "<|im_end|>"


@pytest.mark.parametrize("text", ["caf\udce9", "half \ud83d"])
def test_text_that_is_no_utf8_is_a_data_error(tokenizer, text):
    with pytest.raises(DataError, match=f"cannot be written as UTF-8 at character {len(text) - 1}"):
        tokenizer.encode(text)


def test_truncation_left_in_a_tokenizer_file_is_switched_off(make_tokenizer):
    source = make_tokenizer().backend
    source.enable_truncation(3)
    source.enable_padding(length=8)
    rebuilt = type(make_tokenizer())(source, eos_id=0)
    text = "the quick brown fox " * 5
    assert rebuilt.decode(rebuilt.encode(text)) == text


def test_ids_and_size(make_tokenizer):
    made = make_tokenizer(bos_id=1, pad_id=0, stop_ids=(2, 2))
    assert made.stop_ids == (2, 0)
    assert made.vocab_size == len(made.backend.get_vocab())
    assert made.special == {
        "bos_token": "<|im_start|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }


@pytest.mark.parametrize("ids", [{"eos_id": 4000}, {"bos_id": -1}, {"pad_id": 999}, {"stop_ids": (2, 4000)}])
def test_an_id_outside_the_vocabulary_is_refused(make_tokenizer, ids):
    with pytest.raises(WeightsError, match=rf"{next(iter(ids))} is .*vocabulary of \d+"):
        make_tokenizer(**ids)


def test_bos_that_is_not_there_is_refused(make_tokenizer):
    with pytest.raises(WeightsError, match="add_bos"):
        make_tokenizer(add_bos=True)
    with pytest.raises(DataError, match="no BOS"):
        make_tokenizer().encode("a", add_bos=True)


def test_render_chat_is_the_models_own_format(tokenizer):
    expected = "<|im_start|>system\nBe helpful<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    assert tokenizer.render_chat(HI, add_generation_prompt=False) == expected
    assert tokenizer.render_chat(HI, add_generation_prompt=True) == expected + "<|im_start|>assistant\n"


def test_without_a_template_the_error_says_what_else_works(make_tokenizer):
    with pytest.raises(DataError, match="`prompt`/`completion`"):
        make_tokenizer(chat_template=None).render_chat(HI, add_generation_prompt=True)


def test_templates_see_special_tokens(make_tokenizer):
    made = make_tokenizer(chat_template="{{ eos_token }}{{ name }}", special={"name": "x"})
    assert made.render_chat(HI, add_generation_prompt=False) == "<|endoftext|>x"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{% for m in messages %}\n  {{- m.content }}\n{% endfor %}", "Hi\n"),  # blocks are trimmed
        ("{% for m in messages %}{% break %}{% endfor %}end", "end"),
        ("{% generation %}{{ messages[0].content }}{% endgeneration %}!", "Hi!"),
        ("{{ {'a': '<é>'} | tojson }}", '{"a": "<é>"}'),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    ],
)
def test_templates_find_what_they_were_written_for(template, expected):
    assert render_template(template, HI, add_generation_prompt=False) == expected


def test_the_date_is_the_callers_when_it_gives_one():
    day = datetime.date(2031, 2, 3)
    assert day != FIXED_DATE
    template = "{{ strftime_now('%Y-%m-%d') }}"
    assert render_template(template, HI, add_generation_prompt=False, today=day) == "2031-02-03"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% if %}", "does not parse, line 1"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].content + 1 }}", "roles \\['user'\\]"),
        ("{{ messages[0].parts[0] }}", "parts"),
        ("{{ messages.append(1) }}", "unsafe|not safe"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    ],
)
def test_a_template_that_fails_is_a_data_error(template, reason):
    with pytest.raises(DataError, match=reason):
        render_template(template, HI, add_generation_prompt=False)
