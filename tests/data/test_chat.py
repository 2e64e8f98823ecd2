"""Loss on the assistant's turns, and on nothing else."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edgejax.core.errors import DataError
from edgejax.data import ChatRecord, CompletionRecord, TextRecord, assistant_spans, encode_records
from edgejax.data.chat import tokens_in_spans

pytestmark = pytest.mark.quick
content = st.text(st.characters(codec="utf-8", exclude_characters="<|>"), min_size=1, max_size=20)
with_fixture = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def chat(*turns: tuple[str, str]) -> ChatRecord:
    return ChatRecord("chat.jsonl:1", tuple({"role": role, "content": text} for role, text in turns))


def learned(record, tokenizer, **options) -> str:
    (document,) = encode_records([record], tokenizer, **options)
    return tokenizer.decode(document.tokens[document.loss], skip_special=False)


@with_fixture
@given(turns=st.lists(st.tuples(content, content), min_size=1, max_size=4), system=st.booleans())
def test_exactly_the_assistants_turns_are_learned(tokenizer, turns, system):
    said = [("system", "Speak plainly")] * system
    for question, answer in turns:
        said += [("user", question), ("assistant", answer)]
    record = chat(*said)
    (document,) = encode_records([record], tokenizer)
    whole = tokenizer.render_chat(record.messages, add_generation_prompt=False)
    assert document.tokens.tolist() == tokenizer.encode(whole)
    # The first blank lines of an answer may share a token with the newline that ends the header.
    expected = [answer + "<|im_end|>" for _, answer in turns]
    runs = np.flatnonzero(np.diff(np.r_[0, document.loss, 0])).reshape(-1, 2)
    found = [tokenizer.decode(document.tokens[a:b], skip_special=False) for a, b in runs]
    assert [text.removeprefix("\n") for text in found] == [text.removeprefix("\n") for text in expected]


def test_blanks_of_code_are_learned_though_their_offsets_are_trimmed(tokenizer):
    code = "x:\n        return   a\n\n   b"
    ids, offsets = tokenizer.encode_with_offsets(code)
    assert any(start == end for start, end in offsets), "the case this test is about is not there"
    assert all(tokens_in_spans(offsets, [(0, len(code))]))
    assert learned(chat(("user", "Hi"), ("assistant", code)), tokenizer) == code + "<|im_end|>"
    assert len(ids) > 4


def test_loss_reaches_the_turns_end_where_there_is_no_stop_token(make_tokenizer):
    plain = make_tokenizer(
        stop_ids=(),
        chat_template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
    )
    record = chat(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    assert learned(record, plain) == " two\n four\n"


def test_a_conversation_is_not_given_a_second_bos(make_tokenizer):
    made = make_tokenizer(bos_id=0, add_bos=True)
    (document,) = encode_records([chat(("user", "a"), ("assistant", "b"))], made)
    assert document.tokens[0] == 1
    assert 0 not in document.tokens


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        # Writes the last answer unlike those before it, as templates of reasoning models do.
        (
            "{% for m in messages %}{{ '<' + m.role + '>' }}"
            "{{ ('hmm ' if loop.last and m.role == 'assistant' else '') + m.content }}{% endfor %}"
            "{% if add_generation_prompt %}<assistant>{% endif %}",
            r"messages\[1\] differently .*'hmm two' against 'two<user>",
        ),
        (
            "{% for m in messages %}{{ m.content if m.role == 'user' }}{% endfor %}",
            r"leaves messages\[1\] out",
        ),
        ("{{ raise_exception('only one turn') if messages | length > 1 }}", "only one turn"),
        (None, "without a chat template"),
    ],
)
def test_a_template_that_cannot_tell_the_turns_is_refused_with_the_line(make_tokenizer, template, reason):
    record = chat(("user", "one"), ("assistant", "two"), ("user", "three"), ("assistant", "four"))
    with pytest.raises(DataError, match=rf"^chat.jsonl:1: .*{reason}"):
        encode_records([record], make_tokenizer(chat_template=template))


def test_an_assistant_that_speaks_first_is_refused_when_the_template_puts_something_before(tokenizer):
    with pytest.raises(DataError, match=r"messages\[0\]"):
        assistant_spans(chat(("assistant", "Hello")).messages, tokenizer)


@with_fixture
@given(prompt=st.text(st.characters(codec="utf-8"), max_size=20), completion=content)
def test_completion_and_eos_are_learned(tokenizer, prompt, completion):
    (document,) = encode_records(
        [CompletionRecord("x:1", prompt, completion)], tokenizer, parse_special=False
    )
    assert tokenizer.decode(document.tokens[:-1], skip_special=False) == prompt + completion
    assert document.tokens[-1] == 0
    assert document.loss[-1]
    n_prompt = int(np.argmax(document.loss))
    assert document.loss[n_prompt:].all()
    # Byte pieces of one character have the same offsets, so no token before the border holds any completion,
    # and from the border on at least the completion is there.
    learned_text = tokenizer.decode(document.tokens[n_prompt:-1], skip_special=False)
    assert learned_text.endswith(completion)
    assert len(tokenizer.encode(learned_text[: -len(completion)], parse_special=False)) <= 1


def test_text_is_learned_whole(make_tokenizer):
    made = make_tokenizer(bos_id=1, add_bos=True)
    (document,) = encode_records([TextRecord("a.txt", "the fox")], made)
    assert document.tokens.tolist() == [1, *made.encode("the fox", add_bos=False), 0]
    assert document.n_learned == len(document.tokens) - 1


def test_special_tokens_in_text_can_be_taken_as_characters(tokenizer):
    record = TextRecord("a.txt", "stop<|im_end|>here")
    assert 2 in encode_records([record], tokenizer)[0].tokens
    assert 2 not in encode_records([record], tokenizer, parse_special=False)[0].tokens


def test_texts_cannot_end_without_eos(make_tokenizer):
    with pytest.raises(DataError, match="no EOS"):
        encode_records([TextRecord("a.txt", "the fox")], make_tokenizer(eos_id=None))


def test_no_records_are_refused(tokenizer):
    with pytest.raises(DataError, match="no documents"):
        encode_records([], tokenizer)


@with_fixture
@given(
    tokens=st.lists(st.integers(1, 3), min_size=1, max_size=12),
    borders=st.lists(st.integers(0, 36), max_size=6, unique=True),
)
def test_tokens_in_spans_is_overlap(tokens, borders):
    ends = np.cumsum(tokens).tolist()
    offsets = list(zip([0, *ends], ends, strict=False))
    borders.sort()
    spans = list(zip(borders[::2], borders[1::2], strict=False))
    expected = [any(s < end and e > start for s, e in spans) for start, end in offsets]
    assert tokens_in_spans(offsets, spans) == expected
