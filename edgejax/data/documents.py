"""Documents: the tokens of a record, and which of them are to be learned.

| record | tokens | learned |
|---|---|---|
| text | [BOS] text EOS | all |
| prompt, completion | [BOS] prompt completion EOS | the completion and EOS |
| messages | the rendered conversation | the assistant's turns, to their stop token |

BOS is there where the model's tokenizer says so; a chat template writes its own. A prompt and its completion
are tokenised as one text; a token that reaches across the border counts as completion.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int

from edgejax.core.errors import DataError
from edgejax.data.chat import assistant_spans, tokens_in_spans
from edgejax.data.sources import ChatRecord, CompletionRecord, Record, TextRecord
from edgejax.data.tokenizer import Tokenizer


@dataclass(frozen=True)
class Document:
    """Tokens that belong together; attention never leaves them.

    Attributes:
      tokens: int32 ``[n]``.
      loss: bool ``[n]``; whether ``tokens[i]`` is learned, from ``tokens[:i]``. ``loss[0]`` is never used.
      name: where it came from, for messages.
      digest: sha256 of what it was made from, which decides the side it is split to: the text of a record
        (so the split is the same with another tokenizer), or the tokens if not given.

    Raises:
      DataError: arrays of different lengths or ranks.

    Example:
      >>> import numpy as np
      >>> Document(np.array([5, 6, 7]), np.array([False, True, True]), "example").n_learned
      2
    """

    tokens: Int[np.ndarray, " n"]
    loss: Bool[np.ndarray, " n"]
    name: str
    digest: str = ""

    def __post_init__(self) -> None:
        tokens, loss = np.asarray(self.tokens, np.int32), np.asarray(self.loss, bool)
        if tokens.ndim != 1 or tokens.shape != loss.shape:
            raise DataError(
                f"{self.name}: a document needs as many loss flags as tokens, one-dimensional; "
                f"got {tokens.shape} tokens and {loss.shape} flags"
            )
        object.__setattr__(self, "tokens", tokens)
        object.__setattr__(self, "loss", loss)
        if not self.digest:
            object.__setattr__(self, "digest", hashlib.sha256(tokens.tobytes() + loss.tobytes()).hexdigest())

    @property
    def n_learned(self) -> int:
        """Tokens that are learned (the first has nothing before it to be learned from)."""
        return int(np.count_nonzero(self.loss[1:]))


def encode_records(
    records: Iterable[Record], tokenizer: Tokenizer, *, parse_special: bool = True
) -> list[Document]:
    """Tokenise records.

    Args:
      records: from ``read_records`` or a corpus.
      tokenizer: the model's.
      parse_special: read special tokens written in texts, prompts and completions as such. Conversations
        always do, for templates are made of them.

    Returns:
      One document a record, in order.

    Raises:
      DataError: no record, a record without a token to learn, a tokenizer without EOS, or a conversation
        whose template cannot be used (``assistant_spans``).
    """
    documents = [_encode(record, tokenizer, parse_special) for record in records]
    if not documents:
        raise DataError("no documents: the data holds not one record")
    return documents


def _encode(record: Record, tokenizer: Tokenizer, parse_special: bool) -> Document:
    match record:
        case TextRecord(_, text):
            ids = [*tokenizer.encode(text, parse_special=parse_special), _eos(tokenizer)]
            loss, source = [True] * len(ids), [text]
        case CompletionRecord(_, prompt, completion):
            ids, loss = _completion(prompt, completion, tokenizer, parse_special)
            source = [prompt, completion]
        case ChatRecord(_, messages):
            ids, loss = _chat(record, tokenizer)
            source = [part for message in messages for part in (message["role"], message["content"])]
    digest = hashlib.sha256("\0".join([type(record).__name__, *source]).encode())
    document = Document(np.array(ids, np.int32), np.array(loss, bool), record.name, digest.hexdigest())
    if not document.n_learned:
        raise DataError(f"{record.name}: none of its {len(ids)} tokens is learned; remove it or write more")
    return document


def _completion(prompt: str, completion: str, tokenizer: Tokenizer, parse_special: bool):
    ids, offsets = tokenizer.encode_with_offsets(prompt + completion, parse_special=parse_special)
    loss = tokens_in_spans(offsets, [(len(prompt), len(prompt) + len(completion))])
    return [*ids, _eos(tokenizer)], [*loss, True]


def _chat(record: ChatRecord, tokenizer: Tokenizer):
    try:
        text, spans = assistant_spans(record.messages, tokenizer)
    except DataError as error:
        raise DataError(f"{record.name}: {error}") from error
    ids, offsets = tokenizer.encode_with_offsets(text, add_bos=False)
    loss = np.zeros(len(ids), bool)
    for span in spans:
        turn = np.flatnonzero(tokens_in_spans(offsets, [span]))
        stops = turn[np.isin(np.array(ids)[turn], tokenizer.stop_ids)]
        # What a template writes after the stop token (a newline, mostly) is never generated.
        loss[turn if not len(stops) else turn[turn <= stops[-1]]] = True
    return ids, loss


def _eos(tokenizer: Tokenizer) -> int:
    if tokenizer.eos_id is None:
        raise DataError("this tokenizer has no EOS token, so no text could end; give the tokenizer an eos_id")
    return tokenizer.eos_id
