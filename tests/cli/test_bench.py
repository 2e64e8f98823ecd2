"""bench on a tiny random model: the measuring process, its line of JSON, its record, its refusals."""

import json

import jax
import numpy as np
import pytest

from edgejax.cli import bench
from edgejax.cli.bench_inputs import open_inputs
from edgejax.cli.bench_settings import BenchSettings
from edgejax.cli.main import main
from edgejax.core.errors import ConfigError, RunError
from edgejax.core.trees import tree_paths
from edgejax.models.shapes import SHAPES
from edgejax.quant import QuantizedArray, is_quantized
from edgejax.train.programs import abstract

TINY = ["bench", "--random-weights", "--model", "tiny", "--seq", "32", "--repeats", "3"]
NEEDED = (
    "tokens_per_s_median", "tokens_per_s_samples", "matmul_peak_gflop_per_s", "fraction_of_matmul_peak",
    "xla_temp_bytes", "xla_argument_bytes", "xla_output_bytes", "xla_alias_bytes", "peak_rss_bytes",
    "peak_rss_anonymous_bytes", "rss_after_imports_bytes", "rss_after_load_bytes", "compile_s", "first_step_s",
    "load_average", "cpu_seconds_over_wall", "flop_per_token", "versions", "config",
)  # fmt: skip


def test_one_line_of_json_and_a_record(capsys, tmp_path):
    out = tmp_path / "r.json"
    arguments = [*TINY, "--base", "int4", "--remat", "full", "--batch", "2", "--json", "--out", str(out)]
    assert main(arguments) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [name for name in NEEDED if name not in line] == []
    assert len(line["tokens_per_s_samples"]) == 3
    assert line["tokens_per_step"] == 64
    assert line["tokens_per_s_median"] == pytest.approx(64 / np.median(line["step_wall_s_samples"]))
    assert line["flop_per_token"] == 4 * SHAPES["tiny"].n_params()
    step_flop = line["flop_per_token"] * line["tokens_per_step"]
    peaks = line["matmul_peak_gflop_per_s_samples"]
    expected = [
        step_flop / seconds / 1e9 / peak
        for seconds, peak in zip(line["step_wall_s_samples"], peaks, strict=True)
    ]
    assert line["fraction_of_matmul_peak"] == pytest.approx(np.median(expected))
    assert line["first_step_s"] > line["compile_s"] > 0
    assert line["peak_rss_bytes"] >= line["peak_rss_after_compile_bytes"] >= line["rss_after_imports_bytes"]
    assert line["peak_rss_bytes"] >= line["rss_after_load_bytes"] > line["memory_by_source_bytes"]["weights"]
    assert line["threads"] <= 2
    assert line["orbax_imported"] is False
    assert line["losses"][-1] < line["losses"][0] + 1
    assert line["numerics_guard"]["in_place" if "in_place" in line["numerics_guard"] else "state"]
    assert line["config"]["base"] == "int4"
    assert json.loads(out.read_text())["results"]["tokens_per_s_median"] == line["tokens_per_s_median"]
    assert main(arguments) == 2  # the record is never overwritten; refused before anything is measured
    assert "never overwritten" in capsys.readouterr().err


def test_full_mode_and_a_warm_compile_cache(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    arguments = [*TINY, "--mode", "full", "--optimizer", "sgd", "--compile-cache", "--json"]
    assert main(arguments) == 0
    cold = json.loads(capsys.readouterr().out)
    assert main(arguments) == 0
    warm = json.loads(capsys.readouterr().out)
    assert cold["flop_per_token"] == 6 * SHAPES["tiny"].n_params()
    assert cold["compile_cache_hits"] == 0
    assert warm["compile_cache_hits"] > 0
    assert warm["compile_cache_misses"] == 0
    assert warm["losses"] == cold["losses"]
    # the state is donated: what stays is the batch, and the metrics come beside it
    assert cold["xla_alias_bytes"] >= cold["memory_by_source_bytes"]["adapters"]
    assert cold["memory_by_source_bytes"]["adapters"] == 4 * SHAPES["tiny"].n_params()


@pytest.mark.quick
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--mode", "full", "--base", "int4"], "--base int4"),
        (["--schedule", "pipelined"], "whole, layerwise, streamed"),
        (["--rank", "0"], "--rank must be at least 1"),
        (["--repeats", "0"], "--repeats"),
        (["--seq", "1"], "--seq"),
    ],
)
def test_bad_settings_are_refused_before_a_process_starts(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(bench, "measure_in_child", lambda settings: pytest.fail("was started"))
    assert main([*TINY, *arguments]) == 2
    assert said in capsys.readouterr().err


def test_errors_of_the_measuring_process_reach_the_person(capfd):
    assert main([*TINY, "--optimizer", "nonesuch"]) == 2
    assert "no optimizer named 'nonesuch'" in capfd.readouterr().err
    assert main(["bench", "--random-weights", "--model", "nonesuch"]) == 2
    assert "smollm2-135m" in capfd.readouterr().err


@pytest.mark.quick
def test_a_measuring_process_that_dies_is_an_error(monkeypatch):
    import subprocess

    for code, output in ((-9, ""), (0, ""), (0, "not json\n")):
        done = subprocess.CompletedProcess([], code, stdout=output)
        monkeypatch.setattr(bench.subprocess, "run", lambda *a, done=done, **k: done)
        with pytest.raises(RunError, match=r"signal 9|without a record"):
            bench.measure_in_child(BenchSettings())


@pytest.mark.quick
def test_settings_survive_the_way_to_the_process():
    settings = BenchSettings(seq=64, base="int8", compile_cache=True)
    assert BenchSettings.from_json(settings.to_json()) == settings


@pytest.mark.quick
def test_random_weights_are_held_as_asked_and_repeat():
    def made(base: str):
        return open_inputs(BenchSettings(model="tiny", random_weights=True, base=base, seq=32, seed=1))

    inputs = made("int4")
    params = inputs.load()
    assert abstract(params) == inputs.abstract_params
    assert isinstance(params["blocks"]["q_proj"]["kernel"], QuantizedArray)
    assert params["blocks"]["q_proj"]["kernel"].bits == 4
    again = jax.tree.leaves(made("int4").load())
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), again, strict=True))
    wide = tree_paths(made("f32").load(), is_leaf=is_quantized)
    assert float(np.std(wide["blocks.down_proj.kernel"])) == pytest.approx(0.02, rel=0.05)
    assert not np.array_equal(wide["blocks.q_proj.kernel"][0], wide["blocks.q_proj.kernel"][1])
    with pytest.raises(ConfigError, match="int3"):
        made("int3")


@pytest.mark.quick
def test_every_position_of_a_batch_counts():
    settings = BenchSettings(
        model="tiny", random_weights=True, seq=48, batch=2, accumulate=3, repeats=2, base="f32"
    )
    inputs = open_inputs(settings)
    for step in range(6):  # beyond the text: rows come again
        batch = inputs.batch_at(step)
        assert batch.tokens.shape == (3, 2, 48)
        assert batch.loss_mask.all()
    with pytest.raises(ConfigError, match="context of 2048"):
        open_inputs(BenchSettings(model="tiny", random_weights=True, seq=4096))


@pytest.mark.parametrize(
    "options",
    [
        ("--mode", "full", "--base", "bf16", "--optimizer", "adamw4bit", "--schedule", "layerwise"),
        ("--mode", "full", "--schedule", "whole", "--optimizer", "adamw8bit"),
        ("--mode", "lora", "--base", "int4", "--schedule", "streamed", "--boundaries", "int8"),
    ],
    ids=["layerwise", "whole", "streamed"],
)
def test_each_schedule_is_measured_with_its_bytes(options, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert main([*TINY, "--json", *options]) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    receipt = result["receipt"]
    held = sum(tree["n_bytes"] for tree in receipt["trees"] if tree["name"] != "frozen weights")
    held += receipt["gradients_bytes"]
    assert result["bytes_per_parameter"] == pytest.approx(held / receipt["trained_parameters"])
    assert result["xla_temp_bytes"] > 0
    assert all(np.isfinite(result["losses"]))
