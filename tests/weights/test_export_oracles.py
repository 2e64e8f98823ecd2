"""What edgejax exports, run by transformers and peft: their logits are ours."""

import dataclasses

import numpy as np
import pytest
from export_cases import CONFIGS, LORAS, byte_level_tokenizer, merged_params, random_adapters, random_params

from edgejax.models import Decoder, logits
from edgejax.weights.export import export
from edgejax.weights.export_merged import export_merged
from edgejax.weights.export_peft import export_peft, load_peft
from edgejax.weights.load import load_model

COMMON = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,  # short, so that few tokens show it
}
FAMILIES = {
    "llama": ("llama", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    "llama3-biases": (
        "llama",
        {
            "num_hidden_layers": 2,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "rope_scaling": LLAMA3_ROPE,
        },
    ),
    "qwen2": ("qwen2", {"num_hidden_layers": 2, "tie_word_embeddings": True}),
    # 128 and 256 are the head sizes that transformers assumes when it reads GGUF.
    "qwen3": ("qwen3", {"num_hidden_layers": 2, "tie_word_embeddings": False, "head_dim": 128}),
    "gemma3": (
        "gemma3_text",
        {"num_hidden_layers": 7, "head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 4},
    ),
}
TOKENS = np.random.default_rng(3).integers(3, 384, (2, 24))


@pytest.fixture(scope="module", params=FAMILIES)
def case(request, tmp_path_factory):
    """(name, a seeded transformers model's folder, the same model loaded by edgejax)."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    model_type, fields = FAMILIES[request.param]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(model_type, **COMMON, **fields)
    theirs = transformers.AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, values in theirs.named_parameters():
            if "norm" in name or name.endswith("bias"):  # initialisers leave these at one and zero
                values.add_(0.1 * torch.randn_like(values))
    folder = tmp_path_factory.mktemp(request.param) / "base"
    theirs.save_pretrained(folder)
    byte_level_tokenizer().backend.save(str(folder / "tokenizer.json"))
    return request.param, folder, load_model(folder, base="f32")


def _theirs(model) -> np.ndarray:
    import torch

    with torch.no_grad():
        return model.eval()(torch.as_tensor(TOKENS)).logits.float().numpy()


def _transformers(folder, **options):
    import torch
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)


def _ours(model, adapters=None, lora=None) -> np.ndarray:
    decoder = Decoder(model.config, lora)
    return np.asarray(logits(decoder, model.params, adapters or {}, TOKENS.astype(np.int32)))


def _close(got, wanted, tolerance=2e-4):
    assert np.abs(got - wanted).max() <= tolerance * np.abs(wanted).max()


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
def test_exported_adapters_in_peft_and_merged_in_transformers(case, lora, tmp_path):
    peft = pytest.importorskip("peft")
    _, folder, model = case
    adapters = random_adapters(model.config, lora)
    ours, base = _ours(model, adapters, lora), _ours(model)
    assert np.abs(ours - base).max() > 0.05 * np.abs(base).max()  # the adapters matter
    out = export(model, tmp_path / "adapter", format="peft", adapters=adapters, lora=lora)
    with_adapter = peft.PeftModel.from_pretrained(_transformers(folder), out)
    theirs = _theirs(with_adapter)
    _close(ours, theirs)
    merged = export(
        model, tmp_path / "m", format="merged-safetensors", adapters=adapters, lora=lora, dtype="f32"
    )
    _close(_theirs(_transformers(merged)), _theirs(with_adapter.merge_and_unload()), 1e-5)


def test_an_adapter_that_peft_saved_is_read(case, tmp_path):
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    _, folder, model = case
    settings = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, target_modules=["v_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    torch.manual_seed(1)
    theirs = peft.get_peft_model(_transformers(folder), settings)
    for name, values in theirs.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(values, std=0.3)
    theirs.save_pretrained(tmp_path / "a")
    adapters, lora = load_peft(tmp_path / "a", model.config)
    assert (lora.rank, lora.alpha, lora.rslora, lora.targets) == (3, 5.0, True, ("v_proj", "down_proj"))
    _close(_ours(model, adapters, lora), _theirs(theirs))
    # And out again: the same tensors.
    again = load_peft(export_peft(adapters, lora, model.config, tmp_path / "b", base_name="x"), model.config)
    np.testing.assert_array_equal(
        again[0]["blocks"]["v_proj"]["lora_b"], adapters["blocks"]["v_proj"]["lora_b"]
    )


@pytest.mark.parametrize("weight_type", ["f16", "q8_0"])
def test_merged_gguf_in_transformers(case, weight_type, tmp_path):
    name, _, model = case
    if name == "llama3-biases":
        pytest.skip("transformers reads neither biases nor rope_freqs of llama GGUF files")
    lora = LORAS["all"]
    adapters = random_adapters(model.config, lora)
    out = export(
        model, tmp_path / "m.gguf", format=f"merged-gguf-{weight_type}", adapters=adapters, lora=lora
    )
    theirs = _theirs(_transformers(tmp_path, gguf_file="m.gguf"))
    _close(_ours(load_model(out)), theirs)
    if weight_type == "f16":  # and the model that was meant, its matrices rounded by numpy
        meant: dict = {}
        for path, values in merged_params(model.config, model.params, adapters, lora).items():
            node = meant
            for key in path[:-1]:
                node = node.setdefault(key, {})
            rounded = values.astype(np.float16) if path[-1] in ("kernel", "table") else values
            node[path[-1]] = rounded.astype(np.float32)
        # A last bit of float16 may fall the other way for a sum that lies between two.
        _close(theirs, _ours(dataclasses.replace(model, params=meant)), 2e-3)


def test_the_exported_tokenizer_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    config, tokenizer = CONFIGS["llama"], byte_level_tokenizer(add_bos=True)
    out = export_merged(random_params(config), config, tmp_path / "m", tokenizer=tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(out)
    text = "It's 12 things\n\n<|im_end|><think>"
    assert theirs(text).input_ids == tokenizer.encode(text)
    messages = [{"role": "user", "content": "hello"}]
    assert theirs.apply_chat_template(messages, tokenize=False) == tokenizer.render_chat(messages, False)
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    generation = transformers.GenerationConfig.from_pretrained(out)
    assert generation.eos_token_id == [2, 0]
