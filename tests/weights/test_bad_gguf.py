"""Damaged, foreign and unsupported GGUF files: always a ``WeightsError`` that says what is wrong."""

import contextlib

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from gguf import GGUFValueType as Kind
from gguf.gguf_writer import GGUFValue
from hypothesis import given
from hypothesis import strategies as st
from weight_files import gguf_tensors, tiny, write_gguf

from edgejax.core.errors import ConfigError, WeightsError
from edgejax.weights import load_model
from edgejax.weights.gguf_file import open_gguf

pytestmark = pytest.mark.quick
CONFIG = tiny("llama")


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf", CONFIG, gguf_tensors(CONFIG, Type.Q8_0))


def load(path, **options):
    return load_model(path, on_host=True, **options)


@given(st.data())
def test_a_file_cut_anywhere(whole_file, data):
    whole = whole_file.read_bytes()
    cut = whole_file.with_name("cut.gguf")
    cut.write_bytes(whole[: data.draw(st.integers(0, len(whole) - 64))])  # the last tensor is padded to 32
    with pytest.raises(WeightsError, match=r"cut\.gguf"):
        load(cut)


@given(st.data())
def test_a_flipped_byte_in_the_header_never_escapes_as_another_error(whole_file, data):
    whole = bytearray(whole_file.read_bytes())
    header_bytes = min(t.offset for t in open_gguf(whole_file).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        whole[data.draw(st.integers(0, header_bytes - 1))] = data.draw(st.integers(0, 255))
    bad = whole_file.with_name("flipped.gguf")
    bad.write_bytes(whole)
    with contextlib.suppress(WeightsError):  # a flip may also hit a name or a number that is free to change
        load(bad)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (b"PK\x03\x04 a zip archive, perhaps", "not a GGUF file.*PK"),
        (b"GGUF\x09\x00\x00\x00" + b"\x00" * 16, "version 9"),
        (b"GGUF\x03\x00\x00\x00" + b"\xff" * 16, "damaged header"),
    ],
)
def test_what_is_no_gguf_file(content, message, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=message):
        load(path)


def test_a_path_that_is_not_there():
    with pytest.raises(WeightsError, match=r"neither an existing path nor a preset.*smollm2-135m"):
        load("/nowhere/at-all.gguf")


def test_an_unknown_base(whole_file):
    with pytest.raises(ConfigError, match=r"int3.*int4"):
        load(whole_file, base="int3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("blk.1.ffn_up.weight"), r"tensor 'blk\.1\.ffn_up\.weight' is missing"),
        (lambda t: t.pop("output_norm.weight"), r"'output_norm\.weight' is missing"),
        (lambda t: t.update({"blk.0.ffn_gate_inp.weight": t["output_norm.weight"]}), "ffn_gate_inp"),
        (lambda t: t.update({"blk.0.attn_k.weight": t["blk.0.attn_q.weight"]}), r"k_proj.*\(64, 64\).*\(32, 64\)"),
        (lambda t: t.update({"blk.0.attn_norm.weight": t["blk.0.attn_q.weight"]}), r"attn_norm.*shape \(64, 64\)"),
        (lambda t: t["blk.1.attn_norm.weight"][0].__setitem__(3, np.nan), "attn_norm.*layer 1.*not finite"),
        (lambda t: t["blk.1.ffn_up.weight"][0].__setitem__((5, slice(0, 2)), (0, 0x7C)), "up_proj.*not finite"),
    ],
)  # fmt: skip
def test_tensors_that_are_not_what_they_must_be(change, message, tmp_path):
    tensors = {n: (raw.copy(), kind) for n, (raw, kind) in gguf_tensors(CONFIG, Type.Q8_0).items()}
    change(tensors)
    with pytest.raises(WeightsError, match=message):
        load(write_gguf(tmp_path / "m.gguf", CONFIG, tensors))


def test_a_block_type_that_is_not_supported(tmp_path):
    config = tiny("llama", width=256)
    tensors = gguf_tensors(config)
    tensors["blk.0.ffn_up.weight"] = (np.zeros((512, 84), np.uint8), Type.Q2_K)
    with pytest.raises(WeightsError, match=r"blk\.0\.ffn_up\.weight'.*Q2_K is not supported"):
        load(write_gguf(tmp_path / "m.gguf", config, tensors))


def test_a_block_type_that_nobody_knows(whole_file, tmp_path):
    whole = bytearray(whole_file.read_bytes())
    name = b"blk.0.attn_v.weight"
    at = whole.index(name) + len(name) + 4 + 16  # after the rank and two sizes
    whole[at : at + 4] = (999).to_bytes(4, "little")
    bad = tmp_path / "m.gguf"
    bad.write_bytes(whole)
    with pytest.raises(WeightsError, match=r"blk\.0\.attn_v\.weight.*unknown block type 999"):
        load(bad)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda w: w.add_expert_count(8), "expert_count = 8"),
        (lambda w: w.add_string("llama.rope.scaling.type", "yarn"), "yarn.*linear, llama3"),
        (lambda w: w.add_final_logit_softcapping(30.0), "final_logit_softcapping"),
        (lambda w: w.add_rope_dimension_count(8), "rope.dimension_count is 8"),
        (lambda w: w.add_sliding_window(64), "sliding_window"),
        (lambda w: w.add_logit_scale(0.5), "logit_scale"),
    ],
)
def test_settings_that_change_the_maths(extra, message, tmp_path):
    with pytest.raises(WeightsError, match=message):
        load(write_gguf(tmp_path / "m.gguf", CONFIG, gguf_tensors(CONFIG), extra=extra))


def test_an_architecture_that_is_not_supported(tmp_path):
    with pytest.raises(
        WeightsError, match="'mamba' is not supported; supported: llama, qwen2, qwen3, gemma3"
    ):
        load(write_gguf(tmp_path / "m.gguf", CONFIG, gguf_tensors(CONFIG), arch="mamba"))


def test_rope_divisors_that_are_no_llama3_scaling(tmp_path):
    tensors = gguf_tensors(CONFIG) | {"rope_freqs.weight": (np.linspace(1, 3, 8, dtype=np.float32), Type.F32)}
    with pytest.raises(WeightsError, match=r"rope_freqs\.weight holds divisors from 1 to 3"):
        load(write_gguf(tmp_path / "m.gguf", CONFIG, tensors))


def test_a_missing_tokenizer_is_an_error_unless_it_is_not_wanted(tmp_path):
    path = write_gguf(tmp_path / "m.gguf", CONFIG, gguf_tensors(CONFIG), tokenizer=False)
    with pytest.raises(WeightsError, match="no tokenizer in the file"):
        load(path)
    assert load(path, need_tokenizer=False).tokenizer is None


def test_a_tokenizer_with_more_tokens_than_rows(tmp_path):
    config = tiny("llama", vocab_size=50)
    with pytest.raises(WeightsError, match="96 tokens, the embedding table 50 rows"):
        load(write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config)))


ODD = (
    GGUFValue("x", Kind.STRING), GGUFValue(-1, Kind.INT32), GGUFValue(0, Kind.UINT32), GGUFValue(7, Kind.UINT32),
    GGUFValue(2**63, Kind.UINT64), GGUFValue(float("nan"), Kind.FLOAT32), GGUFValue(True, Kind.BOOL),
    GGUFValue([1, 2], Kind.ARRAY, Kind.INT32), GGUFValue([1.5] * 96, Kind.ARRAY, Kind.FLOAT32),
    GGUFValue(["a b"], Kind.ARRAY, Kind.STRING),
)  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_metadata_of_any_type_is_read_or_refused(family, tmp_path):
    config = tiny(family)
    tensors = gguf_tensors(config)
    keys: list[str] = []
    write_gguf(tmp_path / "m.gguf", config, tensors, extra=lambda w: keys.extend(w.kv_data[0]))
    keys += [f"{family}.{key}" for key in ("rope.scaling.type", "rope.scaling.factor", "rope.scale_linear")]
    keys += ["tokenizer.ggml.padding_token_id", "tokenizer.ggml.add_bos_token", "general.alignment"]
    refused = 0
    for key in keys:
        for value in ODD:
            extra = lambda w, key=key, value=value: w.kv_data[0].update({key: value})  # noqa: E731
            with contextlib.suppress(TypeError, ValueError):  # the writer itself needs a sensible alignment
                write_gguf(tmp_path / "m.gguf", config, tensors, extra=extra)
            refused += 1
            with contextlib.suppress(WeightsError):
                load(tmp_path / "m.gguf")
                refused -= 1
    assert refused > 2 * len(keys)
