"""Text to token ids and back: a ``tokenizers.Tokenizer`` plus what a model says about it.

The backend splits and merges; this class adds what GGUF and Hugging Face keep beside it: which ids begin, end
and stop a text, whether a text starts with BOS, and the chat template.
"""

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

import tokenizers

from edgejax.core.errors import DataError, WeightsError
from edgejax.data.template import FIXED_DATE, render_template


class Tokenizer:
    """A tokenizer as a model file describes it.

    Args:
      backend: the ``tokenizers.Tokenizer``. It becomes this object's own: truncation and padding, which a
        ``tokenizer.json`` may carry along from someone's training run, are switched off.
      bos_id: token id that begins a text, or None.
      eos_id: token id that ends a text, or None.
      pad_id: token id of padding, or None.
      stop_ids: ids that end generation; ``eos_id`` is added when it is not among them.
      add_bos: whether ``encode`` puts BOS first when it is not told.
      chat_template: Jinja source, or None.
      special: names that the chat template sees besides ``bos_token``, ``eos_token`` and ``pad_token``
        (which come from the ids unless given here), each with its text.

    Raises:
      WeightsError: an id outside the vocabulary, or ``add_bos`` without ``bos_id``.

    Example:
      >>> from tokenizers import Tokenizer as Backend, models, pre_tokenizers
      >>> backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "hello": 2, "you": 3, "?": 4}, unk_token="?"))
      >>> backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
      >>> _ = backend.add_special_tokens(["<s>", "</s>"])
      >>> tokenizer = Tokenizer(backend, bos_id=0, eos_id=1, add_bos=True)
      >>> tokenizer.encode("hello you")
      [0, 2, 3]
      >>> tokenizer.decode([0, 2, 3, 1]), tokenizer.stop_ids, tokenizer.vocab_size
      ('hello you', (1,), 5)
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        stop_ids: Sequence[int] = (),
        add_bos: bool = False,
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
    ):
        backend.no_truncation()
        backend.no_padding()
        stops = tuple(dict.fromkeys([*stop_ids, *([] if eos_id is None else [eos_id])]))
        named = {"bos_id": bos_id, "eos_id": eos_id, "pad_id": pad_id}
        texts = {}
        for name, token_id in [*named.items(), *(("stop_ids", i) for i in stops)]:
            if token_id is None:
                continue
            text = backend.id_to_token(token_id) if token_id >= 0 else None
            if text is None:
                raise WeightsError(
                    f"tokenizer: {name} is {token_id}, which is no token of the vocabulary of "
                    f"{backend.get_vocab_size()}; the tokenizer's files do not belong together"
                )
            texts[name.replace("_id", "_token")] = text
        if add_bos and bos_id is None:
            raise WeightsError(
                "tokenizer: add_bos is set and bos_id is not; give bos_id or switch add_bos off"
            )
        self.backend = backend
        self.bos_id, self.eos_id, self.pad_id = bos_id, eos_id, pad_id
        self.stop_ids = stops
        self.add_bos = add_bos
        self.chat_template = chat_template
        self.special = {k: v for k, v in texts.items() if k != "stop_tokens"} | dict(special or {})

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows, never fewer."""
        return self.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_bos: bool | None = None, *, parse_special: bool = True) -> list[int]:
        """Token ids of a text, without EOS.

        Args:
          text: any text.
          add_bos: put BOS first; None means what the model's files say. A rendered chat brings its own BOS
            where the model wants one: encode it with ``add_bos=False``.
          parse_special: read special tokens written in the text (``<|im_end|>``) as such; False takes
            them as plain characters, for text that is not trusted.
        """
        return [*self._begin(add_bos), *self._split(text, parse_special).ids]

    def encode_with_offsets(
        self, text: str, add_bos: bool | None = None, *, parse_special: bool = True
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """``encode``, and for each token the characters ``[start, end)`` of the text it covers (BOS: (0, 0))."""
        begin, encoding = self._begin(add_bos), self._split(text, parse_special)
        return [*begin, *encoding.ids], [*((0, 0) for _ in begin), *encoding.offsets]

    def _begin(self, add_bos: bool | None) -> tuple[int, ...]:
        if not (self.add_bos if add_bos is None else add_bos):
            return ()
        if self.bos_id is None:
            raise DataError("this tokenizer has no BOS token; encode without add_bos")
        return (self.bos_id,)

    def _split(self, text: str, parse_special: bool) -> tokenizers.Encoding:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # bytes of another encoding in an argument, half a surrogate pair
            raise DataError(
                f"the text cannot be written as UTF-8 at character {error.start} "
                f"({text[error.start : error.end]!r}); convert it"
            ) from error
        self.backend.encode_special_tokens = not parse_special
        try:
            return self.backend.encode(text, add_special_tokens=False)
        finally:
            self.backend.encode_special_tokens = False

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of token ids; special tokens are left out unless ``skip_special`` is False."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
        *,
        today: datetime.date = FIXED_DATE,
    ) -> str:
        """The text of a conversation by the model's own template; encode it with ``add_bos=False``.

        Args:
          messages: ``{"role": ..., "content": ...}`` each.
          add_generation_prompt: end with the header of an assistant turn that is still to be written.
          today: the date for templates that write one; fixed by default, so that data stays the same.

        Raises:
          DataError: the model has no chat template, or the template refuses the messages.
        """
        if self.chat_template is None:
            raise DataError(
                "this model comes without a chat template; use JSONL with `text` or `prompt`/`completion`, "
                "or a model that was tuned for chat"
            )
        return render_template(
            self.chat_template,
            messages,
            add_generation_prompt=add_generation_prompt,
            variables=self.special,
            today=today,
        )
