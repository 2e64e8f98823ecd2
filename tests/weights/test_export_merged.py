"""Merged models written as Hugging Face folders and GGUF files, and read back value by value."""

import dataclasses
import json
import os

import gguf
import ml_dtypes
import numpy as np
import pytest
import safetensors
from export_cases import (
    CHAT_TEMPLATE,
    CONFIGS,
    LORAS,
    byte_level_tokenizer,
    merged_params,
    random_adapters,
    random_params,
    sentencepiece_tokenizer,
)

from edgejax.core.errors import ConfigError, RunError, WeightsError
from edgejax.quant import quantize_int4, quantize_int8
from edgejax.weights import merge
from edgejax.weights.export import EXPORT_FORMATS, export
from edgejax.weights.export_gguf import export_gguf, q8_0_blocks
from edgejax.weights.export_merged import export_merged
from edgejax.weights.form import wide
from edgejax.weights.load import load_model
from edgejax.weights.names import interleave_rows, leaf_names

pytestmark = pytest.mark.quick
NUMPY = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


def _leaf(tree, path):
    for key in path:
        tree = tree[key]
    return wide(tree) if hasattr(tree, "codes") else np.asarray(tree, np.float32)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_hugging_face_folder_round_trip(config, dtype, tmp_path):
    lora = LORAS["all"]
    params, adapters = random_params(config), random_adapters(config, lora)
    tokenizer = byte_level_tokenizer()
    out = export_merged(
        params, config, tmp_path / "m", adapters=adapters, lora=lora, tokenizer=tokenizer, dtype=dtype
    )
    model = load_model(out, base="f32", on_host=True)
    assert model.config == config
    assert model.notes == ()
    resolution = float(ml_dtypes.finfo(NUMPY[dtype]).eps)
    for path, wanted in merged_params(config, params, adapters, lora).items():
        got = _leaf(model.params, path)
        offset = 1.0 if config.family == "gemma3" and path[-1] == "scale" else 0.0
        # Half a unit of the stored value (w - 1 for gemma's norms), plus the float32 sum's own error.
        bound = 0.5 * resolution * np.abs(wanted - offset) + 3e-6
        assert (np.abs(got - wanted) <= bound).all(), path
    assert model.tokenizer.encode("it's 12 <|im_end|>") == tokenizer.encode("it's 12 <|im_end|>")
    assert (model.tokenizer.chat_template, model.tokenizer.eos_id) == (CHAT_TEMPLATE, 2)
    assert set(model.tokenizer.stop_ids) == {2, 0}


def test_without_adapters_the_values_are_kept_to_the_bit(tmp_path):
    config = CONFIGS["llama3-biases"]
    params = random_params(config)
    out = export_merged(params, config, tmp_path / "m", dtype="f32")
    model = load_model(out, base="f32", on_host=True, need_tokenizer=False)
    for leaf in leaf_names(config):
        np.testing.assert_array_equal(_leaf(model.params, leaf.path), _leaf(params, leaf.path))


def test_shards_and_chunks_change_nothing(tmp_path, monkeypatch):
    config, lora = CONFIGS["qwen3"], LORAS["all"]
    params, adapters = random_params(config), random_adapters(config, lora)
    whole = export_merged(params, config, tmp_path / "a", adapters=adapters, lora=lora, dtype="f32")
    monkeypatch.setattr(merge, "CHUNK_BYTES", 1000)  # a few rows at a time
    parts = export_merged(
        params, config, tmp_path / "b", adapters=adapters, lora=lora, dtype="f32", max_shard_bytes=60_000
    )
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    shards = sorted(p.name for p in parts.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    with safetensors.safe_open(whole / "model.safetensors", framework="np") as one:
        assert set(one.keys()) == set(index["weight_map"])
        for name, shard in index["weight_map"].items():
            with safetensors.safe_open(parts / shard, framework="np") as part:
                np.testing.assert_allclose(part.get_tensor(name), one.get_tensor(name), rtol=0, atol=2e-6)


def test_quantised_bases_are_merged_from_their_own_values(tmp_path):
    config, lora = CONFIGS["llama"], LORAS["attention-rslora"]
    params, adapters = random_params(config), random_adapters(config, lora)
    for name, quantize in (("q_proj", quantize_int4), ("up_proj", quantize_int8)):
        params["blocks"][name]["kernel"] = quantize(params["blocks"][name]["kernel"])
    out = export_merged(params, config, tmp_path / "m", adapters=adapters, lora=lora, dtype="f32")
    model = load_model(out, base="f32", on_host=True, need_tokenizer=False)
    up = wide(params["blocks"]["up_proj"]["kernel"])
    np.testing.assert_array_equal(model.params["blocks"]["up_proj"]["kernel"], up)
    pair = adapters["blocks"]["q_proj"]
    q = wide(params["blocks"]["q_proj"]["kernel"]) + lora.scaling * (pair["lora_b"] @ pair["lora_a"])
    np.testing.assert_allclose(model.params["blocks"]["q_proj"]["kernel"], q, rtol=0, atol=1e-6)


@pytest.mark.parametrize("weight_type", ["f16", "q8_0"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_gguf_round_trip(config, weight_type, tmp_path):
    lora = LORAS["all"]
    params, adapters = random_params(config), random_adapters(config, lora)
    tokenizer = byte_level_tokenizer()
    out = export_gguf(
        params,
        config,
        tmp_path / "m.gguf",
        name="m",
        adapters=adapters,
        lora=lora,
        tokenizer=tokenizer,
        weight_type=weight_type,
    )
    model = load_model(out, on_host=True)
    assert model.config == dataclasses.replace(config, attention_scale=model.config.attention_scale)
    assert model.config.query_scale == pytest.approx(config.query_scale)
    for path, wanted in merged_params(config, params, adapters, lora).items():
        got = _leaf(model.params, path)
        if path[-1] in ("scale", "bias"):
            np.testing.assert_array_equal(got, wanted.astype(np.float32))
            continue
        if weight_type == "f16":
            bound = 2.0**-11 * np.abs(wanted) + 3e-6
        else:
            blocks = np.abs(wanted.reshape(*wanted.shape[:-1], -1, 32)).max(-1, keepdims=True)
            # Half a code; a code is max / 127, rounded up to the next float16.
            bound = np.broadcast_to(blocks / 127 * (0.5 + 2.0**-10) + 3e-6, (*blocks.shape[:-1], 32))
            bound = bound.reshape(wanted.shape)
        assert (np.abs(got - wanted) <= bound).all(), path
    text = "It's 12 things, THEY'LL do\n\n <|im_start|><think>x é"
    assert model.tokenizer.encode(text) == tokenizer.encode(text)
    assert (model.tokenizer.chat_template, model.tokenizer.bos_id, model.tokenizer.add_bos) == (
        CHAT_TEMPLATE,
        1,
        False,
    )


def test_gguf_as_an_independent_reader_sees_it(tmp_path):
    config = CONFIGS["llama3-biases"]
    params = random_params(config)
    tokenizer = byte_level_tokenizer()
    out = export_gguf(
        params, config, tmp_path / "m.gguf", name="mine", tokenizer=tokenizer, weight_type="f16"
    )
    reader = gguf.GGUFReader(out)
    tensors = {t.name: t for t in reader.tensors}
    order = interleave_rows(32, 4)
    for name, leaf in {"weight": "kernel", "bias": "bias"}.items():
        got = gguf.dequantize(
            tensors[f"blk.1.attn_q.{name}"].data, tensors[f"blk.1.attn_q.{name}"].tensor_type
        )
        wanted = params["blocks"]["q_proj"][leaf][1][order]
        np.testing.assert_array_equal(got, wanted.astype(np.float16 if name == "weight" else np.float32))
    assert tensors["blk.0.attn_norm.weight"].tensor_type == gguf.GGMLQuantizationType.F32
    # Llama 3's scaling: high frequencies as they are, low ones slower by the factor.
    np.testing.assert_allclose(tensors["rope_freqs.weight"].data[[0, -1]], [1.0, 8.0])
    wanted = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "mine",
        "general.file_type": 1,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 8,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.ggml.eos_token_id": 2,
    }
    assert {key: reader.get_field(key).contents() for key in wanted} == wanted
    tokens = reader.get_field("tokenizer.ggml.tokens").contents()
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert len(tokens) == len(types) == config.vocab_size
    assert (tokens[2], types[2]) == ("<|im_end|>", 3)
    assert types[tokens.index("<think>")] == 4
    assert (tokens[-1], types[-1]) == ("[PAD383]", 5)


def test_q8_0_without_adapter_is_written_as_held(tmp_path):
    config = CONFIGS["llama"]
    params = random_params(config)
    held = {name: quantize_int8(params["blocks"][name]["kernel"]) for name in ("q_proj", "down_proj")}
    for name, weight in held.items():
        params["blocks"][name]["kernel"] = weight
    out = export_gguf(params, config, tmp_path / "m.gguf", name="m", tokenizer=byte_level_tokenizer())
    model = load_model(out, on_host=True)
    for name, weight in held.items():
        got = model.params["blocks"][name]["kernel"]
        np.testing.assert_array_equal(got.codes, weight.codes)
        np.testing.assert_array_equal(got.scale, weight.scale)


def test_q8_0_rounds_to_the_nearest_code_at_every_size():
    rng = np.random.default_rng(0)
    sizes = 10.0 ** np.arange(-9, 6)[:, None, None]
    weights = (sizes * rng.standard_normal((15, 4, 64))).astype(np.float32)
    weights[0, 0, :32] = 0
    raw = q8_0_blocks(weights.reshape(60, 64))
    got = gguf.dequantize(raw, gguf.GGMLQuantizationType.Q8_0).reshape(-1, 32)
    scale = raw.reshape(-1, 34)[:, :2].copy().view(np.float16).astype(np.float32)
    wanted = weights.reshape(-1, 32)
    assert (np.abs(got - wanted) <= 0.5000001 * scale).all()
    assert (got[0] == 0).all()
    # The scale is no coarser than float16 forces: one step above max / 127.
    step = np.maximum(2.0**-10 * scale[:, 0], 2.0**-24)
    assert (scale[:, 0] <= np.abs(wanted).max(-1) / 127 + 1.01 * step).all()


@pytest.mark.parametrize("kind", ["smollm", "gpt-2", "qwen2", "llama-bpe"])
def test_byte_level_tokenizers_keep_their_name(kind, tmp_path):
    config, tokenizer = CONFIGS["llama"], byte_level_tokenizer(kind, add_bos=True)
    out = export_gguf(random_params(config), config, tmp_path / "m.gguf", name="m", tokenizer=tokenizer)
    assert gguf.GGUFReader(out).get_field("tokenizer.ggml.pre").contents() == kind
    again = load_model(out, on_host=True).tokenizer
    assert again.add_bos
    assert again.encode("there are 1234 of them") == tokenizer.encode("there are 1234 of them")


@pytest.mark.parametrize("prefix", [False, True])
def test_sentencepiece_tokenizers_become_scores(prefix, tmp_path):
    config, tokenizer = CONFIGS["llama"], sentencepiece_tokenizer(prefix=prefix)
    out = export_gguf(random_params(config), config, tmp_path / "m.gguf", name="m", tokenizer=tokenizer)
    assert gguf.GGUFReader(out).get_field("tokenizer.ggml.model").contents() == "llama"
    again = load_model(out, on_host=True).tokenizer
    for text in ("the function returns another thing", "é  </s> x"):
        assert again.encode(text) == tokenizer.encode(text)
        assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_tokenizers_that_gguf_has_no_name_for_are_refused(tmp_path):
    config = CONFIGS["llama"]
    tokenizer = byte_level_tokenizer("whitespace")
    with pytest.raises(ConfigError, match="merged-safetensors"):
        export_gguf(random_params(config), config, tmp_path / "m.gguf", name="m", tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        export_gguf(random_params(config), config, tmp_path / "m.gguf", name="m")
    assert list(tmp_path.iterdir()) == []


def test_gguf_to_gguf_copies_the_tokenizer_and_the_licence(tmp_path):
    config = CONFIGS["llama"]
    first = export_gguf(
        random_params(config), config, tmp_path / "a.gguf", name="a", tokenizer=byte_level_tokenizer()
    )
    model = load_model(first, on_host=True)
    second = export(model, tmp_path / "b.gguf", format="merged-gguf-q8_0")
    kept = [f for key, f in gguf.GGUFReader(first).fields.items() if key.startswith("tokenizer.")]
    again = gguf.GGUFReader(second)
    assert len(kept) >= 9
    for field in kept:
        copy = again.get_field(field.name)
        assert (copy.types, copy.contents()) == (field.types, field.contents())
    # And the weights did not change: Q8_0 in, Q8_0 out.
    one, two = ({t.name: t.data for t in gguf.GGUFReader(p).tensors} for p in (first, second))
    for name, data in one.items():
        np.testing.assert_array_equal(two[name], data)


def test_a_folder_and_a_file_are_never_overwritten_unasked_nor_left_half(tmp_path, monkeypatch):
    config = CONFIGS["llama"]
    params, tokenizer = random_params(config), byte_level_tokenizer()
    folder, file = tmp_path / "m", tmp_path / "m.gguf"
    export_merged(params, config, folder, tokenizer=tokenizer)
    export_gguf(params, config, file, name="m", tokenizer=tokenizer)
    before = {p: p.read_bytes() for p in [file, *folder.iterdir()]}
    with pytest.raises(RunError, match="overwrite"):
        export_merged(params, config, folder, tokenizer=tokenizer)
    with pytest.raises(RunError, match="overwrite"):
        export_gguf(params, config, file, name="m", tokenizer=tokenizer)
    params["blocks"]["down_proj"]["kernel"][-1, 0, 0] = np.inf  # noticed when most has been written
    with pytest.raises(WeightsError, match=r"layers.1.mlp.down_proj.weight holds NaN or infinity"):
        export_merged(params, config, folder, overwrite=True)
    with pytest.raises(WeightsError, match="NaN or infinity"):
        export_gguf(params, config, file, name="m", tokenizer=tokenizer, overwrite=True)

    def full(_):
        raise OSError(28, os.strerror(28))

    params = random_params(config, seed=5)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(RunError, match="no space left"):
            export_merged(params, config, folder, overwrite=True)
        with pytest.raises(RunError, match="no space left"):
            export_gguf(params, config, file, name="m", tokenizer=tokenizer, overwrite=True)
    assert {p: p.read_bytes() for p in [file, *folder.iterdir()]} == before
    assert {p.name for p in tmp_path.iterdir()} == {"m", "m.gguf"}
    export_gguf(params, config, file, name="m", tokenizer=tokenizer, overwrite=True)
    assert file.read_bytes() != before[file]


def test_values_beyond_float16_are_refused_and_fit_elsewhere(tmp_path):
    config = CONFIGS["llama"]
    params = random_params(config)
    params["embed"]["table"][3, 3] = 1e6
    with pytest.raises(WeightsError, match=r"1e\+06.*float16"):
        export_merged(params, config, tmp_path / "m", dtype="f16")
    with pytest.raises(WeightsError, match="float16"):
        export_gguf(
            params, config, tmp_path / "m.gguf", name="m", tokenizer=byte_level_tokenizer(), weight_type="f16"
        )
    export_merged(params, config, tmp_path / "m", dtype="bf16")
    export_gguf(params, config, tmp_path / "m.gguf", name="m", tokenizer=byte_level_tokenizer())


def test_what_a_format_cannot_say_is_refused(tmp_path):
    gemma = dataclasses.replace(CONFIGS["gemma3"], sliding_layers=(True, False, True, True, True, True, True))
    odd = {
        "period": (gemma, "period"),
        "scale": (dataclasses.replace(CONFIGS["llama"], attention_scale=0.1), "attention"),
        "bias": (dataclasses.replace(CONFIGS["llama"], qkv_bias=True), "qkv_bias"),
        "rows": (dataclasses.replace(CONFIGS["llama"], d_ff=48), "multiples of 32"),
    }
    for config, words in odd.values():
        with pytest.raises(ConfigError, match=words):
            export_gguf(
                random_params(config), config, tmp_path / "x.gguf", name="m", tokenizer=byte_level_tokenizer()
            )
    with pytest.raises(ConfigError, match="qkv_bias"):
        export_merged(random_params(odd["bias"][0]), odd["bias"][0], tmp_path / "x")
    export_merged(random_params(gemma), gemma, tmp_path / "gemma")  # its layer kinds are a list there
    assert load_model(tmp_path / "gemma", need_tokenizer=False, on_host=True).config == gemma


def test_the_dispatcher_writes_every_format_and_checks_its_arguments(tmp_path):
    config, lora = CONFIGS["qwen2"], LORAS["all"]
    base = export_merged(
        random_params(config), config, tmp_path / "base", tokenizer=byte_level_tokenizer(), dtype="f32"
    )
    model = load_model(base, on_host=True)
    adapters = random_adapters(config, lora)
    for format in EXPORT_FORMATS:
        out = export(model, tmp_path / format, format=format, adapters=adapters, lora=lora)
        assert out.exists()
        if format.startswith("merged"):
            path = out if out.is_dir() else out.rename(out.with_suffix(".gguf"))
            again = load_model(path, base="f32", on_host=True)
            trained = merged_params(config, model.params, adapters, lora)[("blocks", "up_proj", "kernel")]
            np.testing.assert_allclose(again.params["blocks"]["up_proj"]["kernel"], trained, atol=0.02)
    full = random_params(config, seed=9)
    out = export(model, tmp_path / "full", format="merged-safetensors", params=full, dtype="f32")
    got = load_model(out, base="f32", on_host=True).params["embed"]["table"]
    np.testing.assert_array_equal(got, full["embed"]["table"])
    with pytest.raises(ConfigError, match="merged format"):
        export(model, tmp_path / "x", format="peft", params=full)
    with pytest.raises(ConfigError, match="together"):
        export(model, tmp_path / "x", format="peft", adapters=adapters)
    with pytest.raises(ConfigError, match="one or the other"):
        export(model, tmp_path / "x", format="merged-gguf-f16", adapters=adapters, lora=lora, params=full)
    with pytest.raises(ConfigError, match="lora-gguf"):
        export(model, tmp_path / "x", format="onnx", adapters=adapters, lora=lora)
    assert not (tmp_path / "x").exists()
