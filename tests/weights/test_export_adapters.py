"""Adapters written as PEFT folders and GGUF files, and read back."""

import json
import os

import gguf
import numpy as np
import pytest
import safetensors.numpy
from export_cases import CONFIGS, LORAS, random_adapters

from edgejax.core.errors import ConfigError, RunError, WeightsError
from edgejax.models.lora import LoraConfig
from edgejax.weights.export_lora_gguf import export_lora_gguf, load_lora_gguf
from edgejax.weights.export_peft import CONFIG_FILE, WEIGHTS_FILE, export_peft, load_peft

pytestmark = pytest.mark.quick


def _assert_same(got, wanted):
    assert set(got["blocks"]) == set(wanted["blocks"])
    for name, pair in wanted["blocks"].items():
        for side in ("lora_a", "lora_b"):
            np.testing.assert_array_equal(got["blocks"][name][side], pair[side])


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_round_trip(config, lora, tmp_path):
    adapters = random_adapters(config, lora)
    out = export_peft(adapters, lora, config, tmp_path / "adapter", base_name="org/base")
    got, got_lora = load_peft(out, config)
    assert got_lora == lora
    _assert_same(got, adapters)
    settings = json.loads((out / CONFIG_FILE).read_text())
    assert settings["base_model_name_or_path"] == "org/base"
    assert {p.name for p in tmp_path.iterdir()} == {"adapter"}


def test_peft_keys_are_those_of_peft(tmp_path):
    config, lora = CONFIGS["llama"], LoraConfig(rank=2, targets=("q_proj", "down_proj"))
    export_peft(random_adapters(config, lora), lora, config, tmp_path / "a", base_name="b")
    tensors = safetensors.numpy.load_file(tmp_path / "a" / WEIGHTS_FILE)
    assert tensors["base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"].shape == (2, 32)
    assert tensors["base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"].shape == (32, 2)
    assert len(tensors) == 2 * 2 * 2


def _write(folder, tensors=None, **changes):
    settings = json.loads((folder / CONFIG_FILE).read_text()) | changes
    (folder / CONFIG_FILE).write_text(json.dumps(settings))
    if tensors is not None:
        safetensors.numpy.save_file(tensors, folder / WEIGHTS_FILE)


@pytest.fixture
def adapter_folder(tmp_path):
    config, lora = CONFIGS["llama"], LoraConfig(rank=2, targets=("q_proj", "up_proj"))
    return export_peft(random_adapters(config, lora), lora, config, tmp_path / "a", base_name="org/base")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "lm_head"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"bias": "lora_only"}, "lora_only"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"r": 0}, "r = 0"),
        ({"r": 3}, "rank 3"),
        ({"r": True}, "r = True"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": 10**400}, "should be a positive integer and a finite number"),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(adapter_folder, changes, words):
    _write(adapter_folder, **changes)
    with pytest.raises(WeightsError, match=words):
        load_peft(adapter_folder, CONFIGS["llama"])


def test_unknown_layers_other_bases_and_damage_are_refused(adapter_folder):
    config = CONFIGS["llama"]
    with pytest.raises(WeightsError, match="org/base"):  # more layers
        load_peft(adapter_folder, CONFIGS["gemma3"])
    with pytest.raises(WeightsError, match=r"\(64, 2\).*org/base"):  # other widths
        load_peft(adapter_folder, CONFIGS["qwen3"])
    tensors = safetensors.numpy.load_file(adapter_folder / WEIGHTS_FILE)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    _write(adapter_folder, {k: v for k, v in tensors.items() if k != key})
    with pytest.raises(WeightsError, match=r"q_proj.lora_a misses layers \[0\]"):
        load_peft(adapter_folder, config)
    _write(adapter_folder, tensors | {"base_model.model.lm_head.lora_A.weight": tensors[key]})
    with pytest.raises(WeightsError, match="lm_head"):
        load_peft(adapter_folder, config)
    whole = (adapter_folder / WEIGHTS_FILE).read_bytes()
    (adapter_folder / WEIGHTS_FILE).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(WeightsError, match=WEIGHTS_FILE):
        load_peft(adapter_folder, config)
    (adapter_folder / WEIGHTS_FILE).unlink()
    with pytest.raises(WeightsError, match="missing"):
        load_peft(adapter_folder, config)
    (adapter_folder / CONFIG_FILE).write_text("{")
    with pytest.raises(WeightsError, match=CONFIG_FILE):
        load_peft(adapter_folder, config)


def test_nothing_is_overwritten_unasked(adapter_folder):
    config, lora = CONFIGS["llama"], LoraConfig(rank=3, targets=("o_proj",))
    adapters = random_adapters(config, lora)
    with pytest.raises(RunError, match="overwrite"):
        export_peft(adapters, lora, config, adapter_folder, base_name="b")
    assert load_peft(adapter_folder, config)[1].rank == 2
    export_peft(adapters, lora, config, adapter_folder, base_name="b", overwrite=True)
    assert load_peft(adapter_folder, config)[1] == lora
    assert [p.name for p in adapter_folder.parent.iterdir()] == ["a"]
    (adapter_folder / CONFIG_FILE).rename(adapter_folder / "thesis.tex")
    with pytest.raises(RunError, match="not a folder of this kind"):
        export_peft(adapters, lora, config, adapter_folder, base_name="b", overwrite=True)
    assert (adapter_folder / "thesis.tex").exists()


def test_no_space_left_leaves_nothing(tmp_path, monkeypatch):
    config, lora = CONFIGS["llama"], LORAS["all"]
    adapters = random_adapters(config, lora)

    def full(_):
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="no space left"):
        export_peft(adapters, lora, config, tmp_path / "a", base_name="b")
    with pytest.raises(RunError, match="no space left"):
        export_lora_gguf(adapters, lora, config, tmp_path / "a.gguf", base_name="b")
    assert list(tmp_path.iterdir()) == []


def test_adapters_that_do_not_fit_or_are_not_finite_are_refused(tmp_path):
    config, lora = CONFIGS["llama"], LORAS["all"]
    adapters = random_adapters(config, lora)
    for export, name in ((export_peft, "a"), (export_lora_gguf, "a.gguf")):
        with pytest.raises(WeightsError, match="LoRA configuration says"):
            export(adapters, LORAS["attention-rslora"], config, tmp_path / name, base_name="b")
        with pytest.raises(WeightsError, match="shape"):
            export(adapters, LoraConfig(rank=5), config, tmp_path / name, base_name="b")
    adapters["blocks"]["v_proj"]["lora_b"][1, 0, 0] = np.nan
    for export, name in ((export_peft, "a"), (export_lora_gguf, "a.gguf")):
        with pytest.raises(WeightsError, match=r"(v_proj|attn_v).*NaN"):
            export(adapters, lora, config, tmp_path / name, base_name="b")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lora", LORAS.values(), ids=LORAS)
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_lora_gguf_round_trip(config, lora, tmp_path):
    adapters = random_adapters(config, lora)
    out = export_lora_gguf(adapters, lora, config, tmp_path / "a.gguf", base_name="base")
    got, got_lora = load_lora_gguf(out, config)
    assert (got_lora.rank, set(got_lora.targets)) == (lora.rank, set(lora.targets))
    assert got_lora.scaling == pytest.approx(lora.scaling, rel=1e-7)
    _assert_same(got, adapters)


def test_lora_gguf_is_what_llama_cpp_reads(tmp_path):
    """Names, shapes, metadata and scale against an independent reader and the loader's own arithmetic."""
    config, lora = CONFIGS["llama"], LORAS["attention-rslora"]
    adapters = random_adapters(config, lora)
    reader = gguf.GGUFReader(export_lora_gguf(adapters, lora, config, tmp_path / "a.gguf", base_name="base"))
    wanted = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    assert {key: reader.get_field(key).contents() for key in wanted} == wanted
    tensors = {t.name: t for t in reader.tensors}
    assert len(tensors) == 2 * 2 * 3
    a, b = tensors["blk.1.attn_q.weight.lora_a"], tensors["blk.1.attn_q.weight.lora_b"]
    # ne[] there is reversed: a is [I, R], b is [R, O]; the base's is [I, O].
    assert (a.shape.tolist(), b.shape.tolist()) == ([32, 4], [4, 32])
    scale = reader.get_field("adapter.lora.alpha").contents() / b.shape[0]
    delta = scale * (b.data @ a.data)
    pair = adapters["blocks"]["q_proj"]
    ours = lora.scaling * (pair["lora_b"][1] @ pair["lora_a"][1])
    # Row 2c + half of a head there is row c + C/2 * half here.
    heads = ours.reshape(4, 2, 4, 32).transpose(0, 2, 1, 3).reshape(32, 32)
    np.testing.assert_allclose(delta, heads, rtol=1e-5, atol=1e-6)


def test_lora_gguf_refusals(tmp_path):
    config, lora = CONFIGS["llama"], LORAS["all"]
    zero = LoraConfig(alpha=0.0)
    with pytest.raises(ConfigError, match="alpha"):
        export_lora_gguf(random_adapters(config, zero), zero, config, tmp_path / "z.gguf", base_name="b")
    out = export_lora_gguf(random_adapters(config, lora), lora, config, tmp_path / "a.gguf", base_name="b")
    with pytest.raises(RunError, match="overwrite"):
        export_lora_gguf(random_adapters(config, lora), lora, config, out, base_name="b")
    with pytest.raises(WeightsError, match="qwen2"):
        load_lora_gguf(out, CONFIGS["qwen2"])
    out.write_bytes(b"GGUX" + out.read_bytes()[4:])
    with pytest.raises(WeightsError):
        load_lora_gguf(out, config)
