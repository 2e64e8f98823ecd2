"""Which characters of a conversation are learned: the assistant's turns, found with the model's own template.

A template says nothing about where a turn begins and ends in the text. Rendering prefixes of the conversation
does: what comes after "everything before this turn, and the header of an assistant turn" and up to "everything
up to this turn" is what the model would have had to write, its stop token included.

    full      <user>Hi<end><assistant>Hello<end><user>Bye<end><assistant>See you<end>
    header    <user>Hi<end><assistant>
    turn      <user>Hi<end><assistant>Hello<end>
                                      ^^^^^^^^^^  learned

That holds only where the shorter renderings are textual prefixes of the whole. Templates that rewrite earlier
turns (Qwen3 drops the reasoning of all but the last) break it, and are refused rather than guessed at.
"""

from collections.abc import Mapping, Sequence

from edgejax.core.errors import DataError
from edgejax.data.tokenizer import Tokenizer


def assistant_spans(
    messages: Sequence[Mapping[str, str]], tokenizer: Tokenizer
) -> tuple[str, list[tuple[int, int]]]:
    """A conversation as text, and the characters ``[start, end)`` of each assistant turn in it.

    Raises:
      DataError: no template, a template that refuses the conversation, or one whose rendering of the first
        messages is no prefix of its rendering of all.

    Example:
      >>> from tokenizers import Tokenizer as Backend, models
      >>> tokenizer = Tokenizer(Backend(models.BPE()), chat_template=
      ...     "{% for m in messages %}<{{ m.role }}>{{ m.content }}.{% endfor %}"
      ...     "{% if add_generation_prompt %}<assistant>{% endif %}")
      >>> text, spans = assistant_spans(
      ...     [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}], tokenizer)
      >>> text, [text[start:end] for start, end in spans]
      ('<user>Hi.<assistant>Hello.', ['Hello.'])
    """
    full = tokenizer.render_chat(messages, add_generation_prompt=False)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        header = tokenizer.render_chat(messages[:index], add_generation_prompt=True)
        turn = tokenizer.render_chat(messages[: index + 1], add_generation_prompt=False)
        for part in (header, turn):
            if not full.startswith(part):
                raise DataError(_broken_prefix(part, full, index, len(messages)))
        if not turn[len(header) :].strip():
            raise DataError(
                f"the chat template leaves messages[{index}] out, though it is an assistant turn; "
                "nothing of it could be learned"
            )
        spans.append((len(header), len(turn)))
    return full, spans


def _broken_prefix(part: str, full: str, index: int, n_messages: int) -> str:
    same = next((i for i, (a, b) in enumerate(zip(part, full, strict=False)) if a != b), len(full))
    return (
        f"the chat template renders the messages before and up to messages[{index}] differently alone than "
        f"inside all {n_messages}: {part[same : same + 40]!r} against {full[same : same + 40]!r} at character "
        f"{same}, so the assistant's turns cannot be told apart; split the conversation so that a line ends "
        "with its only assistant turn, or write `prompt` and `completion`"
    )


def tokens_in_spans(offsets: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens touch one of the spans; a token across a border belongs to the span.

    Args:
      offsets: characters ``[start, end)`` of each token, in order. Byte-level tokenizers may report a token of
        blanks as empty (they trim the blanks off): it covers what lies between its predecessor and its end.
      spans: characters ``[start, end)``, in order, not overlapping.

    Example:
      >>> tokens_in_spans([(0, 3), (3, 5), (7, 7), (7, 9), (9, 12)], [(5, 9)])
      [False, False, True, True, False]
    """
    inside, previous_end, current = [], 0, 0
    for start, end in offsets:
        begin = min(start, previous_end) if start == end else start
        previous_end = max(previous_end, end)
        while current < len(spans) and spans[current][1] <= begin:
            current += 1
        inside.append(current < len(spans) and begin < spans[current][1] and end > spans[current][0])
    return inside
