"""What is planned from footprints: which settings fit, in which order, and what is kept of them."""

import dataclasses
import json

import pytest

from edgejax.core.errors import ConfigError, WeightsError
from edgejax.measure.memory import XlaMemory
from edgejax.models.shapes import find_shape
from edgejax.plan import Candidate, Footprint, compile_footprint
from edgejax.plan.candidate import abstract_model
from edgejax.plan.search import candidates_for, find_options, make_plan
from edgejax.plan.speed import flop_per_token, relative_speed
from edgejax.plan.store import FootprintStore
from edgejax.weights.packed_layout import Origin
from edgejax.weights.packed_write import write_packed
from edgejax.weights.random import RandomSource

pytestmark = pytest.mark.quick
MIB = 2**20


def footprint(trees: int, temp: int) -> Footprint:
    xla = XlaMemory(
        argument_bytes=trees, output_bytes=trees, alias_bytes=trees, temp_bytes=temp, generated_code_bytes=0
    )
    return Footprint(
        sources={"trees": trees, "the step itself": temp}, floor_bytes=trees, xla=xla, bytes_per_parameter=3.0
    )


class Compiler:
    """Footprints by a rule, and which were asked for."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def __call__(self, model, candidates):
        for candidate in candidates:
            self.asked.append(candidate)
            yield self.rule(candidate)


def temp_of(candidate: Candidate) -> int:
    """As many bytes a position as a step of that kind would have."""
    return (
        candidate.seq
        * {"none": 800, "mlp": 200, "full": 190}[candidate.remat]
        // (2 if candidate.boundaries == "int8" else 1)
    )


@pytest.fixture
def plan(tmp_path):
    def make(budget, rule=lambda c: footprint(1000, temp_of(c)), seq=64, notes=None, model="tiny"):
        compiler = Compiler(rule)
        note = (lambda text: None) if notes is None else notes.append
        store = FootprintStore("a card", tmp_path / "plans", note=note)
        candidates = candidates_for("lora", seq=seq)

        def find(some):
            return find_options(model, some, compiler, store, note)

        made = make_plan(
            model,
            candidates,
            2048,
            find,
            device="a card",
            memory_bytes=budget + 10,
            reserve_bytes=10,
            evidence="made up",
        )
        return made, compiler

    return make


def test_the_fastest_that_fits_is_chosen(plan):
    made, _ = plan(budget=10**9)
    assert made.chosen.candidate.remat == "none"
    assert made.chosen.relative_speed == 1
    made, _ = plan(budget=1000 + 64 * 200)
    assert (made.chosen.candidate.remat, made.chosen.candidate.boundaries) == ("mlp", "bf16")
    assert [option.candidate.remat for option in made.too_large()] == ["none"]
    made, _ = plan(budget=1000 + 64 * 190)
    assert made.chosen.candidate.boundaries == "f32"  # as fast as int8 and exact
    made, _ = plan(budget=1000 + 64 * 190 - 1)
    assert made.chosen.candidate.boundaries == "int8"
    speeds = [option.relative_speed for option in made.fitting()]
    assert speeds == sorted(speeds, reverse=True)


def test_nothing_fits_and_the_floor_is_said(plan):
    made, _ = plan(budget=1000)
    assert made.chosen is None
    assert made.longer is None
    assert made.floor_bytes() == 1000
    assert made.too_large()[0].candidate.boundaries == "int8"
    assert json.loads(json.dumps(made.to_json()))["chosen"] is None


def test_what_longer_rows_would_take(plan):
    made, _ = plan(budget=1000 + 64 * 200)  # mlp at 64; at 128 only int8 inputs of layers
    assert made.longer.chosen.candidate.seq == 128
    assert made.longer.chosen.candidate.boundaries == "int8"
    made, _ = plan(budget=10**9, seq=2048)  # tiny ends there
    assert made.longer is None
    with pytest.raises(ConfigError, match="4096 positions are beyond the context of tiny, 2048"):
        plan(budget=10**9, seq=4096)


def test_a_plan_is_kept_and_a_damaged_one_is_made_again(plan, tmp_path):
    first, compiler = plan(budget=10**9)
    assert len(compiler.asked) == 5
    again, compiler = plan(budget=10**9)
    assert compiler.asked == []
    assert again == first
    damaged = sorted((tmp_path / "plans").glob("*.json"))[0]
    value = json.loads(damaged.read_text())
    for text in (
        "{",
        "[]",
        json.dumps(value | {"peak_bytes": 1}),
        json.dumps({"peak_bytes": value["peak_bytes"]}),
        json.dumps(value | {"sources_bytes": []}),
    ):
        damaged.write_text(text)
        notes = []
        again, compiler = plan(budget=10**9, notes=notes)
        assert len(compiler.asked) == 1
        assert f"the kept plan {damaged} cannot be read" in notes[0]
        assert again == first
    assert not list((tmp_path / "plans").glob("*.unfinished"))


def test_a_candidate_that_cannot_be_compiled_is_named_and_not_kept(plan):
    def rule(candidate):
        return "it went wrong" if candidate.remat == "mlp" else footprint(1000, temp_of(candidate))

    made, _ = plan(budget=10**9, rule=rule)
    assert made.failed == {"--base int4 --remat mlp --boundaries bf16": "it went wrong"}
    _, compiler = plan(budget=10**9, rule=rule)
    assert [candidate.remat for candidate in compiler.asked] == ["mlp"]


def test_a_folder_that_cannot_be_written_is_no_obstacle(tmp_path):
    (tmp_path / "plans").write_text("a file")
    notes = []
    store = FootprintStore("a card", tmp_path / "plans", note=notes.append)
    path = store.path(Candidate(), *abstract_model("tiny", "int4"))
    store.put(path, footprint(1, 1))
    assert "cannot be kept" in notes[0]


def test_footprints_are_told_apart_by_all_they_depend_on(tmp_path):
    config, params = abstract_model("tiny", "int4")
    store, candidate = FootprintStore("a card", tmp_path), Candidate()
    paths = {
        store.path(candidate, config, params),
        FootprintStore("another card", tmp_path).path(candidate, config, params),
        store.path(dataclasses.replace(candidate, seq=64), config, params),
        store.path(dataclasses.replace(candidate, rank=4), config, params),
        store.path(candidate, dataclasses.replace(config, rope_theta=5.0), params),
        store.path(candidate, config, abstract_model("tiny", "int8")[1]),
    }
    assert len(paths) == 6


def test_the_bytes_of_a_compiled_step_by_source():
    config, params = abstract_model("tiny", "int8")
    found = {
        kept: compile_footprint(Candidate(base="int8", seq=256, remat=kept), config, params)
        for kept in ("none", "full")
    }
    for one in found.values():
        assert sum(one.sources.values()) == one.peak_bytes
        assert one.sources["the step itself"] > 0
        assert one.remark == ""
        assert Footprint.from_json(json.loads(json.dumps(one.to_json()))) == one
        assert one.sources["optimizer"] >= 2 * one.sources["adapters"]
    assert found["full"].peak_bytes < found["none"].peak_bytes
    assert found["full"].sources["layer inputs"] == 4 * 2 * 256 * 32


def test_speed_falls_with_what_is_computed_again():
    config, _ = abstract_model("smollm2-135m", "int4")
    speeds = [relative_speed(Candidate(remat=remat), config) for remat in ("none", "attention", "full")]
    speeds.insert(1, relative_speed(Candidate(remat="mlp", boundaries="bf16"), config))
    assert speeds[0] == 1
    assert speeds == sorted(speeds, reverse=True)
    # 4N and 6N of the usual convention, a trained head's second logits and attention on top.
    n, short = config.n_params(), {"remat": "none", "seq": 2}
    assert flop_per_token(Candidate(**short), config) == pytest.approx(4 * n, rel=0.01)
    full = Candidate(mode="full", base="f32", **short)
    head = 2 * config.vocab_size * config.d_model
    assert flop_per_token(full, config) == pytest.approx(6 * n + head, rel=0.01)
    # What full recomputation adds at short rows is twice the weights of all maps but the last.
    added = flop_per_token(Candidate(seq=2), config) - flop_per_token(Candidate(**short), config)
    shapes = config.linear_shapes()
    weights = sum(o * i for name, (o, i) in shapes.items() if name != "down_proj")
    assert added == pytest.approx(2 * config.n_layers * weights, rel=0.01)


def test_sliding_layers_see_no_more_than_their_window():
    config, _ = abstract_model("gemma-3-1b", "int4")
    everywhere = dataclasses.replace(config, sliding_layers=(), sliding_window=None)
    short, long = Candidate(seq=512), Candidate(seq=8192)
    assert flop_per_token(short, config) == flop_per_token(short, everywhere)
    saved = flop_per_token(long, everywhere) - flop_per_token(long, config)
    assert saved == 2 * 9 * 22 * (4096 - 512) * 4 * 256


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq": 1}, "at least 2 positions"),
        ({"batch": 0}, "batch must be at least 1"),
        ({"accumulate": -1}, "accumulate must be at least 1"),
        ({"rank": 0}, "rank must be at least 1"),
        ({"mode": "full"}, "holds weights in bf16 or f32, not in int4"),
        ({"schedule": "streamed", "remat": "none"}, "recomputes each layer"),
        ({"remat": "some"}, "some"),
    ],
)
def test_settings_that_cannot_be(options, message):
    with pytest.raises(ConfigError, match=message):
        Candidate(**options)


def test_a_packed_file_is_planned_as_it_is(tmp_path):
    config = find_shape("tiny")
    origin = Origin(name="tiny", format="random", sha256="", base="int8")
    write_packed(tmp_path / "tiny.ejx", RandomSource(config, 0), origin=origin, base="int8")
    found, params = abstract_model(str(tmp_path / "tiny.ejx"), "auto")
    assert found == config
    assert params["blocks"]["q_proj"]["kernel"].bits == 8


def test_an_unknown_model_names_the_nearest(tmp_path):
    with pytest.raises(WeightsError, match="neither an existing path nor a preset"):
        abstract_model(str(tmp_path / "mistyped.gguf"), "int4")
    assert abstract_model("smollm2-360m-bf16", "int4")[0] == find_shape("smollm2-360m")
    with pytest.raises(ConfigError, match=r"no shape named 'lama-3.2-1b'; the nearest: llama-3.2-1b"):
        abstract_model("lama-3.2-1b", "int4")
    with pytest.raises(ConfigError, match="base 'int3' is unknown"):
        abstract_model("tiny", "int3")
