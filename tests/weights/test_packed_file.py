"""Packed files: the same bits as ``load_model``, mapped without a copy, made in little memory, whole or not at all."""

import gc
import os
import shutil
import tracemalloc
from pathlib import Path

import jax
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Type
from safetensors import safe_open
from weight_files import BF16, gguf_tensors, hf_settings, hf_tensors, tiny, write_gguf, write_hf

from edgejax.core.errors import ConfigError, RunError, WeightsError
from edgejax.core.trees import tree_bytes
from edgejax.models.config import FAMILIES, ModelConfig, RopeScaling
from edgejax.quant import QuantizedArray
from edgejax.weights import Origin, load_model, open_model, open_packed, packed_write, write_packed
from edgejax.weights.export import export
from edgejax.weights.packed_decode import is_packed
from edgejax.weights.params import load_params
from edgejax.weights.random import RandomSource

pytestmark = pytest.mark.quick
BASES = ("auto", "int8", "int4", "ternary", "bf16", "f32")


def pack(source, out: Path, base="auto", **options) -> Path:
    opened = open_model(source, base=base)
    origin = Origin(name="m", format=opened.source.format, sha256=opened.source.sha256, base=base)
    write_packed(out, opened.reader, origin=origin, base=base, tokenizer=opened.tokenizer, **options)
    return out


def pack_random(config: ModelConfig, out: Path, base="int4", **options) -> Path:
    origin = Origin(name="random", format="random", sha256="", base=base)
    write_packed(out, RandomSource(config, 0), origin=origin, base=base, **options)
    return out


def assert_same(a, b) -> None:
    """The same structure, types and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def shapes(tree):
    return jax.tree.map(lambda x: (x.shape, np.dtype(x.dtype)), tree)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """qwen2 in int4: biases, codes, scales, minima, a tied head."""
    return pack_random(tiny("qwen2"), tmp_path_factory.mktemp("packed") / "m.ejx")


# What is in it.


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_folder_holds_what_the_folder_is_loaded_as(family, base, tmp_path):
    config = tiny(family)
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config), dtype=BF16)
    model = load_model(folder, base=base, on_host=True)
    file = open_packed(pack(folder, tmp_path / "m.ejx", base), verify="all")
    assert file.config == model.config == config
    assert_same(file.load(), model.params)
    assert shapes(file.abstract_params()) == shapes(model.params)
    for i in range(config.n_layers):
        assert_same(file.layer(i), jax.tree.map(lambda x, i=i: x[i], model.params["blocks"]))
    assert_same(file.tables(), {name: leaf for name, leaf in model.params.items() if name != "blocks"})
    again = load_model(tmp_path / "m.ejx", on_host=True)
    assert (again.config, again.notes, again.source.format) == (config, model.notes, "packed")
    assert again.source.sha256 == file.sha256
    assert_same(again.params, model.params)
    assert_same(jax.device_get(load_model(tmp_path / "m.ejx").params), model.params)


@pytest.mark.parametrize(
    "kind",
    [
        Type.Q8_0,
        Type.Q4_1,
        Type.Q4_K,
        Type.Q6_K,
        Type.TQ2_0,
        lambda name: Type.Q6_K if "blk.1.ffn" in name else Type.Q4_K,
    ],
    ids=["Q8_0", "Q4_1", "Q4_K", "Q6_K", "TQ2_0", "mixed"],
)
def test_a_packed_gguf_file_holds_what_the_file_is_loaded_as(kind, tmp_path):
    config = tiny("llama", width=256)  # rows of q and k are interleaved in the file
    source = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, kind))
    model = load_model(source, on_host=True)
    again = load_model(pack(source, tmp_path / "m.ejx"), on_host=True)
    assert_same(again.params, model.params)
    assert (again.config, again.notes) == (model.config, model.notes)


@pytest.mark.parametrize("trained_so", [False, True])
def test_weights_that_ternary_codes_cannot_hold_are_noted_once(trained_so, tmp_path):
    config = tiny("llama", width=256)
    tensors = hf_tensors(config)
    if trained_so:
        tensors = {name: np.sign(x) * np.float32(0.02) if x.ndim == 2 else x for name, x in tensors.items()}
    folder = write_hf(tmp_path / "m", hf_settings(config), tensors)
    model = load_model(folder, base="ternary", on_host=True)
    assert model.params["blocks"]["up_proj"]["kernel"].bits == 2
    assert model.params["blocks"]["up_proj"]["kernel"].block == 256
    assert model.params["embed"]["table"].bits == 8
    noted = [note for note in model.notes if "of the norm of its weights is lost in ternary codes" in note]
    assert len(noted) == (0 if trained_so else 1)
    assert load_model(pack(folder, tmp_path / "m.ejx", "ternary"), on_host=True).notes == model.notes
    if trained_so:
        held = model.params["blocks"]["gate_proj"]["kernel"].dequantize()[1]
        wanted = tensors["model.layers.1.mlp.gate_proj.weight"]
        np.testing.assert_allclose(held, wanted, rtol=2.0**-10)


def test_what_is_narrow_already_stays_so_where_ternary_is_asked_for(tmp_path):
    config = tiny("llama", width=256)
    for kind, bits in ((Type.TQ2_0, 2), (Type.Q4_1, 4), (Type.F16, 8)):
        source = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, kind))
        model = load_model(source, base="ternary", on_host=True)
        assert (model.params["embed"]["table"].bits, model.params["blocks"]["q_proj"]["kernel"].bits) == (
            bits,
            2,
        )
        out = pack(source, tmp_path / "m.ejx", "ternary", overwrite=True)
        assert_same(load_model(out, base="ternary", on_host=True).params, model.params)


@pytest.mark.parametrize("base", ["int4", "int8"])
def test_ternary_codes_stay_so_where_more_bits_are_asked_for(base, tmp_path):
    """In 4 bits without a sign there would be no zero."""
    config = tiny("llama", width=256)
    source = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, Type.TQ2_0))
    assert_same(load_model(source, base=base, on_host=True).params, load_model(source, on_host=True).params)


def test_a_leaf_with_one_tiny_layer_has_wide_scales_in_all(tmp_path):
    config = tiny("llama")
    tensors = hf_tensors(config)
    tensors["model.layers.1.mlp.up_proj.weight"] *= np.float32(1e-8)
    folder = write_hf(tmp_path / "m", hf_settings(config), tensors)
    model = load_model(folder, base="int4", on_host=True)
    file = open_packed(pack(folder, tmp_path / "m.ejx", "int4"), verify="all")
    assert_same(file.load(), model.params)
    wide, narrow = file.layer(0)["up_proj"]["kernel"], file.layer(1)["gate_proj"]["kernel"]
    assert (wide.scale.dtype, narrow.scale.dtype) == (np.float32, np.float16)
    assert shapes(file.layer(0)) == shapes(file.layer(1))  # one compiled program for all layers


def test_a_row_that_has_no_blocks_stays_bf16_and_says_so(tmp_path):
    config = tiny("llama", d_ff=72)
    folder = write_hf(tmp_path / "m", hf_settings(config), hf_tensors(config))
    model = load_model(folder, base="int4", on_host=True)
    pack(folder, tmp_path / "m.ejx", "int4")
    assert len(model.notes) == 1
    for base in ("auto", "int4"):
        again = load_model(tmp_path / "m.ejx", base=base, on_host=True)
        assert again.notes == model.notes
        assert_same(again.params, model.params)


def test_every_setting_of_a_configuration_comes_back(tmp_path):
    scaling = RopeScaling(kind="llama3", factor=32.0, low_freq_factor=1.0, high_freq_factor=4.1)
    for config in (tiny("llama", rope_scaling=scaling, norm_eps=1e-5 / 3), tiny("gemma3")):
        again = open_packed(pack_random(config, tmp_path / config.family)).config
        assert again == config
        assert type(again.sliding_layers) is tuple


def test_the_tokenizer_comes_along(tmp_path):
    config = tiny("llama")
    source = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config))
    before = load_model(source).tokenizer
    after = load_model(pack(source, tmp_path / "m.ejx")).tokenizer
    text, chat = "the<|im_end|>other", [{"role": "user", "content": "thing"}]
    assert after.encode(text) == before.encode(text)
    assert after.decode(after.encode(text)) == before.decode(before.encode(text))
    assert after.render_chat(chat, True) == before.render_chat(chat, True)
    for name in ("bos_id", "eos_id", "pad_id", "stop_ids", "add_bos", "special", "vocab_size"):
        assert getattr(after, name) == getattr(before, name)


def test_a_file_without_a_tokenizer_says_so(packed):
    assert load_model(packed, need_tokenizer=False, on_host=True).tokenizer is None
    with pytest.raises(WeightsError, match="no tokenizer was packed"):
        load_model(packed)


def test_packing_a_packed_file_changes_nothing(packed, tmp_path):
    first = open_packed(packed)
    write_packed(tmp_path / "again.ejx", first, origin=first.origin, notes=first.notes)
    assert (tmp_path / "again.ejx").read_bytes() == packed.read_bytes()
    assert open_packed(tmp_path / "again.ejx").sha256 == first.sha256


def test_a_model_exported_from_a_packed_file_is_that_of_its_source(tmp_path):
    config = tiny("llama")
    source = write_gguf(tmp_path / "m.gguf", config, gguf_tensors(config, Type.Q8_0))
    pack(source, tmp_path / "m.ejx")
    for name in ("m.gguf", "m.ejx"):
        model = load_model(tmp_path / name, on_host=True)
        export(model, tmp_path / f"hf-{name}", format="merged-safetensors", dtype="f32")
        export(model, tmp_path / f"{name}.f16", format="merged-gguf-f16")
    a, b = (load_model(tmp_path / f"hf-{name}", on_host=True).params for name in ("m.gguf", "m.ejx"))
    assert_same(a, b)
    a, b = (load_model(tmp_path / f"{name}.f16", on_host=True) for name in ("m.gguf", "m.ejx"))
    assert_same(a.params, b.params)
    assert a.tokenizer.encode("the other") == b.tokenizer.encode("the other")


# The form it is in.


@pytest.mark.parametrize(
    ("packed_as", "asked", "is_good"),
    [
        ("int4", "auto", True), ("int4", "int4", True), ("int4", "int8", False), ("int4", "f32", False),
        ("int8", "int4", False), ("bf16", "bf16", True), ("bf16", "f32", False), ("auto", "f32", True),
        ("auto", "int4", False),
    ],
)  # fmt: skip
def test_a_base_is_what_was_packed_or_refused(packed_as, asked, is_good, tmp_path):
    path = pack_random(tiny("llama"), tmp_path / "m.ejx", packed_as)
    if is_good:
        opened = open_model(path, base=asked, need_tokenizer=False)
        assert shapes(opened.abstract_params()) == shapes(opened.load(on_host=True).params)
    else:
        with pytest.raises(
            ConfigError, match=rf"packed as .*--base {packed_as}.*random again with --base {asked}"
        ):
            open_model(path, base=asked, need_tokenizer=False)


# How it lies.


@pytest.mark.parametrize("base", BASES)
def test_other_peoples_reader_reads_it(base, tmp_path):
    config = tiny("qwen3")
    path = pack_random(config, tmp_path / "m.ejx", base)
    kernel = open_packed(path).load()["blocks"]["up_proj"]["kernel"]
    wanted = {"": kernel[1]}
    if isinstance(kernel, QuantizedArray):
        named = {".codes": kernel.codes, ".scale": kernel.scale, ".minimum": kernel.minimum}
        wanted = {key: value[1] for key, value in named.items() if value is not None}
    with safe_open(path, "flax") as file:
        found = {key: file.get_tensor(f"layer.1.up_proj.kernel{key}") for key in wanted}
        assert file.metadata()["format"] == "edgejax-packed"
    assert_same(jax.device_get(found), wanted)


def test_layers_follow_each_other_on_pages_of_their_own(packed):
    file = open_packed(packed)
    assert list(file.sections) == ["embed", "layer.0", "layer.1", "final_norm"]
    assert all(section.start % 4096 == 0 for section in file.sections.values())
    first, second = (file.sections[f"layer.{i}"] for i in range(2))
    assert second.start == first.stop
    assert second.stop - second.start == first.stop - first.start
    assert file.n_bytes == os.path.getsize(packed)


@pytest.mark.parametrize("base", BASES)
def test_jax_takes_every_array_without_a_copy(base, tmp_path):
    file = open_packed(pack_random(tiny("qwen2", tie_embeddings=False), tmp_path / "m.ejx", base))
    host = [file.layer(0), file.layer(1), file.tables()]
    device = jax.device_put(host)
    pairs = list(zip(jax.tree.leaves(host), jax.tree.leaves(device), strict=True))
    assert all(x.ctypes.data % 64 == 0 and not x.flags.writeable for x, _ in pairs)
    assert [x.ctypes.data for x, _ in pairs] == [y.unsafe_buffer_pointer() for _, y in pairs]
    # An array outlives the object it came from.
    wanted = [x.tobytes() for x, _ in pairs]
    del host, pairs, file
    gc.collect()
    assert [np.asarray(x).tobytes() for x in jax.tree.leaves(device)] == wanted


def mapped_bytes(path: Path) -> int:
    """Pages of ``path`` that count as memory of this process."""
    n_bytes, is_ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split(" ", 1)[0]:
            is_ours = line.endswith(str(path))
        elif is_ours and line.startswith("Rss:"):
            n_bytes += 1024 * int(line.split()[1])
    return n_bytes


@pytest.mark.skipif(not os.path.exists("/proc/self/smaps"), reason="needs /proc/self/smaps")
def test_never_more_than_one_layer_is_in_memory(tmp_path):
    config = tiny("llama", width=256, n_layers=6, vocab_size=4096)
    path = pack_random(config, tmp_path / "m.ejx", "f32")
    file = open_packed(path)
    file.load()
    file.verify()
    assert mapped_bytes(path) == 0  # both read; neither maps
    layer_bytes = file.sections["layer.0"].stop - file.sections["layer.0"].start
    total, peak = 0.0, 0
    for i in range(config.n_layers):
        file.prefetch((i + 1) % config.n_layers)
        layer = file.layer(i)
        total += sum(float(x.sum()) for x in jax.tree.leaves(layer))
        peak = max(peak, mapped_bytes(path))
        file.release(i)
    assert layer_bytes <= peak <= layer_bytes + 2**17  # and what the kernel maps around it
    assert mapped_bytes(path) == 0
    again = sum(float(x.sum()) for x in jax.tree.leaves([file.layer(i) for i in range(config.n_layers)]))
    assert again == pytest.approx(total)
    assert mapped_bytes(path) >= config.n_layers * layer_bytes


@pytest.mark.parametrize("section", [-1, 2, "layers", "head"])
def test_sections_that_there_are_not(packed, section):
    file = open_packed(packed)
    for use in (file.release, file.prefetch, file.verify_section):
        with pytest.raises(IndexError, match=r"there are: embed, layer\.0"):
            use(section)
    if isinstance(section, int):
        with pytest.raises(IndexError, match="no section"):
            file.layer(section)


# How it is made.


@pytest.mark.parametrize("base", ["int4", "bf16"])
def test_packing_never_holds_a_layer_or_a_table_wide(base, tmp_path):
    config = tiny("llama", width=1024, n_layers=2, vocab_size=32768, d_ff=4096)
    tracemalloc.start()
    try:
        path = pack_random(config, tmp_path / "m.ejx", base)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.reset_peak()
        file = open_packed(path, verify="all")
        for i in range(config.n_layers):
            file.layer(i)
        opened = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 4 * config.n_params() > 240e6  # the model in float32
    assert peak < 20e6  # a chunk of 4 MB, some three times while it is quantised
    assert opened < 8e6


def test_a_packed_model_is_read_in_its_own_size(tmp_path):
    path = pack_random(tiny("llama", width=512, vocab_size=16384), tmp_path / "m.ejx")
    tracemalloc.start()
    try:
        params = load_model(path, need_tokenizer=False, on_host=True).params
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < tree_bytes(params) + 4e6


def test_random_weights_are_those_of_the_benchmark(packed):
    params = load_params(RandomSource(tiny("qwen2"), 0), "int4", [])
    assert_same(open_packed(packed).load(), params)


def test_sections_are_counted_as_they_are_done(tmp_path):
    calls = []
    pack_random(tiny("llama"), tmp_path / "m.ejx", on_section=lambda done, of: calls.append((done, of)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    source = write_gguf(tmp_path / "m.gguf", tiny("llama"), gguf_tensors(tiny("llama")))
    pack(source, tmp_path / "n.ejx", on_section=lambda done, of: calls.append((done, of)))
    assert calls[-1] == (5, 5)  # the tokenizer


def test_a_file_that_is_there_stays(tmp_path):
    out = tmp_path / "m.ejx"
    out.write_text("precious")
    with pytest.raises(RunError, match="exists and is not overwritten"):
        pack_random(tiny("llama"), out)
    assert out.read_text() == "precious"
    pack_random(tiny("llama"), out, overwrite=True)
    assert is_packed(out)
    with pytest.raises(ConfigError, match="is the model itself"):
        write_packed(out, open_packed(out), origin=open_packed(out).origin, overwrite=True)


def test_a_disk_that_is_too_small_is_noticed_before_anything_is_written(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=50_000)
    monkeypatch.setattr(packed_write.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(RandomSource, "rows", None)  # nothing may be drawn
    with pytest.raises(RunError, match=r"no space left.*needs \d.* KiB, 48\.8 KiB are free.*--base int4"):
        pack_random(tiny("llama"), tmp_path / "m.ejx", "f32")
    assert os.listdir(tmp_path) == []


def test_a_disk_that_fills_while_it_is_written_leaves_nothing(packed, tmp_path):
    """A limit on the size of files makes the kernel refuse the bytes after it, as a full disk does."""
    resource = pytest.importorskip("resource")
    n_bytes = packed.stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (*range(n_bytes // 7, n_bytes, n_bytes // 7), n_bytes - 32):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(RunError, match="no space left"):
                pack_random(tiny("qwen2"), tmp_path / "m.ejx")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("at", [0, 3, 40])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_nothing_and_keeps_what_was_there(at, error, tmp_path, monkeypatch):
    out, write, calls = tmp_path / "m.ejx", os.pwrite, []
    out.write_text("old")

    def fail(handle, data, offset):
        calls.append(offset)
        if len(calls) > at:
            raise error
        return write(handle, data[:1000], offset)  # less than it was given, as the kernel may

    monkeypatch.setattr(packed_write.os, "pwrite", fail)
    with pytest.raises(RunError if isinstance(error, OSError) else KeyboardInterrupt):
        pack_random(tiny("llama"), out, overwrite=True)
    assert [p.read_text() for p in tmp_path.iterdir()] == ["old"]


def test_short_writes_are_gone_on_with(packed, tmp_path, monkeypatch):
    write = os.pwrite
    monkeypatch.setattr(packed_write.os, "pwrite", lambda handle, data, at: write(handle, data[:1000], at))
    pack_random(tiny("qwen2"), tmp_path / "m.ejx")
    assert (tmp_path / "m.ejx").read_bytes() == packed.read_bytes()
