"""Tiny models of every family, their parameters and adapters, for the tests of what edgejax writes."""

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend

from edgejax.data.tokenizer import Tokenizer
from edgejax.models.config import LINEAR_NAMES, ModelConfig, RopeScaling
from edgejax.models.lora import LoraConfig
from edgejax.weights.names import leaf_names

_COMMON = {
    "vocab_size": 384,
    "d_model": 32,
    "n_heads": 4,
    "n_kv_heads": 2,
    "head_dim": 8,
    "d_ff": 64,
    "max_position": 128,
}

CONFIGS = {
    "llama": ModelConfig(family="llama", n_layers=2, tie_embeddings=True, rope_theta=100_000.0, **_COMMON),
    "llama3-biases": ModelConfig(
        family="llama",
        n_layers=2,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        rope_theta=500_000.0,
        rope_scaling=RopeScaling(kind="llama3", factor=8.0, original_max_position=8192),
        **_COMMON,
    ),
    "qwen2": ModelConfig(
        family="qwen2", n_layers=2, qkv_bias=True, tie_embeddings=True, norm_eps=1e-6, **_COMMON
    ),
    "qwen3": ModelConfig(
        family="qwen3", n_layers=2, qk_norm=True, norm_eps=1e-6, **(_COMMON | {"head_dim": 16})
    ),
    "gemma3": ModelConfig(
        family="gemma3",
        n_layers=7,
        norm_eps=1e-6,
        rope_theta=1_000_000.0,
        rope_theta_sliding=10_000.0,
        sliding_window=4,
        sliding_layers=tuple((i + 1) % 6 != 0 for i in range(7)),
        activation="gelu_tanh",
        qk_norm=True,
        post_norms=True,
        embed_scale=32**0.5,
        attention_scale=256**-0.5,
        tie_embeddings=True,
        **(
            _COMMON | {"n_heads": 2, "n_kv_heads": 1, "head_dim": 256}
        ),  # transformers assumes 256 for GGUF files
    ),
}


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Float32 parameters, every leaf different from what an initialiser would leave (norms are not one)."""
    rng = np.random.default_rng(seed)
    params: dict = {}
    for leaf in leaf_names(config):
        shape = (config.n_layers, *leaf.shape) if leaf.stacked else leaf.shape
        values = 0.2 * rng.standard_normal(shape, np.float32) + (leaf.kind == "norm")
        node = params
        for key in leaf.path[:-1]:
            node = node.setdefault(key, {})
        node[leaf.path[-1]] = values.astype(np.float32)
    return params


def random_adapters(config: ModelConfig, lora: LoraConfig, seed: int = 1) -> dict:
    """Adapters as after training: neither side zero."""
    rng = np.random.default_rng(seed)
    shapes = config.linear_shapes()
    return {
        "blocks": {
            name: {
                "lora_a": 0.3
                * rng.standard_normal((config.n_layers, lora.rank, shapes[name][1]), np.float32),
                "lora_b": 0.3
                * rng.standard_normal((config.n_layers, shapes[name][0], lora.rank), np.float32),
            }
            for name in lora.targets
        }
    }


def merged_params(config: ModelConfig, params: dict, adapters: dict | None, lora: LoraConfig | None) -> dict:
    """W + scaling * B A of every leaf by path, in float64 from the formula."""
    out = {}
    for leaf in leaf_names(config):
        node = params
        for key in leaf.path:
            node = node[key]
        values = np.asarray(node, np.float64)
        pair = adapters["blocks"].get(leaf.path[1]) if adapters and leaf.kind == "linear" else None
        if pair is not None and lora is not None:
            a, b = (np.asarray(pair[side], np.float64) for side in ("lora_a", "lora_b"))
            values = values + lora.scaling * np.einsum("lor,lri->loi", b, a)
        out[leaf.path] = values
    return out


LORAS = {
    "all": LoraConfig(rank=4, alpha=6.0, targets=LINEAR_NAMES),
    "attention-rslora": LoraConfig(rank=4, alpha=3.0, rslora=True, targets=("q_proj", "k_proj", "v_proj")),
}


_TEXT = [
    "the quick brown fox jumps over the lazy dog and then there were 123 other things",
    "def function(value): return value + 1  # that is what this function returns",
    "It's what they'll do when there is another one of them in the other thing",
]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
)


def byte_level_tokenizer(kind: str = "smollm", *, add_bos: bool = False) -> Tokenizer:
    """A trained byte-level BPE that cuts text as the tokenizer.json of SmolLM2, GPT-2, Qwen2 or Llama 3 does."""
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend = Backend(models.BPE())
    if kind == "smollm":
        digits = pre_tokenizers.Digits(individual_digits=True)
        backend.pre_tokenizer = pre_tokenizers.Sequence([digits, to_bytes])
    elif kind == "gpt-2":
        backend.pre_tokenizer = to_bytes
    elif kind in ("qwen2", "llama-bpe"):
        digits = "\\p{N}" if kind == "qwen2" else "\\p{N}{1,3}"
        cut = (
            rf"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|"
            r"\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        split = pre_tokenizers.Split(Regex(cut), "isolated")
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        if kind == "qwen2":
            backend.normalizer = normalizers.NFC()
        else:
            backend.model.ignore_merges = True  # as in Llama 3's tokenizer.json
        backend.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    else:
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXT, trainer)
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    return Tokenizer(
        backend, bos_id=1, eos_id=2, pad_id=0, stop_ids=(2, 0), add_bos=add_bos, chat_template=CHAT_TEMPLATE
    )


def sentencepiece_tokenizer(*, prefix: bool) -> Tokenizer:
    """A BPE with byte fallback whose merges come from scores, as those of Llama 2 and Gemma do."""
    words = sorted({word for line in _TEXT for word in line.split()})
    letters = sorted({c for word in words for c in word} | {"\u2581"})
    pieces = sorted({w[:n] for word in words for w in (word, "\u2581" + word) for n in range(2, len(w) + 1)})
    first = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    names = [*first, *letters, *pieces[: 380 - len(first) - len(letters)]]
    vocab = {piece: i for i, piece in enumerate(names)}
    merges = []
    for piece in names[len(first) + len(letters) :]:
        cuts = [(piece[:n], piece[n:]) for n in range(1, len(piece))]
        merges += [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
    backend = Backend(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    steps = [normalizers.Prepend("\u2581")] if prefix else []
    backend.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", "\u2581")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend, bos_id=1, eos_id=2, add_bos=True)
