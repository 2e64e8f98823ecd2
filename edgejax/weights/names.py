"""One table of weight names: ours, Hugging Face's and GGUF's, for every family we read and write.

Three facts beside the names decide whether values survive the way in and out:

- **Row order.** Rotary embedding pairs channel ``c`` with ``c + C/2`` here and in Hugging Face files. GGUF files
  of the llama architecture pair ``2c`` with ``2c + 1``, so the rows of each head of q and k (and their biases) are
  interleaved there; ``LeafName.gguf_interleaved_heads`` says for how many heads. Other families are stored as here.
- **Norm scales.** Gemma's Hugging Face files hold ``w`` of ``(1 + w)``; GGUF files and we hold ``1 + w``.
  ``LeafName.hf_offset`` is what to add on reading and subtract on writing (1.0 or 0.0).
- **Tied heads.** With ``config.tie_embeddings`` there is no head leaf, in no format.

GGUF names follow ``gguf.constants.TENSOR_NAMES``; Hugging Face names are those of ``state_dict()`` of
``LlamaForCausalLM``, ``Qwen2ForCausalLM``, ``Qwen3ForCausalLM`` and ``Gemma3ForCausalLM``.
"""

import dataclasses
from typing import Literal

import numpy as np
from jaxtyping import Int

from edgejax.models.config import ModelConfig

GGUF_ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3"}
"""Our family -> ``general.architecture``."""

HF_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
}
"""Our family -> ``architectures[0]`` of config.json."""

HF_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
"""Our family -> ``model_type`` of config.json."""

MAX_LAYERS, MAX_SIZE = 10_000, 2**31 - 1
"""Beyond these a configuration is damaged, and its names alone would fill the memory."""

_LINEARS = {  # ours -> (Hugging Face, GGUF), after the layer prefix
    "q_proj": ("self_attn.q_proj", "attn_q"),
    "k_proj": ("self_attn.k_proj", "attn_k"),
    "v_proj": ("self_attn.v_proj", "attn_v"),
    "o_proj": ("self_attn.o_proj", "attn_output"),
    "gate_proj": ("mlp.gate_proj", "ffn_gate"),
    "up_proj": ("mlp.up_proj", "ffn_up"),
    "down_proj": ("mlp.down_proj", "ffn_down"),
}

_NORMS = {
    "attn_norm": ("input_layernorm", "attn_norm"),
    "mlp_norm": ("post_attention_layernorm", "ffn_norm"),
    "q_norm": ("self_attn.q_norm", "attn_q_norm"),
    "k_norm": ("self_attn.k_norm", "attn_k_norm"),
}

_POST_NORM_FAMILY_NORMS = _NORMS | {  # gemma3: four norms a block, and another meaning of "post_attention"
    "attn_post_norm": ("post_attention_layernorm", "post_attention_norm"),
    "mlp_norm": ("pre_feedforward_layernorm", "ffn_norm"),
    "mlp_post_norm": ("post_feedforward_layernorm", "post_ffw_norm"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeafName:
    """One leaf of the parameter tree and where it lies in files.

    Attributes:
      path: keys from the root of ``params``, e.g. ``("blocks", "q_proj", "kernel")``.
      kind: ``"table"`` (embedding or head), ``"linear"``, ``"bias"`` or ``"norm"``.
      shape: of one layer, without the leading L.
      stacked: True for leaves of blocks: one file tensor a layer, ``[L, *shape]`` in memory.
      hf, gguf: tensor names; stacked ones hold ``{layer}``.
      gguf_interleaved_heads: 0, or the number of heads whose rows GGUF stores interleaved.
      hf_offset: what Hugging Face values lack: ours = theirs + hf_offset.
    """

    path: tuple[str, ...]
    kind: Literal["table", "linear", "bias", "norm"]
    shape: tuple[int, ...]
    stacked: bool
    hf: str
    gguf: str
    gguf_interleaved_heads: int = 0
    hf_offset: float = 0.0

    def hf_name(self, layer: int = 0) -> str:
        """Tensor name in a safetensors file, e.g. ``model.layers.3.self_attn.q_proj.weight``."""
        return self.hf.format(layer=layer)

    def gguf_name(self, layer: int = 0) -> str:
        """Tensor name in a GGUF file, e.g. ``blk.3.attn_q.weight``."""
        return self.gguf.format(layer=layer)


def leaf_names(config: ModelConfig) -> tuple[LeafName, ...]:
    """Every leaf of the parameters of ``config``, embedding first, head last.

    >>> from edgejax.models.config import ModelConfig
    >>> tiny = ModelConfig(family="llama", vocab_size=8, d_model=4, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2,
    ...                    d_ff=8, max_position=16, tie_embeddings=True)
    >>> [leaf.gguf_name(0) for leaf in leaf_names(tiny) if leaf.gguf_interleaved_heads]
    ['blk.0.attn_q.weight', 'blk.0.attn_k.weight']
    """
    offset = 1.0 if config.family == "gemma3" else 0.0
    table = (config.vocab_size, config.d_model)
    leaves = [_top(("embed", "table"), "table", table, "model.embed_tokens.weight", "token_embd.weight")]
    norms = _POST_NORM_FAMILY_NORMS if config.post_norms else _NORMS
    for name, width in config.norm_widths().items():
        leaves.append(_block((name, "scale"), "norm", (width,), norms[name], "weight", offset=offset))
    biases = config.linear_biases()
    for name, shape in config.linear_shapes().items():
        heads = _interleaved_heads(config, name)
        leaves.append(_block((name, "kernel"), "linear", shape, _LINEARS[name], "weight", heads=heads))
        if biases[name]:
            leaves.append(_block((name, "bias"), "bias", shape[:1], _LINEARS[name], "bias", heads=heads))
    final = _top(
        ("final_norm", "scale"), "norm", (config.d_model,), "model.norm.weight", "output_norm.weight"
    )
    leaves.append(dataclasses.replace(final, hf_offset=offset))
    if not config.tie_embeddings:
        leaves.append(_top(("head", "kernel"), "table", table, "lm_head.weight", "output.weight"))
    return tuple(leaves)


def interleave_rows(n_rows: int, n_heads: int) -> Int[np.ndarray, "O"]:
    """Row index so that ``gguf = ours[index]``: within a head, row ``c + C/2 * half`` goes to ``2 c + half``.

    >>> interleave_rows(8, 2).tolist()
    [0, 2, 1, 3, 4, 6, 5, 7]
    """
    return np.arange(n_rows).reshape(n_heads, 2, -1).swapaxes(1, 2).reshape(-1)


def deinterleave_rows(n_rows: int, n_heads: int) -> Int[np.ndarray, "O"]:
    """The inverse: ``ours = gguf[index]``.

    >>> order = deinterleave_rows(12, 2)
    >>> bool((interleave_rows(12, 2)[order] == np.arange(12)).all())
    True
    """
    return np.arange(n_rows).reshape(n_heads, -1, 2).swapaxes(1, 2).reshape(-1)


def _interleaved_heads(config: ModelConfig, name: str) -> int:
    if config.family != "llama":
        return 0
    return {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name, 0)


def _top(path, kind, shape, hf, gguf) -> LeafName:
    return LeafName(path=path, kind=kind, shape=shape, stacked=False, hf=hf, gguf=gguf)


def _block(path, kind, shape, names, suffix, *, heads=0, offset=0.0) -> LeafName:
    hf, gguf = names
    return LeafName(
        path=("blocks", *path),
        kind=kind,
        shape=shape,
        stacked=True,
        hf=f"model.layers.{{layer}}.{hf}.{suffix}",
        gguf=f"blk.{{layer}}.{gguf}.{suffix}",
        gguf_interleaved_heads=heads,
        hf_offset=offset,
    )
