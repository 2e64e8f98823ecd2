"""Generation with cached keys and values against whole forward passes, and everything a caller may choose."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from export_cases import CHAT_TEMPLATE, CONFIGS, LORAS, byte_level_tokenizer, random_adapters, random_params

from edgejax.core.errors import ConfigError, DataError, RunError
from edgejax.data import Tokenizer
from edgejax.models import Decoder, LoraConfig, ModelConfig, generate, logits
from edgejax.quant import quantize_int4, quantize_int8

LORA = LORAS["all"]
# Random models with tied embeddings repeat themselves; these two are tried most, so they are not tied.
FAMILIES = CONFIGS | {
    name: dataclasses.replace(CONFIGS[name], tie_embeddings=False) for name in ("llama", "gemma3")
}
PROMPT = "the quick brown fox"  # 8 tokens, twice gemma3's window
PROMPTS = {
    "one token": "t",
    "short": PROMPT,
    "long": "the quick brown fox jumps over the lazy dog and then there were 123 other things that jump",
}
N = 24  # new tokens: with the short prompt they fill the smallest cache to its end


@dataclasses.dataclass(frozen=True)
class Model:
    config: ModelConfig
    params: dict
    tokenizer: Tokenizer | None


@functools.cache
def backend():
    return byte_level_tokenizer().backend


def tokenizer(**options) -> Tokenizer:
    """Without stop tokens unless some are given, so that a test gets as many tokens as it asks for."""
    return Tokenizer(backend(), bos_id=1, **options)


@functools.cache
def model(family: str = "llama") -> Model:
    config = FAMILIES[family]
    return Model(config, jax.tree.map(jnp.asarray, random_params(config)), tokenizer())


@functools.partial(jax.jit, static_argnums=0)
def all_logits(decoder, params, adapters, tokens):
    return logits(decoder, params, adapters, tokens)


def next_logits(m: Model, adapters, tokens: list[int]) -> np.ndarray:
    """Logits of the token after these, from a forward pass over all of them."""
    row = np.zeros((1, 128), np.int32)  # one shape for all; a decoder does not see what comes later
    row[0, : len(tokens)] = tokens
    decoder = Decoder(m.config, LORA if adapters else None)
    return np.asarray(all_logits(decoder, m.params, adapters or {}, row))[0, len(tokens) - 1]


def greedy_by_whole_passes(m: Model, adapters, prompt: str, n: int) -> list[int]:
    """The likeliest token again and again, each time from a forward pass over all tokens so far."""
    start = tokenizer().encode(prompt)
    made: list[int] = []
    for _ in range(n):
        last = next_logits(m, adapters, start + made)
        runner_up, best = np.sort(last)[-2:]
        assert best - runner_up > 1e-5, "too close to tell a mistake from rounding; take another seed"
        made.append(int(last.argmax()))
    return made


@pytest.mark.parametrize(
    ("family", "prompt", "adapted"),
    [
        *((family, prompt, a) for family in ("llama", "gemma3") for prompt in PROMPTS for a in (False, True)),
        *((family, "short", False) for family in ("llama3-biases", "qwen2", "qwen3")),
    ],
)
def test_the_cache_gives_the_tokens_of_whole_passes(family, prompt, adapted):
    m, text = model(family), PROMPTS[prompt]
    adapters = random_adapters(m.config, LORA) if adapted else None
    result = generate(m, text, adapters=adapters, lora=LORA if adapted else None, max_tokens=N)
    assert list(result.tokens) == greedy_by_whole_passes(m, adapters, text, N)
    assert len(set(result.tokens)) > 8  # not one token over and over
    assert (result.finish_reason, result.prompt_tokens) == ("length", len(tokenizer().encode(text)))


def test_a_quantised_model_gives_the_tokens_of_whole_passes():
    params, blocks = model().params, {}
    for name, leaves in model().params["blocks"].items():
        quantize = quantize_int4 if name in ("q_proj", "v_proj", "up_proj", "down_proj") else quantize_int8
        blocks[name] = {k: quantize(leaf, 8) if k == "kernel" else leaf for k, leaf in leaves.items()}
    table, head = quantize_int8(params["embed"]["table"], 8), quantize_int8(params["head"]["kernel"], 8)
    narrow = params | {"blocks": blocks, "embed": {"table": table}, "head": {"kernel": head}}
    m = dataclasses.replace(model(), params=narrow)
    made = generate(m, PROMPT, max_tokens=N).tokens
    assert list(made) == greedy_by_whole_passes(m, None, PROMPT, N)
    assert made != generate(model(), PROMPT, max_tokens=N).tokens


def test_adapters_and_the_window_matter():
    """What the comparison with whole passes would not notice if neither side knew of them."""
    m = model("gemma3")
    made = generate(m, PROMPT, max_tokens=16).tokens
    adapted = generate(m, PROMPT, adapters=random_adapters(m.config, LORA), lora=LORA, max_tokens=16)
    wider = dataclasses.replace(m, config=dataclasses.replace(m.config, sliding_window=64))
    assert adapted.tokens != made
    assert generate(wider, PROMPT, max_tokens=16).tokens != made


# What ends a text


@pytest.mark.parametrize("n", [1, 2, 3, 17])
def test_max_tokens_cuts_the_same_text_shorter(n):
    result, longer = generate(model(), PROMPT, max_tokens=n), generate(model(), PROMPT, max_tokens=N)
    assert result.tokens == longer.tokens[:n]
    assert result.finish_reason == "length"
    assert (result.tokens_per_s is None) == (n < 3)


def test_stop_tokens_end_the_text_and_are_no_part_of_it():
    free = generate(model(), PROMPT, max_tokens=N)
    stop = next(token for token in free.tokens[4:] if token < tokenizer().vocab_size)
    for m, given in (
        (model(), [383, stop]),
        (_with_tokenizer(stop_ids=(stop,)), None),
        (_with_tokenizer(eos_id=stop), None),
    ):
        result = generate(m, PROMPT, max_tokens=N, stop=given)
        assert result.finish_reason == "stop"
        assert result.tokens == free.tokens[: free.tokens.index(stop)]
        assert result.text == tokenizer().decode(result.tokens)


def test_stop_tokens_of_the_caller_replace_those_of_the_model():
    free = generate(model(), PROMPT, max_tokens=8)
    stopping = _with_tokenizer(stop_ids=tuple(t for t in free.tokens if t < tokenizer().vocab_size))
    assert generate(stopping, PROMPT, max_tokens=8).finish_reason == "stop"
    assert generate(stopping, PROMPT, max_tokens=8, stop=()).tokens == free.tokens
    assert generate(stopping, PROMPT, max_tokens=8, stop=[free.tokens[0]]).tokens == ()


def _with_tokenizer(**options) -> Model:
    return dataclasses.replace(model(), tokenizer=tokenizer(**options))


# Drawing


def draw(prompt: str = PROMPT, **options):
    return generate(model(), prompt, max_tokens=N, **({"temperature": 1.0} | options)).tokens


def test_a_seed_gives_the_same_draws_and_another_one_others():
    draws = [draw(seed=seed) for seed in (0, 1, 2, 3)]
    assert [draw(seed=seed) for seed in (0, 1, 2, 3)] == draws
    assert len(set(draws)) == 4
    assert len({tokens[0] for tokens in draws}) > 1  # the very first token is drawn too


def test_every_position_is_drawn_anew():
    made, start = list(draw(temperature=1e4, top_k=3)), tokenizer().encode(PROMPT)
    ranks = [
        np.argsort(-next_logits(model(), None, start + made[:i])).tolist().index(made[i]) for i in range(N)
    ]
    assert set(ranks) == {0, 1, 2}  # one key for all positions would give one rank
    assert max(ranks.count(rank) for rank in (0, 1, 2)) < N - 6


def test_draws_of_a_position_do_not_depend_on_how_many_are_asked_for():
    long = generate(model(), PROMPT, max_tokens=N, temperature=1.0, seed=5).tokens
    assert generate(model(), PROMPT, max_tokens=9, temperature=1.0, seed=5).tokens == long[:9]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1e-5},
        {"top_k": 1, "temperature": 3.0},
        {"top_p": 1e-6, "temperature": 3.0},
        {"temperature": 0.0},
    ],
    ids=str,
)
def test_what_leaves_one_token_is_greedy(options):
    greedy = generate(model(), PROMPT, max_tokens=N).tokens
    assert draw(**options, seed=1) == draw(**options, seed=2) == greedy
    assert draw(temperature=3.0) != greedy


@pytest.mark.parametrize(
    ("options", "may_draw"),
    [
        ({"top_k": 3}, lambda p: np.argsort(-p)[:3]),
        ({"top_p": 0.4}, lambda p: np.argsort(-p)[: 1 + np.searchsorted(np.cumsum(np.sort(p)[::-1]), 0.4)]),
    ],
    ids=["top_k", "top_p"],
)
def test_top_k_and_top_p_draw_from_the_likeliest_alone(options, may_draw):
    start, ranks, n_unlikely = tokenizer().encode(PROMPT), set(), 0
    for seed in range(3):
        made = list(draw(temperature=2.0, seed=seed, **options))
        free = draw(temperature=2.0, seed=seed)
        for i, token in enumerate(made):
            z = next_logits(model(), None, start + made[:i]).astype(np.float64) / 2.0
            likeliest = may_draw(np.exp(z - z.max()) / np.exp(z - z.max()).sum()).tolist()
            assert token in likeliest
            ranks.add(likeliest.index(token))
            n_unlikely += free[i] not in likeliest
    assert len(ranks) >= 3  # not always the same one of them
    assert n_unlikely > 10  # and without the limit others would have been drawn


# Text


def test_pieces_joined_are_the_text_and_no_piece_is_empty_or_half_a_character():
    for seed in range(3):
        pieces: list[str] = []
        result = generate(model(), PROMPT, max_tokens=N, temperature=2.0, seed=seed, on_text=pieces.append)
        assert "".join(pieces) == result.text == str(result) == tokenizer().decode(result.tokens)
        assert all(pieces)
        assert 8 < len(pieces) <= N + 1  # as they come, not at the end
        assert "\ufffd" in result.text  # tokens that are parts of characters were among them
        assert not any(piece.endswith("\ufffd") for piece in pieces[:-1])


def test_text_holds_no_special_tokens():
    bos = 1
    favourite = np.zeros(model().config.vocab_size, np.float32)
    favourite[bos] = 1e3
    head = model().params["head"]["kernel"] * 0 + jnp.asarray(favourite)[:, None]
    # Every hidden state with a positive sum now asks for BOS, the others for token 0, which is special too.
    special = dataclasses.replace(model(), params=model().params | {"head": {"kernel": head}})
    pieces: list[str] = []
    result = generate(special, PROMPT, max_tokens=8, on_text=pieces.append)
    assert set(result.tokens) <= {0, bos}
    assert len(result.tokens) == 8
    assert (result.text, pieces) == ("", [])


def test_bos_begins_the_prompt_where_the_model_says_so():
    with_bos = generate(_with_tokenizer(add_bos=True), PROMPT, max_tokens=12)
    assert with_bos.prompt_tokens == 1 + len(tokenizer().encode(PROMPT))
    assert list(with_bos.tokens) == greedy_by_whole_passes(model(), None, "<|im_start|>" + PROMPT, 12)


def test_a_chat_is_written_by_the_template_up_to_the_answer():
    template = CHAT_TEMPLATE + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    # The template writes what begins a text, if anything does: add_bos must not put a second one before.
    chat = _with_tokenizer(chat_template=template, add_bos=True)
    written = "<|im_start|>user\nthe dog<|im_end|>\n<|im_start|>assistant\n"
    results = [
        generate(chat, "the dog", chat=True, max_tokens=12),
        generate(chat, [{"role": "user", "content": "the dog"}], max_tokens=12),
    ]
    for result in results:
        assert result.prompt_tokens == len(tokenizer().encode(written))
        assert list(result.tokens) == greedy_by_whole_passes(model(), None, written, 12)
    plain = generate(chat, "the dog", max_tokens=12)
    assert plain.tokens != results[0].tokens  # a template alone makes no chat of a text


# What cannot be honoured


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, not 0"),
        ({"temperature": -0.1}, "temperature .* not -0.1"),
        ({"temperature": float("nan")}, "temperature .* not nan"),
        ({"temperature": float("inf")}, "temperature .* not inf"),
        ({"top_p": 0.0}, "top_p .* not 0.0"),
        ({"top_p": 1.01}, "top_p .* not 1.01"),
        ({"top_k": -1}, "top_k .* not -1"),
        ({"lora": LORA}, "adapters is missing"),
        ({"adapters": {"blocks": {"q_proj": {}}}}, "their configuration, lora is missing"),
        (
            {"adapters": {"blocks": {"q_proj": {}}}, "lora": LORA},
            r"the adapters are on \['q_proj'\] and lora",
        ),
        ({"chat": True}, "no chat template"),
        (
            {"max_tokens": 121},
            "8 tokens and 121 new ones exceed the model's context of 128.*allow_long_context",
        ),
    ],
    ids=str,
)
def test_settings_that_cannot_be_honoured(options, message):
    with pytest.raises(ConfigError, match=message):
        generate(model(), PROMPT, **options)


@pytest.mark.quick
def test_prompts_that_hold_nothing():
    for prompt in ("", []):
        with pytest.raises(ConfigError, match="prompt is empty"):
            generate(model(), prompt)
    with pytest.raises(ConfigError, match="has no tokens"):
        generate(_with_tokenizer(chat_template="{# silent #}"), "the dog", chat=True)


@pytest.mark.quick
def test_a_template_that_refuses():
    refusing = _with_tokenizer(chat_template="{{ raise_exception('only systems may speak') }}")
    with pytest.raises(DataError, match="only systems may speak"):
        generate(refusing, [{"role": "user", "content": "the dog"}])


@pytest.mark.quick
def test_a_model_without_its_tokenizer():
    with pytest.raises(ConfigError, match="without its tokenizer"):
        generate(dataclasses.replace(model(), tokenizer=None), PROMPT)


def test_the_context_may_be_filled_and_only_exceeded_when_allowed():
    short = dataclasses.replace(model(), config=dataclasses.replace(model().config, max_position=20))
    expected = list(generate(model(), PROMPT, max_tokens=N).tokens)
    assert list(generate(short, PROMPT, max_tokens=12).tokens) == expected[:12]
    with pytest.raises(ConfigError, match="8 tokens and 13 new"):
        generate(short, PROMPT, max_tokens=13)
    long = generate(short, PROMPT, max_tokens=N, allow_long_context=True)
    assert list(long.tokens) == expected


def test_weights_that_are_not_finite():
    broken = jax.tree.map(lambda leaf: leaf, model().params)
    broken["blocks"]["down_proj"]["kernel"] = broken["blocks"]["down_proj"]["kernel"].at[1, 3, 4].set(jnp.nan)
    with pytest.raises(RunError, match="not finite after 8 tokens; its weights are damaged"):
        generate(dataclasses.replace(model(), params=broken), PROMPT, max_tokens=N)
    adapters = random_adapters(model().config, LORA)
    adapters["blocks"]["q_proj"]["lora_b"][0, 0, 0] = np.inf
    for temperature in (0.0, 1.0):
        with pytest.raises(RunError, match="weights or the adapter are damaged"):
            generate(model(), PROMPT, adapters=adapters, lora=LORA, max_tokens=N, temperature=temperature)


def test_weights_that_fail_later_on():
    """NaN in the embedding of a token that is not in the prompt, but comes third."""
    made = generate(model(), PROMPT, max_tokens=8).tokens
    third = made[2]
    assert third not in (*made[:2], *tokenizer().encode(PROMPT))
    table = model().params["embed"]["table"].at[third].set(jnp.nan)
    broken = dataclasses.replace(model(), params=model().params | {"embed": {"table": table}})
    pieces: list[str] = []
    with pytest.raises(RunError, match="not finite after 11 tokens"):
        generate(broken, PROMPT, max_tokens=8, on_text=pieces.append)
    assert tokenizer().decode(made[:3]).startswith("".join(pieces))
    assert pieces


def test_adapters_of_another_rank_are_refused():
    """``alpha / rank`` of another rank would scale them wrongly, and nobody would know."""
    adapters = random_adapters(model().config, LORA)
    other = LoraConfig(rank=2 * LORA.rank, alpha=LORA.alpha)
    with pytest.raises(ConfigError, match="rank"):
        generate(model(), PROMPT, adapters=adapters, lora=other, max_tokens=1)
