"""A tokenizer as GGUF metadata.

From a GGUF source the fields are copied. From a ``tokenizer.json`` they are made: a byte-level BPE becomes the kind
``gpt2``, with the name of the pre-tokenizer that cuts a difficult text the same way; a SentencePiece BPE (byte
fallback) becomes the kind ``llama``, whose scores are the ranks of the merges. What was made is then read back by our
own reader, and must cut that text into the same tokens, or it is refused.
"""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import gguf
from gguf.constants import TokenType
from tokenizers import Tokenizer as Backend

from edgejax.core.errors import ConfigError, EdgejaxError, WeightsError
from edgejax.data.tokenizer import Tokenizer
from edgejax.weights.gguf_file import GgufFile, StringArray, open_gguf
from edgejax.weights.gguf_tokenizer import STOP_TEXTS, gguf_tokenizer

# Each line tells some pair of pre-tokenizers apart: digits, contractions, case, spaces, newlines, scripts, marks.
PROBE = (
    "Hello, world! It's 1234567 o'clock; WE'LL see... don't I'M\n\n\n  indented\tcode(x_1) += 3.14e-10;\r\n"
    "   many   spaces   \n \n e\u0301 \u00e9 na\u00efve \u4f60\u597d\u4e16\u754c \u3053\u3093\u306b\u3061\u306f "
    "\u0645\u0631\u062d\u0628\u0627 \U0001f680\U0001f468\u200d\U0001f4bb ///--- #include <a.h> $100,000.00 \u00bd\u00b2 END"
)
_INSTEAD = "export it as merged-safetensors, and convert that with llama.cpp's convert_hf_to_gguf.py"
_BYTE_LEVEL_KINDS = ("gpt-2", "smollm", "llama-bpe", "qwen2")
_BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")


def copied_fields(source: str | Path, vocab_size: int) -> dict[str, Any]:
    """All ``tokenizer.*`` metadata of a GGUF file.

    Raises:
      WeightsError: the file cannot be read, or its vocabulary is not the model's.
    """
    file = open_gguf(source)
    fields = read_fields(file, [key for key in file.metadata if key.startswith("tokenizer.")])
    n_tokens = len(fields.get(gguf.Keys.Tokenizer.LIST, ()))
    if n_tokens != vocab_size:
        raise WeightsError(f"{source} has {n_tokens} tokens, the model's embedding table {vocab_size} rows")
    return fields


def read_fields(file: GgufFile, keys: Iterable[str]) -> dict[str, Any]:
    """Metadata values, arrays of strings included; keys that the file does not have are left out."""
    found = {key: file.metadata[key] for key in keys if key in file.metadata}
    return {key: file.strings(key) if isinstance(v, StringArray) else v for key, v in found.items()}


def made_fields(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """``tokenizer.*`` metadata for a tokenizer that came from ``tokenizer.json``.

    Args:
      tokenizer: byte-level BPE or SentencePiece BPE.
      vocab_size: rows of the embedding table; ids without a token get ``[PAD<id>]``.

    Raises:
      ConfigError: another kind of tokenizer, or one whose way of cutting text GGUF has no name for.
    """
    model = json.loads(tokenizer.backend.to_str())["model"]
    if model["type"] != "BPE":
        raise ConfigError(f"a {model['type']} tokenizer cannot be written to GGUF; {_INSTEAD}")
    if model.get("byte_fallback"):
        choices = [_sentencepiece(tokenizer, model, vocab_size, prefix) for prefix in (False, True)]
    else:
        choices = [_byte_level(tokenizer, model, vocab_size)]
    for fields in choices:
        fields |= _ids_and_template(tokenizer, model)
        if _cuts_alike(fields, tokenizer):
            return fields
    raise ConfigError(f"this tokenizer, written to GGUF, would cut text otherwise than it does; {_INSTEAD}")


def add_fields(writer: gguf.GGUFWriter, fields: dict[str, Any]) -> None:
    """Add metadata with the value types that llama.cpp expects: u32 for numbers, i32 and f32 inside lists."""
    for key, value in fields.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)


def _byte_level(tokenizer: Tokenizer, model: dict, vocab_size: int) -> dict[str, Any]:
    tokens, types = _vocabulary(tokenizer.backend, model, vocab_size)
    return {
        gguf.Keys.Tokenizer.MODEL: "gpt2",
        gguf.Keys.Tokenizer.PRE: _pre_tokenizer_name(tokenizer.backend, model),
        gguf.Keys.Tokenizer.LIST: tokens,
        gguf.Keys.Tokenizer.TOKEN_TYPE: types,
        gguf.Keys.Tokenizer.MERGES: [" ".join(_pair(merge)) for merge in model["merges"]],
    }


def _pre_tokenizer_name(backend: Backend, model: dict) -> str:
    """The GGUF name of what cuts ``PROBE`` like ``backend``; told by the pieces, whatever the vocabulary."""
    pieces = _pieces(backend)
    for name in _BYTE_LEVEL_KINDS:
        fields = {
            "model": "gpt2",
            "pre": name,
            "tokens": ["a", "b", "ab"],
            "merges": ["a b"],
            "add_bos_token": False,
        }
        known = gguf_tokenizer(_as_file({f"tokenizer.ggml.{k}": v for k, v in fields.items()})).backend
        if _pieces(known) == pieces and known.model.ignore_merges == bool(model.get("ignore_merges")):
            return name
    raise ConfigError(
        f"this tokenizer cuts text as none of {', '.join(_BYTE_LEVEL_KINDS)} do, so GGUF has no name for it here; {_INSTEAD}"
    )


def _pieces(backend: Backend) -> list[str]:
    text = PROBE if backend.normalizer is None else backend.normalizer.normalize_str(PROBE)
    if backend.pre_tokenizer is None:
        return [text]
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(text)]


def _sentencepiece(tokenizer: Tokenizer, model: dict, vocab_size: int, prefix: bool) -> dict[str, Any]:
    tokens, types = _vocabulary(tokenizer.backend, model, vocab_size)
    first_rank: dict[str, int] = {}
    last = ""
    for rank, merge in enumerate(model["merges"]):
        piece = "".join(_pair(merge))
        if piece != last and piece in first_rank:
            raise ConfigError(
                f"the merges of {piece!r} lie apart, which SentencePiece scores cannot say; {_INSTEAD}"
            )
        first_rank.setdefault(piece, rank)
        last = piece
    never = len(model["merges"])
    return {
        gguf.Keys.Tokenizer.MODEL: "llama",
        gguf.Keys.Tokenizer.PRE: "default",
        gguf.Keys.Tokenizer.LIST: tokens,
        gguf.Keys.Tokenizer.SCORES: [-float(first_rank.get(token, never)) for token in tokens],
        gguf.Keys.Tokenizer.TOKEN_TYPE: types,
        gguf.Keys.Tokenizer.ADD_PREFIX: prefix,
    }


def _vocabulary(backend: Backend, model: dict, vocab_size: int) -> tuple[list[str], list[int]]:
    """Tokens by id and their types."""
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(TokenType.UNUSED)] * vocab_size
    for token, i in model["vocab"].items():
        byte = bool(model.get("byte_fallback")) and _BYTE_PIECE.fullmatch(token)
        tokens[i], types[i] = token, int(TokenType.BYTE if byte else TokenType.NORMAL)
    for i, added in backend.get_added_tokens_decoder().items():
        kind = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
        tokens[i], types[i] = added.content, int(kind)
    unknown = model["vocab"].get(model.get("unk_token"))
    if unknown is not None and model.get("byte_fallback"):
        types[unknown] = int(TokenType.UNKNOWN)
    return tokens, types


def _ids_and_template(tokenizer: Tokenizer, model: dict) -> dict[str, Any]:
    stops = [i for i in tokenizer.stop_ids if i != tokenizer.eos_id]
    # Stop tokens with a known text are found by it; only another one needs a field.
    eot = next((i for i in stops if tokenizer.backend.id_to_token(i) not in STOP_TEXTS), None)
    fields = {
        gguf.Keys.Tokenizer.BOS_ID: tokenizer.bos_id,
        gguf.Keys.Tokenizer.EOS_ID: tokenizer.eos_id,
        gguf.Keys.Tokenizer.EOT_ID: eot,
        gguf.Keys.Tokenizer.PAD_ID: tokenizer.pad_id,
        gguf.Keys.Tokenizer.UNK_ID: model["vocab"].get(model.get("unk_token")),
        gguf.Keys.Tokenizer.ADD_BOS: tokenizer.add_bos,
        gguf.Keys.Tokenizer.CHAT_TEMPLATE: tokenizer.chat_template,
    }
    return {key: value for key, value in fields.items() if value is not None}


def _cuts_alike(fields: dict[str, Any], tokenizer: Tokenizer) -> bool:
    specials = "".join(t.content for t in tokenizer.backend.get_added_tokens_decoder().values())[:2000]
    try:
        again = gguf_tokenizer(_as_file(fields))
    except EdgejaxError as error:
        raise ConfigError(f"this tokenizer cannot be written to GGUF ({error}); {_INSTEAD}") from error
    return all(again.encode(text) == tokenizer.encode(text) for text in (PROBE, "a", f"x{specials} y"))


class _MadeFile(GgufFile):
    """Metadata that is in memory and in no file yet, for our own reader."""

    def strings(self, key: str) -> list[str] | None:
        return self.metadata.get(key)


def _as_file(fields: dict[str, Any]) -> GgufFile:
    return _MadeFile(Path("the GGUF metadata made from this tokenizer"), fields, {})


def _pair(merge) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right
