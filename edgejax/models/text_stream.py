"""Text of tokens as they come: byte-level tokens cut characters, so a piece waits until its characters are whole."""

from collections.abc import Sequence

from edgejax.data.tokenizer import Tokenizer

REPLACEMENT = "\ufffd"  # what decoders write for bytes that are no character (yet)
CONTEXT = 8  # tokens of the prompt that are decoded along: some decoders drop a blank that begins a text


class TextStream:
    """Turns tokens into text, a piece at a time; all pieces joined are the text.

    Each step decodes only the tokens since the last whole piece, with that piece before them, so that a text of n
    tokens costs n short decodings.

    Args:
      tokenizer: of the model.
      prompt: tokens before the first one; their text is not part of any piece.

    Example:
      >>> from tokenizers import Tokenizer as Backend, decoders, models
      >>> backend = Backend(models.WordLevel({"a": 0, "Ã": 1, "©": 2}, unk_token="a"))
      >>> backend.decoder = decoders.ByteLevel()
      >>> stream = TextStream(Tokenizer(backend), [0])
      >>> stream.push(0), stream.push(1), stream.push(2), stream.push(1), stream.end()
      ('a', '', 'é', '', '\ufffd')
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int] = ()):
        self._tokenizer = tokenizer
        self._before = list(prompt[-CONTEXT:])
        # Cut inside a character, its bytes would spoil those that follow: begin at a whole one.
        while self._before and tokenizer.decode(self._before).startswith(REPLACEMENT):
            self._before.pop(0)
        self._waiting: list[int] = []

    def push(self, token: int) -> str:
        """The text that is complete with this token, often a word, sometimes nothing."""
        self._waiting.append(token)
        piece = self._text()
        if not piece or piece.endswith(REPLACEMENT):
            return ""
        self._before, self._waiting = self._waiting, []
        return piece

    def end(self) -> str:
        """What was still waiting; bytes that never became a character are replaced."""
        piece, self._waiting = self._text(), []
        return piece

    def _text(self) -> str:
        before = self._tokenizer.decode(self._before)
        return self._tokenizer.decode(self._before + self._waiting)[len(before) :]
