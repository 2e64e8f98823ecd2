"""Hugging Face folders: values, both spellings of the configuration, and everything that must be refused."""

import contextlib
import json

import numpy as np
import pytest
from weight_files import BF16, hf_settings, hf_tensors, tiny, write_hf

from edgejax.core.errors import WeightsError
from edgejax.models.config import FAMILIES, RopeScaling
from edgejax.weights import load_model

pytestmark = pytest.mark.quick


def load(folder, **options):
    return load_model(folder, on_host=True, **options)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_comes_in_whole(family, shards, tmp_path):
    config = tiny(family)
    tensors = hf_tensors(config)
    model = load(write_hf(tmp_path / "m", hf_settings(config), tensors, shards=shards))
    assert model.config == config
    assert model.notes == ()
    blocks = model.params["blocks"]
    plus = 1.0 if family == "gemma3" else 0.0
    for i in range(config.n_layers):
        p = f"model.layers.{i}."
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            np.testing.assert_array_equal(blocks[name]["kernel"][i], tensors[p + f"self_attn.{name}.weight"])
        for name in ("gate_proj", "up_proj", "down_proj"):
            np.testing.assert_array_equal(blocks[name]["kernel"][i], tensors[p + f"mlp.{name}.weight"])
        norms = {"attn_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
        if family == "gemma3":
            norms |= {"attn_post_norm": "post_attention_layernorm", "mlp_norm": "pre_feedforward_layernorm"}
            norms["mlp_post_norm"] = "post_feedforward_layernorm"
        if config.qk_norm:
            norms |= {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
        for ours, theirs in norms.items():
            np.testing.assert_array_equal(
                blocks[ours]["scale"][i], tensors[p + theirs + ".weight"] + np.float32(plus)
            )
        if config.qkv_bias:
            np.testing.assert_array_equal(blocks["k_proj"]["bias"][i], tensors[p + "self_attn.k_proj.bias"])
    np.testing.assert_array_equal(
        model.params["final_norm"]["scale"], tensors["model.norm.weight"] + np.float32(plus)
    )
    if not config.tie_embeddings:
        np.testing.assert_array_equal(model.params["head"]["kernel"], tensors["lm_head.weight"])
    assert model.tokenizer.encode("hello you") == [1, 2]
    assert model.tokenizer.stop_ids == (0,)
    assert model.tokenizer.render_chat([{"role": "user", "content": "hi"}], False) == "hi"


@pytest.mark.parametrize(("base", "held"), [("f32", np.float32), ("bf16", BF16)])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_a_float_base_is_what_matrices_become(dtype, base, held, tmp_path):
    config = tiny("llama")
    tensors = hf_tensors(config)
    model = load(write_hf(tmp_path / "m", hf_settings(config), tensors, dtype=dtype), base=base)
    table = model.params["embed"]["table"]
    assert table.dtype == held
    np.testing.assert_array_equal(table, tensors["model.embed_tokens.weight"].astype(dtype).astype(held))
    assert all(leaf["kernel"].dtype == held for leaf in model.params["blocks"].values() if "kernel" in leaf)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, BF16])
def test_auto_keeps_the_type_of_matrices(dtype, tmp_path):
    config = tiny("llama")
    tensors = hf_tensors(config)
    model = load(write_hf(tmp_path / "m", hf_settings(config), tensors, dtype=dtype))
    leaf = model.params["blocks"]["up_proj"]["kernel"]
    assert leaf.dtype == dtype
    np.testing.assert_array_equal(leaf[1], tensors["model.layers.1.mlp.up_proj.weight"].astype(dtype))
    assert model.params["final_norm"]["scale"].dtype == np.float32


def test_shards_in_two_types_become_float32_with_a_note(tmp_path):
    config = tiny("llama")
    tensors = hf_tensors(config)
    folder = write_hf(tmp_path / "m", hf_settings(config), tensors, dtype=BF16)
    from safetensors.numpy import load_file, save_file

    mixed = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    mixed[name] = tensors[name]
    save_file(mixed, folder / "model.safetensors")
    model = load(folder)
    assert model.params["blocks"]["up_proj"]["kernel"].dtype == np.float32
    assert model.notes == ("blocks.up_proj.kernel: layers mix BF16, F32; held exactly, as float32",)


def test_gemma3_beside_a_vision_tower(tmp_path):
    config = tiny("gemma3")
    tensors = {f"language_model.{n}": x for n, x in hf_tensors(config).items()}
    tensors["vision_tower.patch.weight"] = np.zeros((2, 2), np.float32)
    settings = {"model_type": "gemma3", "text_config": hf_settings(config), "vision_config": {}}
    model = load(write_hf(tmp_path / "m", settings, tensors))
    assert model.config == config
    np.testing.assert_array_equal(
        model.params["embed"]["table"], tensors["language_model.model.embed_tokens.weight"]
    )


LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "type": "llama3"}},
        {"rope_theta": None, "rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    ],
)
def test_llama3_rope_in_old_and_new_spelling(spelling, tmp_path):
    config = tiny("llama")
    model = load(write_hf(tmp_path / "m", hf_settings(config) | spelling, hf_tensors(config)))
    assert model.config.rope_theta == 5e5
    assert model.config.rope_scaling == RopeScaling(
        kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )


def test_rope_parameters_by_kind_of_layer(tmp_path):
    config = tiny("gemma3")
    settings = hf_settings(config)
    settings["rope_parameters"] = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 2e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
    }
    model = load(write_hf(tmp_path / "m", settings, hf_tensors(config)))
    assert (model.config.rope_theta, model.config.rope_theta_sliding) == (2e6, 3e4)
    assert model.config.rope_scaling == RopeScaling(kind="linear", factor=8.0)


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("llama", {"model_type": "mixtral"}, "'mixtral' is not supported; supported: llama"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "LlamaForSequenceClassification"),
        ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn'.*llama3"),
        ("llama", {"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "'dynamic'"),
        ("llama", {"rope_scaling": {"rope_type": "linear"}}, "factor is None"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "'longrope'"),
        ("llama", {"hidden_act": "relu"}, "hidden_act 'relu'"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"hidden_size": None}, "hidden_size is missing"),
        ("llama", {"hidden_size": -1}, "hidden_size is -1"),
        ("llama", {"num_key_value_heads": 3}, "4 query heads do not divide among 3"),
        ("llama", {"rms_norm_eps": "small"}, "rms_norm_eps is 'small'"),
        ("qwen2", {"use_sliding_window": True}, "use_sliding_window = True"),
        ("qwen3", {"num_experts": 8}, "num_experts = 8"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding_attention.*qwen3"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3", {"layer_types": ["full_attention"]}, "1 layer kinds for 3 layers"),
    ],
)
def test_settings_that_change_the_maths(family, change, message, tmp_path):
    config = tiny(family)
    folder = write_hf(tmp_path / "m", hf_settings(config) | change, hf_tensors(config))
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_settings_nobody_knows_are_noted_and_harmless_ones_are_not(tmp_path):
    config = tiny("llama")
    settings = hf_settings(config) | {"use_cache": True, "pretraining_tp": 1, "hyperdrive": 9}
    model = load(write_hf(tmp_path / "m", settings, hf_tensors(config)))
    assert model.notes == ("config.json: unknown settings were passed over: hyperdrive",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.layers.1.mlp.up_proj.weight"), r"layers\.1\.mlp\.up_proj\.weight' is missing"),
        (lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": t["model.norm.weight"]}), "no place for.*bias"),
        (lambda t: t.update({"model.layers.2.input_layernorm.weight": t["model.norm.weight"]}), "of 2 layers"),
        (lambda t: t.update({"model.norm.weight": np.ones(7, np.float32)}), r"final_norm.*\(7,\).*\(64,\)"),
        (lambda t: t["model.layers.0.mlp.up_proj.weight"].__setitem__((0, 0), np.inf), "not finite"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_they_must_be(change, message, tmp_path):
    config = tiny("llama")
    tensors = hf_tensors(config)
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        load(write_hf(tmp_path / "m", hf_settings(config), tensors))


def test_an_integer_tensor(tmp_path):
    config = tiny("llama")
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config), dtype=np.int8)
    with pytest.raises(WeightsError, match="has type I8, which is not supported"):
        load(folder)


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_a_truncated_weight_file(kept, tmp_path):
    config = tiny("llama")
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(WeightsError, match=r"model\.safetensors.*download it again"):
        load(folder)


def test_a_damaged_weight_header(tmp_path):
    config = tiny("llama")
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xfe{["
    path.write_bytes(data)
    with pytest.raises(WeightsError, match="damaged header"):
        load(folder)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "not valid JSON"),
        ("config.json", "[]", "holds a list"),
        ("config.json", None, "no config.json"),
        ("model.safetensors", None, "no model.safetensors"),
        ("tokenizer.json", None, "no tokenizer.json"),
        ("tokenizer.json", "{}", "not a tokenizer"),
        ("model.safetensors.index.json", "{}", "no index"),
    ],
)
def test_files_that_are_missing_or_damaged(file, content, message, tmp_path):
    config = tiny("llama")
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    if content is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(content)
    with pytest.raises(WeightsError, match=message):
        load(folder)


def test_a_shard_that_is_missing(tmp_path):
    config = tiny("llama")
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config), shards=2)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"model-00002-of-00002.*cannot be opened"):
        load(folder)


def test_what_ends_a_text_is_collected_from_all_files(tmp_path):
    config = tiny("llama")
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 2]}))
    (folder / "chat_template.jinja").write_text("{{ eos_token }}")
    tokenizer = load(folder).tokenizer
    assert tokenizer.stop_ids == (0, 2)
    assert tokenizer.render_chat([], False) == "<eos>"


ODD = (
    "x", "", [1], [], {}, {"a": 1}, {"rope_type": "linear"}, {"content": [1]}, [{"name": "default", "template": 3}],
    -1, 0, 3, 10**30, 10**400, True, 1.5, float("nan"), None,
)  # fmt: skip
NAMES = {
    "config.json": (
        "architectures", "model_type", "rope_scaling", "rope_parameters", "layer_types", "eos_token_id",
        "bos_token_id", "hidden_act", "attention_bias", "text_config", "sliding_window_pattern", "rope_local_base_freq",
        "hidden_size", "num_hidden_layers", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_theta",
        "tie_word_embeddings", "max_position_embeddings", "query_pre_attn_scalar",
    ),
    "tokenizer_config.json": ("bos_token", "eos_token", "pad_token", "add_bos_token", "chat_template"),
    "generation_config.json": ("eos_token_id",),
}  # fmt: skip


@pytest.mark.parametrize("file", NAMES)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_values_of_any_type_are_read_or_refused(family, file, tmp_path):
    """A setting of a type nobody writes is no reason for another error than ``WeightsError``."""
    config = tiny(family)
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    settings = json.loads((folder / file).read_text()) if (folder / file).exists() else {}
    refused = 0
    for name in NAMES[file]:
        for value in ODD:
            (folder / file).write_text(json.dumps(settings | {name: value}))
            refused += 1
            with contextlib.suppress(WeightsError):
                load(folder)
                refused -= 1
    assert refused > len(NAMES[file])
