"""Plans for cards that are not here: what XLA is told, what is missing, and the real compiler where it is installed."""

import json
import re
import sys

import pytest

from edgejax.cli import main as program
from edgejax.core.errors import ConfigError
from edgejax.devices import device_profiles, find_device
from edgejax.measure.memory import XlaMemory
from edgejax.plan import Candidate, Footprint, card, card_process, plan_for_card
from edgejax.plan.cuda_target import check_card, target_config

CARDS = [p for p in device_profiles() if p.compute_capability and p.compute_capability >= (8, 0)]


@pytest.mark.quick
@pytest.mark.parametrize("profile", CARDS, ids=lambda profile: profile.name)
def test_every_card_of_the_table_can_be_described(profile):
    text = target_config(profile)
    assert f"core_count: {profile.multiprocessors}" in text
    assert f"device_memory_size: {profile.memory_bytes}" in text
    assert "None" not in text
    assert text.count("{") == text.count("}")
    # Cores x lanes x 2 operations x clock is the published peak of float32.
    lanes, clock = (
        float(re.search(rf"{name}: ([\d.]+)", text)[1]) for name in ("fpus_per_core", "clock_rate_ghz")
    )
    assert profile.multiprocessors * lanes * 2 * clock == pytest.approx(profile.gpu_gflop_per_s, rel=0.01)


@pytest.mark.quick
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rtx2060", r"compute capability 7\.5; plans are made from 8\.0 .* no Pallas path"),
        ("rx 7600", "for NVIDIA's cards, and AMD Radeon RX 7600 is none"),
        ("pixel 7a", "for NVIDIA's cards, and Google Pixel 7a is none"),
    ],
)
def test_devices_that_cannot_be_compiled_for(name, message):
    with pytest.raises(ConfigError, match=message):
        check_card(find_device(name))


@pytest.fixture
def no_plugin(tmp_path, monkeypatch):
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def add_plugin(version: str) -> None:
    metadata = card.aot_folder() / f"jax_cuda12_plugin-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: jax-cuda12-plugin\nVersion: {version}\n"
    )


@pytest.mark.quick
def test_without_the_compiler_it_is_said_what_to_install(no_plugin):
    with pytest.raises(
        ConfigError, match=r"(?s)need JAX's CUDA compiler.*pip install --no-deps --target .*gpu-aot"
    ):
        plan_for_card(find_device("rtx3060"), "tiny")


@pytest.mark.quick
def test_a_plugin_of_another_version_is_refused(no_plugin):
    add_plugin("0.1.2")
    with pytest.raises(
        ConfigError, match=r"jax-cuda12-plugin is 0\.1\.2 and JAX is .*must be of one version"
    ):
        card.find_plugin()


DYING = """
import json, os, sys
request = json.load(sys.stdin)
print("a library says something")
for number, text in enumerate(request["candidates"]):
    candidate = json.loads(text)
    if candidate["seq"] == 33:
        print("its last words", file=sys.stderr, flush=True)
        os.abort()
    n = candidate["seq"]
    xla = {"argument_bytes": n, "output_bytes": 0, "alias_bytes": 0, "temp_bytes": 0, "generated_code_bytes": 0}
    print(json.dumps({"footprint": {
        "peak_bytes": n, "sources_bytes": {"trees": n}, "floor_bytes": n, "compiling_bytes": 0, "uncertain_bytes": 0, "xla": xla, "bytes_per_parameter": 1, "remark": ""
    }}), flush=True)
"""


@pytest.mark.quick
def test_a_candidate_that_takes_the_compiler_down_costs_no_other(monkeypatch, tmp_path):
    package = tmp_path / "edgejax" / "plan"
    package.mkdir(parents=True)
    for folder in (package, package.parent):
        (folder / "__init__.py").touch()
    (package / "card_process.py").write_text(DYING)
    monkeypatch.chdir(tmp_path)  # where -m looks first
    monkeypatch.setattr(card, "find_plugin", lambda: ("plugin", "1"))
    environment = {"PATH": "/bin", "PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(card, "compiling_environment", lambda: environment)
    candidates = [Candidate(seq=seq) for seq in (32, 33, 34, 35)]
    found = list(card.card_footprints(find_device("rtx3060"), "tiny", candidates))
    assert [one if isinstance(one, str) else one.peak_bytes for one in found] == [
        32, "the compiler ended with SIGABRT: its last words", 34, 35,
    ]  # fmt: skip
    some = card.card_footprints(find_device("rtx3060"), "tiny", candidates)
    next(some)
    some.close()  # nobody waits for the rest; its process is gone
    environment["PYTHONHOME"] = str(tmp_path)  # cannot even start
    dead = list(card.card_footprints(find_device("rtx3060"), "tiny", candidates[:2]))
    assert [one.startswith("the compiler ended with exit code 1") for one in dead] == [True, True]


@pytest.mark.quick
def test_a_product_that_triton_cannot_tile_is_left_to_cublas(monkeypatch):
    asked = []

    def compile_footprint(*args, compiler_options, remark, **kwargs):
        asked.append(compiler_options)
        if compiler_options is None or len(asked) > 2:
            raise RuntimeError(f"INTERNAL: way {len(asked)}\nmore")
        xla = XlaMemory(argument_bytes=1, output_bytes=0, alias_bytes=0, temp_bytes=0, generated_code_bytes=0)
        return Footprint(sources={"trees": 1}, floor_bytes=1, xla=xla, bytes_per_parameter=1.0, remark=remark)

    monkeypatch.setattr(card_process, "compile_footprint", compile_footprint)
    text = Candidate(seq=32).to_json()
    found = card_process.answer("tiny", text, None, None)
    assert asked == [None, {"xla_gpu_enable_triton_gemm": False}]
    assert "cuBLAS" in found["footprint"]["remark"]
    assert card_process.answer("tiny", text, None, None) == {"error": "INTERNAL: way 3"}
    assert card_process.answer("none such", text, None, None)["error"].startswith(
        "no shape named 'none such'"
    )


@pytest.mark.quick
def test_the_command_refuses_before_anything_is_compiled(capsys, monkeypatch):
    monkeypatch.setattr(card, "find_plugin", lambda: ("plugin", "1"))
    monkeypatch.setattr(card, "card_footprints", None)
    for words, message in (
        (["--device", "rtx3061"], "no device named 'rtx3061'; the nearest names: NVIDIA GeForce RTX 3060"),
        (["--device", "rtx2060"], "no Pallas path"),
        (["--device", "rtx3060", "--batch", "70000", "--seq", "70000"], "positions at a time"),
        (["--device", "600"], "'600' has no unit"),
        (["--device", "Snapdragon 778G"], "is a chip"),
        (["--device", "600MB", "--full", "--base", "f32"], "--base and --rank are of LoRA"),
        (["--device", "600MB", "--seq", "10000"], "10000 positions are beyond the context"),
        (["--device", "600MB", "--model", "lama-3.2-1b"], "the nearest: llama-3.2-1b"),
        (["--device", "rtx3060", "--full", "--base", "int8"], "--base and --rank are of LoRA"),
        (["--device", "rtx3060", "--full", "--rank", "4"], "--base and --rank are of LoRA"),
        (["--device", "rtx3060", "--seq", "0"], "at least 2 positions"),
        (["--device", "rtx3060", "--rank", "0"], "rank must be at least 1"),
        (["--device", "rtx3060", "--batch", "0"], "batch must be at least 1"),
        (["--device", "rtx3060", "--model", "lama-3.2-1b"], "the nearest: llama-3.2-1b"),
        (["--device", "rtx3060", "--model", "/nowhere/m.gguf"], "neither an existing path"),
    ):
        assert program.main(["plan", *words]) == 2
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def compiler():
    try:
        return card.find_plugin()
    except ConfigError as error:
        pytest.skip(str(error))


@pytest.mark.slow
def test_a_plan_by_the_real_compiler(compiler, capsys):
    words = ["plan", "--device", "rtx3060", "--model", "tiny", "--seq", "64", "--base", "int8"]
    assert program.main([*words, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["memory_bytes"] == 12 * 2**30
    assert plan["evidence"] == "compiled for NVIDIA GeForce RTX 3060 12 GB (buffer assignment)"
    assert plan["failed"] == {}
    assert plan["chosen"]["settings"]["remat"] == "none"
    peaks = {c["options"]: c["peak_bytes"] for c in plan["candidates"]}
    assert peaks["--base int8 --remat full --boundaries int8"] < peaks["--base int8 --remat none"]
    for candidate in plan["candidates"]:
        assert sum(candidate["sources_bytes"].values()) == candidate["peak_bytes"]
        assert candidate["xla"]["alias_bytes"] > 0  # the state is donated on the card too
    assert plan["longer"]["chosen"]["settings"]["seq"] == 128
    assert program.main(words) == 0
    said = capsys.readouterr()
    assert said.err == ""  # kept
    assert (
        "Train it there with: edgejax finetune --model PATH --seq 64 --batch 1 --rank 8 --base int8 --remat none"
        in said.out
    )
