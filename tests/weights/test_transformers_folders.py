"""Folders that ``transformers`` itself saved: our reader and decoder give its logits, for every family."""

import numpy as np
import pytest

from edgejax.models import Decoder, logits
from edgejax.weights import load_model

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SMALL = dict(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=256,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64, "rope_theta": 500_000.0,
}  # fmt: skip
CASES = {
    "llama": ("Llama", dict(tie_word_embeddings=False)),
    "llama-biases": ("Llama", dict(tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama3-rope": ("Llama", dict(rope_parameters=LLAMA3)),
    "qwen2": ("Qwen2", dict(tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(tie_word_embeddings=False)),
    "gemma3": (
        "Gemma3",
        dict(
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            query_pre_attn_scalar=24,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_logits_of_transformers(case, tmp_path):
    kind, changes = CASES[case]
    config_class = (
        transformers.Gemma3TextConfig if kind == "Gemma3" else getattr(transformers, f"{kind}Config")
    )
    torch.manual_seed(0)
    theirs = getattr(transformers, f"{kind}ForCausalLM")(config_class(**SMALL | changes)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():  # biases and norms away from 0 and 1, where mistakes hide
            parameter += 0.05 * torch.randn(parameter.shape)
    theirs.save_pretrained(tmp_path, max_shard_size="60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1

    model = load_model(tmp_path, need_tokenizer=False)
    assert model.notes == ()
    tokens = np.random.default_rng(0).integers(0, 64, (2, 40))
    ours = np.asarray(logits(Decoder(model.config, None), model.params, None, tokens))
    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens)).logits.numpy()
    assert np.abs(ours - expected).max() < 2e-4 * np.abs(expected).max()
