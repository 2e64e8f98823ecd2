"""Small model files made by other people's writers (``gguf``, ``safetensors``), for tests of the loader and of what stands on it."""

import json
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file

from edgejax.models.config import ModelConfig

TYPES = (Type.F32, Type.F16, Type.BF16, Type.Q8_0, Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q4_K)
TYPES = (*TYPES, Type.Q5_K, Type.Q6_K, Type.TQ2_0)
_HALF_OFFSETS = {Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,)}  # float16 fields of a block
VOCAB = 96
BYTES = [chr(c) for c in (*range(33, 127),)]  # 94 printable byte-level symbols


def tiny(family: str, width: int = 64, **changes) -> ModelConfig:
    """Two layers (three for gemma3), every width a multiple of 64."""
    settings: dict = dict(
        family=family,
        vocab_size=VOCAB,
        d_model=width,
        n_layers=2,
        n_heads=4,
        n_kv_heads=2,
        head_dim=width // 4,
        d_ff=2 * width,
        max_position=128,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        tie_embeddings=True,
    )
    if family == "qwen2":
        settings |= dict(qkv_bias=True, rope_theta=1_000_000.0)
    if family == "qwen3":
        settings |= dict(qk_norm=True, tie_embeddings=False)
    if family == "gemma3":
        settings |= dict(
            n_layers=3,
            qk_norm=True,
            post_norms=True,
            activation="gelu_tanh",
            embed_scale=width**0.5,
            attention_scale=(width // 4) ** -0.5,
            rope_theta=1_000_000.0,
            rope_theta_sliding=10_000.0,
            sliding_window=16,
            sliding_layers=(True, False, True),
            norm_eps=1e-6,
        )
    return ModelConfig(**(settings | changes))


def gguf_tensors(config: ModelConfig, kind=Type.F32, seed: int = 0) -> dict[str, tuple[np.ndarray, Type]]:
    """Raw tensors by GGUF name, written out by hand: vectors in F32, matrices in ``kind`` (one, or by name)."""
    rng = np.random.default_rng(seed)
    d, c, f = config.d_model, config.head_dim, config.d_ff
    q, kv = config.n_heads * c, config.n_kv_heads * c
    matrices = {"token_embd.weight": (config.vocab_size, d)}
    vectors = {"output_norm.weight": d}
    if not config.tie_embeddings:
        matrices["output.weight"] = (config.vocab_size, d)
    for i in range(config.n_layers):
        p = f"blk.{i}."
        matrices |= {p + "attn_q.weight": (q, d), p + "attn_k.weight": (kv, d), p + "attn_v.weight": (kv, d)}
        matrices |= {p + "attn_output.weight": (d, q), p + "ffn_gate.weight": (f, d)}
        matrices |= {p + "ffn_up.weight": (f, d), p + "ffn_down.weight": (d, f)}
        vectors |= {p + "attn_norm.weight": d, p + "ffn_norm.weight": d}
        if config.qkv_bias:
            vectors |= {p + "attn_q.bias": q, p + "attn_k.bias": kv, p + "attn_v.bias": kv}
        if config.qk_norm:
            vectors |= {p + "attn_q_norm.weight": c, p + "attn_k_norm.weight": c}
        if config.post_norms:
            vectors |= {p + "post_attention_norm.weight": d, p + "post_ffw_norm.weight": d}
    out = {name: (rng.normal(1, 0.1, n).astype(np.float32), Type.F32) for name, n in vectors.items()}
    for name, shape in matrices.items():
        out[name] = raw_tensor(kind(name) if callable(kind) else kind, shape, rng)
    return out


def raw_tensor(kind: Type, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[np.ndarray, Type]:
    """A tensor in a block type; K types, which ``gguf`` cannot quantise, get random codes and scales."""
    if kind not in _HALF_OFFSETS:
        return gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), kind), kind
    block, n_bytes = gguf.constants.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (*shape[:-1], shape[-1] // block, n_bytes), dtype=np.uint8)
    for at in _HALF_OFFSETS[kind]:
        scales = rng.normal(0, 1e-3, (*raw.shape[:-1], 1)).astype(np.float16)
        raw[..., at : at + 2] = scales.view(np.uint8)
    return raw.reshape(*shape[:-1], -1), kind


def wide_tensor(tensors: dict, name: str) -> np.ndarray:
    """Its values by ``gguf``'s own arithmetic."""
    raw, kind = tensors[name]
    return gguf.quants.dequantize(raw, kind)


def write_gguf(
    path: Path, config: ModelConfig, tensors: dict, *, arch=None, tokenizer=True, extra=None
) -> Path:
    """The file; ``extra`` is called with the writer to add or change metadata."""
    arch = arch or config.family
    writer = gguf.GGUFWriter(path, arch)
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.max_position)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(config.d_ff)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    if config.family == "gemma3":
        writer.add_sliding_window(config.sliding_window)
        writer.add_array(f"{arch}.attention.sliding_window_pattern", list(config.sliding_layers))
    if tokenizer:
        add_tokenizer(writer)
    if extra:
        extra(writer)
    for name, (raw, kind) in tensors.items():
        writer.add_tensor(name, raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Path(path)


def add_tokenizer(writer, pre: str = "gpt-2") -> None:
    """Byte-level BPE of printable ASCII with one merge and one special token, 96 in all."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(["<|im_end|>", *BYTES, "th"])
    writer.add_token_types([3, *([1] * (VOCAB - 1))])
    writer.add_token_merges(["t h"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")


def hf_tensors(config: ModelConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """float32 tensors by Hugging Face name, written out by hand."""
    rng = np.random.default_rng(seed)
    d, c, f = config.d_model, config.head_dim, config.d_ff
    q, kv = config.n_heads * c, config.n_kv_heads * c
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, d)}
    shapes["model.norm.weight"] = (d,)
    if not config.tie_embeddings:
        shapes["lm_head.weight"] = (config.vocab_size, d)
    for i in range(config.n_layers):
        p = f"model.layers.{i}."
        shapes |= {p + "self_attn.q_proj.weight": (q, d), p + "self_attn.k_proj.weight": (kv, d)}
        shapes |= {p + "self_attn.v_proj.weight": (kv, d), p + "self_attn.o_proj.weight": (d, q)}
        shapes |= {p + "mlp.gate_proj.weight": (f, d), p + "mlp.up_proj.weight": (f, d)}
        shapes |= {p + "mlp.down_proj.weight": (d, f), p + "input_layernorm.weight": (d,)}
        shapes[p + "post_attention_layernorm.weight"] = (d,)
        if config.qkv_bias:
            shapes |= {p + f"self_attn.{n}_proj.bias": (q if n == "q" else kv,) for n in "qkv"}
        if config.qk_norm:
            shapes |= {p + f"self_attn.{n}_norm.weight": (c,) for n in "qk"}
        if config.post_norms:
            shapes |= {p + f"{n}_feedforward_layernorm.weight": (d,) for n in ("pre", "post")}
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def hf_settings(config: ModelConfig) -> dict:
    """config.json in the spelling of transformers 4."""
    settings = {
        "model_type": {"gemma3": "gemma3_text"}.get(config.family, config.family),
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "intermediate_size": config.d_ff,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "tie_word_embeddings": config.tie_embeddings,
        "torch_dtype": "bfloat16",
    }
    if config.family == "gemma3":
        kinds = ["sliding_attention" if s else "full_attention" for s in config.sliding_layers]
        settings |= {"layer_types": kinds, "sliding_window": config.sliding_window}
        settings |= {"query_pre_attn_scalar": config.head_dim, "hidden_activation": "gelu_pytorch_tanh"}
        settings["rope_local_base_freq"] = config.rope_theta_sliding
    return settings


def write_hf(folder: Path, settings: dict, tensors: dict, *, dtype=np.float32, shards: int = 1) -> Path:
    """A folder with config.json, weights in one or several files, and a word-level tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    typed = {name: np.ascontiguousarray(x.astype(dtype)) for name, x in tensors.items()}
    names = list(typed)
    if shards == 1:
        save_file(typed, folder / "model.safetensors")
    else:
        weight_map = {}
        for s in range(shards):
            file = f"model-{s + 1:05d}-of-{shards:05d}.safetensors"
            save_file({n: typed[n] for n in names[s::shards]}, folder / file)
            weight_map |= dict.fromkeys(names[s::shards], file)
        index = {"metadata": {}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    backend = Tokenizer(models.WordLevel({"<eos>": 0, "hello": 1, "you": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["<eos>"])
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<eos>", "chat_template": "{{ messages[0].content }}"})
    )
    return folder


BF16 = np.dtype(ml_dtypes.bfloat16)
