"""The tokenizer of a GGUF file, rebuilt for the ``tokenizers`` library.

Two kinds exist: ``gpt2`` (byte-level BPE with a regular expression that cuts the text first, named by
``tokenizer.ggml.pre``) and ``llama`` (SentencePiece BPE with byte fallback; merges are found from the scores).
The expressions are those of the models' own ``tokenizer.json``; llama.cpp's ``llama-vocab.cpp`` writes the same.
"""

from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from edgejax.core.errors import WeightsError
from edgejax.data.tokenizer import Tokenizer
from edgejax.weights.gguf_file import GgufFile

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6  # tokenizer.ggml.token_type
NO_TOKEN = 0xFFFFFFFF  # what llama.cpp writes for an id that there is not
_SPACE = "\u2581"  # SentencePiece writes a space so

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CASED = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _CASED + r"\p{N}{1,3}" + _REST, _CASED + r"\p{N}" + _REST
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {  # tokenizer.ggml.pre -> expressions, applied in turn
    "gpt-2": (_GPT2,),
    "smollm": (r"\p{N}", _GPT2),
    "llama-bpe": (_LLAMA3,),
    "llama3": (_LLAMA3,),
    "llama-v3": (_LLAMA3,),
    "qwen2": (_QWEN2,),
    # What llama.cpp does for files that do not say (older conversions):
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
_WHOLE_WORDS_FIRST = ("llama-bpe", "llama3", "llama-v3")  # a word in the vocabulary is taken without merging

STOP_TEXTS = ("<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<end_of_turn>", "<|end_of_text|>", "<|endoftext|>")
"""Special tokens that end an answer wherever a vocabulary has them, beside EOS and EOT."""


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer and chat template in a GGUF file.

    Raises:
      WeightsError: there is none, its kind or its pre-tokenizer is not supported, or it is inconsistent.
    """
    fields = _Fields(file)
    kind = fields.get("model")
    if kind is None:
        raise WeightsError(
            f"{file.path}: no tokenizer in the file (tokenizer.ggml.model is missing); use a file that has one, or the "
            "model's Hugging Face folder"
        )
    tokens = fields.list_of("tokens", str)
    if len(set(tokens)) != len(tokens):
        raise WeightsError(f"{file.path}: tokenizer.ggml.tokens names a token twice")
    types = fields.list_of("token_type", int, optional=True) or [_NORMAL] * len(tokens)
    if len(types) != len(tokens):
        raise WeightsError(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    pre = fields.text("tokenizer.ggml.pre") or "default"
    if kind == "gpt2":
        backend = _byte_level(fields, tokens, pre)
    elif kind == "llama":
        backend = _sentencepiece(fields, tokens, types)
    else:
        raise WeightsError(
            f"{file.path}: tokenizer model {kind!r} is not supported; supported: gpt2 (byte-level BPE), llama "
            "(SentencePiece BPE)"
        )
    _add_special(backend, tokens, types)
    bos_id = fields.token_id("bos_token_id")
    by_default = bos_id is not None and (kind == "llama" or pre in _WHOLE_WORDS_FIRST)
    named = [fields.token_id("eos_token_id"), fields.token_id("eot_token_id")]
    by_text = [backend.token_to_id(text) for text in STOP_TEXTS]
    stops = [i for i in named if i is not None]
    stops += [i for i in by_text if i is not None and types[i] != _NORMAL]
    return Tokenizer(
        backend,
        bos_id=bos_id,
        eos_id=named[0],
        pad_id=fields.token_id("padding_token_id"),
        stop_ids=tuple(dict.fromkeys(stops)),
        add_bos=bool(fields.get("add_bos_token", by_default)),
        chat_template=fields.text("tokenizer.chat_template"),
    )


class _Fields:
    """Checked access to ``tokenizer.ggml.<key>``."""

    def __init__(self, file: GgufFile):
        self.file = file

    def get(self, key: str, default: Any = None) -> Any:
        return self.file.metadata.get(f"tokenizer.ggml.{key}", default)

    def text(self, key: str) -> str | None:
        value = self.file.metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise WeightsError(f"{self.file.path}: {key} is {value!r}; it must be text")
        return value

    def list_of(self, key: str, kind: type, optional: bool = False) -> list:
        value = self.file.strings(f"tokenizer.ggml.{key}") if kind is str else self.get(key)
        if value is None and optional:
            return []
        if not isinstance(value, list) or not value or not isinstance(value[0], kind):
            raise WeightsError(
                f"{self.file.path}: tokenizer.ggml.{key} is missing or no list of {kind.__name__}"
            )
        return value

    def token_id(self, key: str) -> int | None:
        """An id, or None where the file has none."""
        value = self.get(key)
        if value in (None, NO_TOKEN):
            return None
        if not isinstance(value, int) or not 0 <= value < NO_TOKEN:
            raise WeightsError(
                f"{self.file.path}: tokenizer.ggml.{key} is {value!r}, which is no token's number"
            )
        return value


def _byte_level(fields: _Fields, tokens: list[str], pre: str) -> Backend:
    if pre not in PRE_TOKENIZERS:
        raise WeightsError(
            f"{fields.file.path}: pre-tokenizer {pre!r} is not supported; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    vocab = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ", 1)) for merge in fields.list_of("merges", str)]
    bad = [
        m for m in merges if len(m) != 2 or m[0] not in vocab or m[1] not in vocab or m[0] + m[1] not in vocab
    ]
    if bad:
        raise WeightsError(
            f"{fields.file.path}: tokenizer.ggml.merges names {bad[0]!r}, which is not in the vocabulary"
        )
    backend = Backend(models.BPE(vocab, merges, ignore_merges=pre in _WHOLE_WORDS_FIRST))
    if pre == "qwen2":
        backend.normalizer = normalizers.NFC()
    splits = [pre_tokenizers.Split(Regex(expression), "isolated") for expression in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    backend.decoder = decoders.ByteLevel()
    return backend


def _sentencepiece(fields: _Fields, tokens: list[str], types: list[int]) -> Backend:
    scores = fields.list_of("scores", float)
    if len(scores) != len(tokens):
        raise WeightsError(f"{fields.file.path}: {len(scores)} scores for {len(tokens)} tokens")
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = [token for token, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN]
    backend = Backend(
        models.BPE(
            vocab,
            _merges_from_scores(vocab, types, scores),
            unk_token=unknown[0] if unknown else None,
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = fields.get("add_space_prefix", True)
    backend.normalizer = normalizers.Sequence(
        [*([normalizers.Prepend(_SPACE)] if prefix else []), normalizers.Replace(" ", _SPACE)]
    )
    # No text is cut before the merges: a piece may cross spaces, as SentencePiece's may.
    unprefix = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *unprefix]
    )
    return backend


def _merges_from_scores(
    vocab: dict[str, int], types: list[int], scores: list[float]
) -> list[tuple[str, str]]:
    """Every way to make a piece of two, best piece first: SentencePiece always joins the pair of the best score."""
    ranked = []
    for piece, token_id in vocab.items():
        if types[token_id] not in (_NORMAL, _USER_DEFINED):
            continue
        for cut in range(1, len(piece)):
            left, right = vocab.get(piece[:cut]), vocab.get(piece[cut:])
            if left is not None and right is not None:
                ranked.append((-scores[token_id], token_id, left, right, piece[:cut], piece[cut:]))
    ranked.sort()
    return [(left, right) for *_, left, right in ranked]


def _add_special(backend: Backend, tokens: list[str], types: list[int]) -> None:
    """Tokens that are found in the text before anything else, with the ids they already have."""
    special, plain = [], []
    for token, kind in zip(tokens, types, strict=True):
        if kind in (_CONTROL, _UNKNOWN):
            special.append(AddedToken(token, special=True, normalized=False))
        elif kind == _USER_DEFINED:
            plain.append(AddedToken(token, special=False, normalized=_SPACE in token))
    backend.add_special_tokens(special)
    backend.add_tokens(plain)
