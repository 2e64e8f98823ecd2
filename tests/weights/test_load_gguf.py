"""GGUF files of every family and type, written by ``gguf``, read by us."""

import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from weight_files import TYPES, gguf_tensors, tiny, wide_tensor, write_gguf

from edgejax.core.trees import tree_bytes
from edgejax.models.config import FAMILIES, RopeScaling
from edgejax.models.rope import frequencies
from edgejax.quant import QuantizedArray
from edgejax.weights import leaves, load_model
from edgejax.weights.form import form_of, wide
from edgejax.weights.gguf_blocks import block_form

pytestmark = pytest.mark.quick

GGUF_NAMES = {
    "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v", "o_proj": "attn_output",
    "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down",
}  # fmt: skip


def as_stored_by_hugging_face(x: np.ndarray, n_heads: int) -> np.ndarray:
    """llama.cpp's permutation undone, from its definition: within a head, rows (C/2, 2) <- (2, C/2)."""
    return x.reshape(n_heads, -1, 2, *x.shape[1:]).swapaxes(1, 2).reshape(x.shape)


def expected_leaf(config, tensors, name: str, part: str = "weight") -> np.ndarray:
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads}.get(name, 0)
    layers = []
    for i in range(config.n_layers):
        x = wide_tensor(tensors, f"blk.{i}.{GGUF_NAMES[name]}.{part}")
        layers.append(as_stored_by_hugging_face(x, heads) if heads and config.family == "llama" else x)
    return np.stack(layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_comes_in_whole(family, tmp_path):
    config = tiny(family)
    tensors = gguf_tensors(config)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), on_host=True)
    assert model.config == config
    assert model.source.format == "gguf"
    assert len(model.source.sha256) == 64
    blocks = model.params["blocks"]
    for name in GGUF_NAMES:
        np.testing.assert_array_equal(blocks[name]["kernel"], expected_leaf(config, tensors, name))
        has_bias = config.qkv_bias and name[0] in "qkv"
        assert ("bias" in blocks[name]) == has_bias
        if has_bias:
            np.testing.assert_array_equal(blocks[name]["bias"], expected_leaf(config, tensors, name, "bias"))
    norms = {"attn_norm": "attn_norm", "mlp_norm": "ffn_norm"}
    if config.qk_norm:
        norms |= {"q_norm": "attn_q_norm", "k_norm": "attn_k_norm"}
    if config.post_norms:
        norms |= {"attn_post_norm": "post_attention_norm", "mlp_post_norm": "post_ffw_norm"}
    for ours, theirs in norms.items():
        stack = np.stack([tensors[f"blk.{i}.{theirs}.weight"][0] for i in range(config.n_layers)])
        np.testing.assert_array_equal(blocks[ours]["scale"], stack)
    np.testing.assert_array_equal(model.params["embed"]["table"], tensors["token_embd.weight"][0])
    assert ("head" in model.params) != config.tie_embeddings
    assert set(blocks) == set(norms) | set(GGUF_NAMES)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_auto_holds_every_type_as_it_came(kind, tmp_path):
    config = tiny("llama", width=256)
    tensors = gguf_tensors(config, kind)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), on_host=True)
    assert model.notes == ()
    for name in GGUF_NAMES:
        leaf = model.params["blocks"][name]["kernel"]
        assert form_of(leaf) == block_form(kind, "")
        np.testing.assert_array_equal(wide(leaf[0]), expected_leaf(config, tensors, name)[0])
        np.testing.assert_array_equal(wide(leaf[1]), expected_leaf(config, tensors, name)[1])
    np.testing.assert_array_equal(
        wide(model.params["embed"]["table"]), wide_tensor(tensors, "token_embd.weight")
    )


def test_layers_of_mixed_types_stay_exact_and_are_noted(tmp_path):
    """Q4_K_M files have Q6_K in some layers of v and down."""
    config = tiny("llama", width=256)
    tensors = gguf_tensors(config, lambda n: Type.Q6_K if n in ("blk.1.attn_v.weight",) else Type.Q4_K)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), on_host=True)
    leaf = model.params["blocks"]["v_proj"]["kernel"]
    assert (leaf.bits, leaf.block) == (8, 16)
    expected = expected_leaf(config, tensors, "v_proj")
    np.testing.assert_array_equal(np.stack([wide(leaf[i]) for i in range(2)]), expected)
    assert model.params["blocks"]["q_proj"]["kernel"].bits == 4
    assert model.notes == (
        "blocks.v_proj.kernel: layers mix Q4_K, Q6_K; held exactly, as int8 codes in blocks of 16 (12 bits a weight)",
    )


@pytest.mark.parametrize(("base", "bits"), [("int8", 8), ("int4", 4)])
def test_requantised_leaves_stay_within_half_a_step(base, bits, tmp_path):
    config = tiny("llama", width=128)
    tensors = gguf_tensors(config, Type.F16)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), base=base)
    for name in GGUF_NAMES:
        leaf = model.params["blocks"][name]["kernel"]
        assert (leaf.bits, leaf.block) == (bits, 32)
        error = np.abs(np.asarray(leaf.dequantize()) - expected_leaf(config, tensors, name))
        steps = error.reshape(*leaf.scale.shape, 32) / np.asarray(leaf.scale, np.float32)[..., None]
        assert steps.max() <= 0.51
        assert steps.max() > 0.3  # it was quantised at all


def test_codes_that_have_the_bits_asked_for_are_kept(tmp_path):
    config = tiny("llama", width=128)
    path = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, Type.Q4_1))
    kept, plain = load_model(path, base="int4"), load_model(path, base="auto")
    one, other = (m.params["blocks"]["up_proj"]["kernel"] for m in (kept, plain))
    np.testing.assert_array_equal(one.codes, other.codes)
    np.testing.assert_array_equal(one.scale, other.scale)


@pytest.mark.parametrize("base", ["bf16", "f32"])
def test_float_bases(base, tmp_path):
    config = tiny("qwen2", width=64)
    tensors = gguf_tensors(config, Type.Q8_0)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), base=base, on_host=True)
    leaf = model.params["blocks"]["up_proj"]["kernel"]
    assert leaf.dtype == {"bf16": leaves.BFLOAT16, "f32": np.float32}[base]
    np.testing.assert_array_equal(leaf, expected_leaf(config, tensors, "up_proj").astype(leaf.dtype))
    assert model.params["blocks"]["q_proj"]["bias"].dtype == np.float32


def test_rows_that_have_no_whole_blocks_stay_bf16_with_a_note(tmp_path):
    config = tiny("llama", width=48)
    model = load_model(
        write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config)), base="int4", on_host=True
    )
    assert model.params["blocks"]["q_proj"]["kernel"].dtype == leaves.BFLOAT16
    assert model.params["blocks"]["down_proj"]["kernel"].bits == 4  # rows of 96
    assert any("rows of 48" in note and "bf16, not int4" in note for note in model.notes)


def test_tiny_scales_in_one_layer_widen_the_scales_of_the_stack(tmp_path):
    config = tiny("llama", width=128)
    tensors = gguf_tensors(config, Type.F32)
    raw, kind = tensors["blk.1.ffn_up.weight"]
    tensors["blk.1.ffn_up.weight"] = (raw * np.float32(1e-7), kind)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), base="int8", on_host=True)
    leaf = model.params["blocks"]["up_proj"]["kernel"]
    assert leaf.scale.dtype == np.float32
    for layer in range(2):
        x = wide_tensor(tensors, f"blk.{layer}.ffn_up.weight")
        assert np.abs(wide(leaf[layer]) - x).max() <= 0.51 * np.abs(x).max() / 127


def test_the_wide_model_never_exists(tmp_path, monkeypatch):
    """Peak of everything allocated while loading: the packed leaves and little else."""
    monkeypatch.setattr(leaves, "CHUNK_WEIGHTS", 1 << 15)
    config = tiny("llama", width=512, n_layers=4)
    path = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, Type.F16))
    load_model(path, base="int4", on_host=True)  # imports and caches happen here
    tracemalloc.start()
    try:
        model = load_model(path, base="int4", on_host=True)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    packed = tree_bytes(model.params)
    assert config.n_params() * 4 > 6 * packed
    # The reader of the header takes at most 4 MiB at a time, and keeps none of it.
    assert peak < packed + max(4 << 20, 24 * leaves.CHUNK_WEIGHTS) + (1 << 20)


def test_leaves_reach_the_device_without_a_copy(tmp_path):
    config = tiny("llama", width=128)
    array = leaves.empty_aligned((config.d_ff, config.d_model), np.float32)
    import jax

    assert jax.device_put(array).unsafe_buffer_pointer() == array.ctypes.data


@pytest.mark.parametrize("factor", [8.0, 32.0, 5.0])
def test_llama3_scaling_is_found_in_its_tensor(factor, tmp_path):
    scaling = RopeScaling(
        kind="llama3", factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position=8192
    )
    config = tiny("llama", width=256, rope_theta=500_000.0, rope_scaling=scaling)
    tensors = gguf_tensors(config)
    divisors = frequencies(5e5, 64, None) / frequencies(5e5, 64, scaling)
    tensors["rope_freqs.weight"] = (divisors.astype(np.float32), Type.F32)
    model = load_model(write_gguf(tmp_path / "m.gguf", config, tensors))
    assert model.config.rope_scaling.factor == pytest.approx(factor, rel=1e-6)
    assert model.config == config or factor == 5.0


def test_linear_scaling(tmp_path):
    config = tiny("gemma3", rope_scaling=RopeScaling(kind="linear", factor=8.0))

    def extra(writer):
        writer.add_string("gemma3.rope.scaling.type", "linear")
        writer.add_float32("gemma3.rope.scaling.factor", 8.0)

    model = load_model(write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config), extra=extra))
    assert model.config == config


def test_settings_nobody_knows_are_noted(tmp_path):
    config = tiny("llama")
    path = write_gguf(
        tmp_path / "m.gguf", config, gguf_tensors(config), extra=lambda w: w.add_uint32("llama.hyperdrive", 9)
    )
    assert load_model(path).notes == ("unknown settings were passed over: llama.hyperdrive",)


def test_a_quantised_row_order_is_exact(tmp_path):
    """Rows of q move as a whole: each keeps its own codes and scales."""
    config = tiny("llama", width=128)
    tensors = gguf_tensors(config, Type.Q4_0)
    leaf = load_model(write_gguf(tmp_path / "m.gguf", config, tensors), on_host=True).params["blocks"]
    q = leaf["q_proj"]["kernel"]
    assert isinstance(q, QuantizedArray)
    assert not np.array_equal(wide(q[0]), wide_tensor(tensors, "blk.0.attn_q.weight"))
    assert sorted(map(bytes, np.asarray(q.codes[0]))) == sorted(
        map(bytes, np.asarray(leaves_of(tensors["blk.0.attn_q.weight"]).codes))
    )


def leaves_of(tensor):
    from edgejax.weights.gguf_blocks import decode_rows

    raw, kind = tensor
    return decode_rows(kind, raw)
