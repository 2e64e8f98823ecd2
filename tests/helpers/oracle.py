"""Tiny seeded ``transformers`` models, and their tensors in the shape of our trees.

The name table is written down here once more, on purpose: a mistake in ours must not excuse itself.
Needs torch and transformers; tests import this file only after ``pytest.importorskip``.
"""

import re
from pathlib import Path

import numpy as np
import torch
import transformers

# Torch's threads spin while they wait for each other: beside another test's process on two cores, training steps
# took eight times as long with two of them as with one.
torch.set_num_threads(1)

SIZES = {
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.12,  # large enough that attention is far from uniform
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
GEMMA3 = {
    "num_hidden_layers": 5,
    "head_dim": 24,
    "query_pre_attn_scalar": 40,  # not the head size
    "sliding_window": 13,
    "layer_types": [("sliding" if i in (0, 1, 3) else "full") + "_attention" for i in range(5)],
    "rope_theta": 500_000.0,
    "rope_local_base_freq": 5_000.0,
}
FAMILIES = {
    "llama": ("llama", {"tie_word_embeddings": True}),
    "llama3-rope": ("llama", {"rope_theta": 50_000.0, "rope_scaling": LLAMA3_ROPE}),
    "llama-biases": ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True, "num_key_value_heads": 1}),
    "qwen3": ("qwen3", {"head_dim": 24, "tie_word_embeddings": False}),
    "gemma3": ("gemma3_text", GEMMA3),
    "gemma3-linear-rope": (
        "gemma3_text",
        GEMMA3 | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    ),
}
_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "attn_post_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
}


def make_model(family: str, seed: int = 0):
    """A float32 model of ``FAMILIES``; biases and norm scales are far from what an initialiser leaves."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(kind, **(SIZES | changes))
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").float().eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                values.add_(0.3 * torch.randn_like(values))
    return model


def saved_model(family: str, folder: Path):
    """(the model, its folder as ``save_pretrained`` writes it)."""
    model = make_model(family)
    model.save_pretrained(folder)
    return model, folder


def our_path(name: str, *, four_norms: bool) -> tuple[tuple[str, ...], int | None]:
    """Path in our parameter tree and layer (None: not stacked) of a ``named_parameters()`` name."""
    if name == "model.embed_tokens.weight":
        return ("embed", "table"), None
    if name == "lm_head.weight":
        return ("head", "kernel"), None
    if name == "model.norm.weight":
        return ("final_norm", "scale"), None
    layer, module, kind = re.fullmatch(
        r"model\.layers\.(\d+)\.(?:self_attn\.|mlp\.)?(\w+)\.(weight|bias)", name
    ).groups()
    if module in _LINEARS:
        leaf = "kernel" if kind == "weight" else "bias"
        return ("blocks", module, leaf), int(layer)
    ours = (_FOUR_NORMS if four_norms else _TWO_NORMS).get(module, module)
    return ("blocks", ours, "scale"), int(layer)


def our_adapter_path(name: str) -> tuple[tuple[str, ...], int]:
    """Path in our adapter tree and layer of a trainable parameter of a ``peft`` model."""
    layer, module, side = re.fullmatch(
        r"base_model\.model\.model\.layers\.(\d+)\.(?:self_attn|mlp)\.(\w+)\.lora_([AB])\.default\.weight",
        name,
    ).groups()
    return ("blocks", module, f"lora_{side.lower()}"), int(layer)


def leaf_at(tree, path: tuple[str, ...], layer: int | None) -> np.ndarray:
    """One layer's array of one of our trees."""
    for key in path:
        tree = tree[key]
    return np.asarray(tree if layer is None else tree[layer])


def with_peft(model, *, rank: int, alpha: float, targets=_LINEARS, rslora: bool = False, b_std: float = 0.1):
    """The model wrapped by ``peft``, with B random and not zero (or zero, with ``b_std=0``)."""
    import peft

    settings = peft.LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=list(targets), lora_dropout=0.0,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    torch.manual_seed(5)
    wrapped = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, values in wrapped.named_parameters():
            if "lora_B" in name:
                values.copy_(b_std * torch.randn_like(values))
    return wrapped


def adapters_of(wrapped) -> dict:
    """The adapters of a ``peft`` model as our tree, float32."""
    found: dict = {}
    for name, values in wrapped.named_parameters():
        if values.requires_grad:
            path, layer = our_adapter_path(name)
            found.setdefault(path, {})[layer] = values.detach().numpy().copy()
    adapters: dict = {"blocks": {}}
    for (_, module, side), layers in found.items():
        stack = np.stack([layers[i] for i in range(len(layers))])
        adapters["blocks"].setdefault(module, {})[side] = stack
    return adapters
