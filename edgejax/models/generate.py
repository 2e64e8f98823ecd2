"""A prompt continued: tokens in, tokens and text out.

Two programs do the work: one reads the prompt and makes the cache, the other reads a token and makes the next. Both
are compiled for lengths rounded up to a few sizes (``cache.bucket``), and serve every prompt and setting of those.
"""

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from edgejax.core.arrays import Array, PyTree
from edgejax.core.errors import ConfigError, RunError
from edgejax.data.tokenizer import Tokenizer
from edgejax.models.cache import KVCache, bucket
from edgejax.models.config import ModelConfig
from edgejax.models.decode import decode_step, prefill
from edgejax.models.decoder import Decoder
from edgejax.models.lora import LoraConfig
from edgejax.models.sampling import NOT_FINITE, Sampling, make_sampling, next_token
from edgejax.models.text_stream import TextStream

Message = Mapping[str, Any]


class TextModel(Protocol):
    """What generation needs of a model; ``weights.LoadedModel`` is one."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def params(self) -> PyTree: ...
    @property
    def tokenizer(self) -> Tokenizer | None: ...


@dataclasses.dataclass(frozen=True)
class GenerationResult:
    """What was generated; printed, it is its text.

    Attributes:
      text: without the prompt and without special tokens.
      tokens: ids, without the stop token that ended them.
      finish_reason: ``"stop"``: a stop token came; ``"length"``: ``max_tokens`` were made.
      prompt_tokens: length of the prompt, BOS and chat template included.
      tokens_per_s: speed of decoding, from the second step on (the first may compile); None for fewer than three.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    tokens_per_s: float | None

    def __str__(self) -> str:
        return self.text


def generate(
    model: TextModel,
    prompt: str | Sequence[Message],
    *,
    adapters: PyTree | None = None,
    lora: LoraConfig | None = None,
    max_tokens: int = 100,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    stop: Sequence[int] | None = None,
    on_text: Callable[[str], object] | None = None,
    chat: bool = False,
    allow_long_context: bool = False,
) -> GenerationResult:
    """Continue a prompt until a stop token, or for ``max_tokens`` tokens.

    Args:
      model: configuration, parameters (plain or quantised) and tokenizer, as ``load_model`` returns them.
      prompt: text to continue, or the messages of a chat (``{"role": ..., "content": ...}`` each), which the
        model's own template turns into text that ends with the header of an answer.
      adapters: LoRA adapters; needs ``lora``, their configuration.
      lora: see ``adapters``.
      max_tokens: at most so many new tokens, at least 1.
      temperature: 0 takes the likeliest token; above, tokens are drawn: the higher, the more evenly.
      top_p: draw from the smallest set of likeliest tokens that has this probability.
      top_k: draw from so many likeliest tokens; 0: from all.
      seed: of the draws; the same seed, prompt, model and versions give the same tokens.
      stop: token ids that end the text; None: the model's own. ``()``: none.
      on_text: called with each new piece of text, cut between whole characters; the pieces joined are the text.
      chat: take a text as the message of a user.
      allow_long_context: let prompt and new tokens exceed the context the model was trained for.

    Raises:
      ConfigError: a setting out of range; an empty prompt; a chat with a model that has no template; more tokens
        than the model's context; adapters without ``lora`` or other ones than it says; no tokenizer.
      DataError: the template refuses the messages.
      RunError: the model gives NaN or infinity.

    Example:
      >>> from edgejax.weights import load_model  # doctest: +SKIP
      >>> print(generate(load_model("smollm2-135m"), "What is a list?", chat=True))  # doctest: +SKIP
    """
    if max_tokens < 1:
        raise ConfigError(f"max_tokens must be at least 1, not {max_tokens}")
    sampling = make_sampling(temperature, top_p, top_k)
    tokenizer = _tokenizer_of(model)
    tokens = encode_prompt(tokenizer, prompt, chat=chat)
    _check_length(len(tokens), max_tokens, model.config, allow_long_context)
    _check_adapters(adapters, lora)
    decoder, stops = Decoder(model.config, lora), set(tokenizer.stop_ids if stop is None else stop)
    stream = TextStream(tokenizer, tokens)
    pieces: list[str] = []

    def emit(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    made: list[int] = []
    clock = _Clock()
    finish_reason: Literal["stop", "length"] = "length"
    steps = token_steps(decoder, model.params, adapters or {}, tokens, max_tokens, sampling, seed)
    for token in steps:
        clock.tick()
        if token == NOT_FINITE:
            raise RunError(
                f"the model's logits are not finite after {len(tokens) + len(made)} tokens; its weights "
                f"{'or the adapter are' if lora else 'are'} damaged, or training diverged"
            )
        if token in stops:
            finish_reason = "stop"
            break
        made.append(token)
        emit(stream.push(token))
    emit(stream.end())
    return GenerationResult("".join(pieces), tuple(made), finish_reason, len(tokens), clock.per_s())


def encode_prompt(tokenizer: Tokenizer, prompt: str | Sequence[Message], *, chat: bool = False) -> list[int]:
    """Tokens of a text, or of a chat up to the header of the answer.

    Raises:
      ConfigError: nothing to continue, or a chat without a template.
      DataError: the template refuses the messages.
    """
    if not prompt:
        raise ConfigError("the prompt is empty; give some text, or at least one message")
    if isinstance(prompt, str) and not chat:
        tokens = tokenizer.encode(prompt)
    else:
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if tokenizer.chat_template is None:
            raise ConfigError(
                "this model has no chat template, so messages cannot be written as it knows them; give plain "
                "text, or use a model that was tuned for chat"
            )
        # The template writes BOS itself where the model wants one.
        tokens = tokenizer.encode(tokenizer.render_chat(messages, add_generation_prompt=True), add_bos=False)
    if not tokens:
        raise ConfigError(f"the prompt {prompt!r} has no tokens; give some text")
    return tokens


def token_steps(
    decoder: Decoder,
    params: PyTree,
    adapters: PyTree,
    prompt: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    seed: int,
):
    """Yields ``max_tokens`` token ids one by one (``sampling.NOT_FINITE`` where the model has no answer)."""
    params, adapters = jax.device_put((params, adapters))  # nothing happens to what is there already
    n_prompt = len(prompt)
    padded = np.zeros((1, bucket(n_prompt)), np.int32)
    padded[0, :n_prompt] = prompt
    capacity = max(bucket(n_prompt + max_tokens), padded.shape[1])
    state = _start(
        decoder, capacity, params, adapters, padded, jnp.int32(n_prompt), jax.random.key(seed), sampling
    )
    yield int(state.token[0])
    for _ in range(max_tokens - 1):
        state = _advance(decoder, state, params, adapters, sampling)
        yield int(state.token[0])


def compile_generation(
    decoder: Decoder, params: PyTree, adapters: PyTree, n_prompt: int, max_tokens: int
) -> list[jax.stages.Compiled]:
    """Compile what ``generate`` runs for the likeliest tokens, to have it in the compile cache.

    Args:
      decoder: with the adapters' configuration, where there are any.
      params: shapes and dtypes of its parameters.
      adapters: of its adapters; ``{}``: none.
      n_prompt: tokens of the prompt.
      max_tokens: new ones.

    Returns:
      The programs: of the prompt, and of one token more.
    """
    padded = jax.ShapeDtypeStruct((1, bucket(n_prompt)), np.int32)
    capacity = max(bucket(n_prompt + max_tokens), padded.shape[1])
    length, sampling = jax.ShapeDtypeStruct((), np.int32), make_sampling(0.0, 1.0, 0)
    start = _start.lower(decoder, capacity, params, adapters, padded, length, jax.random.key(0), sampling)
    advance = _advance.lower(decoder, start.out_info, params, adapters, sampling)
    return [start.compile(), advance.compile()]


class _State(NamedTuple):
    cache: KVCache
    token: Int[Array, " B"]  # made, not yet read
    position: Int[Array, ""]  # where it will be read
    key: Array


@partial(jax.jit, static_argnums=(0, 1))
def _start(decoder, capacity, params, adapters, tokens, length, key, sampling) -> _State:
    cache, logits = prefill(decoder, params, adapters, tokens, length, capacity)
    return _State(cache, next_token(logits, jax.random.fold_in(key, length), sampling), length, key)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def _advance(decoder, state: _State, params, adapters, sampling) -> _State:
    cache, logits = decode_step(decoder, params, adapters, state.cache, state.token, state.position)
    position = state.position + 1
    token = next_token(logits, jax.random.fold_in(state.key, position), sampling)
    return _State(cache, token, position, state.key)


class _Clock:
    """Tokens per second from the second token on: prefill and both compilations lie before it."""

    def __init__(self):
        self._times: list[float] = []

    def tick(self) -> None:
        self._times.append(time.perf_counter())

    def per_s(self) -> float | None:
        if len(self._times) < 3:
            return None
        return (len(self._times) - 2) / (self._times[-1] - self._times[1])


def _tokenizer_of(model: TextModel) -> Tokenizer:
    if model.tokenizer is None:
        raise ConfigError("this model was loaded without its tokenizer, and text needs one; load it with it")
    return model.tokenizer


def _check_length(n_prompt: int, max_tokens: int, config: ModelConfig, allow_long_context: bool) -> None:
    if n_prompt + max_tokens > config.max_position and not allow_long_context:
        raise ConfigError(
            f"a prompt of {n_prompt} tokens and {max_tokens} new ones exceed the model's context of "
            f"{config.max_position}; use fewer, or allow_long_context=True (--allow-long-context) to go beyond"
        )


def _check_adapters(adapters: PyTree | None, lora: LoraConfig | None) -> None:
    if not adapters and lora is None:
        return
    if not adapters or lora is None:
        missing = "adapters" if lora else "their configuration, lora"
        raise ConfigError(f"adapters and lora belong together; {missing} is missing")
    given = set(adapters.get("blocks", {}))
    if given != set(lora.targets):
        raise ConfigError(f"the adapters are on {sorted(given)} and lora says {sorted(lora.targets)}")
    ranks = {pair["lora_a"].shape[-2] for pair in adapters["blocks"].values()}
    if ranks != {lora.rank}:
        raise ConfigError(f"the adapters have rank {sorted(ranks)} and lora says {lora.rank}")
