"""A model of a few thousand parameters as a Hugging Face folder, with a tokenizer of single bytes.

Written with ``safetensors`` and ``tokenizers`` alone, so that reading it is a test of our reader.
"""

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
import tokenizers

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "torch_dtype": "float32",
}
SPECIAL = {"<|begin|>": 256, "<|end|>": 257, "<|pad|>": 258}


def write_tiny_text(path: Path) -> None:
    """Twenty short documents as JSON lines."""
    lines = [{"text": f"Document {n} says that {n} and {n} make {n + n}. " * 3} for n in range(20)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_tiny_model(folder: Path, seed: int = 0) -> Path:
    """Writes config, weights (float32, seeded) and tokenizer into ``folder`` and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    safetensors.numpy.save_file(_weights(seed), folder / "model.safetensors", metadata={"format": "np"})
    _tokenizer().save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {
                "bos_token": "<|begin|>",
                "eos_token": "<|end|>",
                "pad_token": "<|pad|>",
                "add_bos_token": False,
                "tokenizer_class": "PreTrainedTokenizerFast",
            }
        )
    )
    return folder


def _weights(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    d, f, v = CONFIG["hidden_size"], CONFIG["intermediate_size"], CONFIG["vocab_size"]
    q, kv = 4 * CONFIG["head_dim"], 2 * CONFIG["head_dim"]

    def matrix(n_out: int, n_in: int) -> np.ndarray:
        return (random.standard_normal((n_out, n_in)) * n_in**-0.5).astype(np.float32)

    tensors = {
        "model.embed_tokens.weight": matrix(v, d),
        "model.norm.weight": np.ones(d, np.float32),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        shapes = {
            "self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d),
            "self_attn.o_proj": (d, q), "mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f),
        }  # fmt: skip
        tensors |= {f"{prefix}{name}.weight": matrix(*shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{prefix}{name}.weight"] = np.ones(d, np.float32)
    return tensors


def _tokenizer() -> tokenizers.Tokenizer:
    """Byte-level BPE without merges: ids 0 to 255 are the bytes, in GPT-2's printable alphabet, sorted."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    added = [tokenizers.AddedToken(text, special=True, normalized=False) for text in SPECIAL]
    backend.add_special_tokens(added)
    assert {text: backend.token_to_id(text) for text in SPECIAL} == SPECIAL
    return backend
