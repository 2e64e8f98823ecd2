"""The parity experiment: its statistics, its bookkeeping, and a quick run from start to end."""

import dataclasses
import importlib
import json
import math
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from edgejax.data import micro_batches, python_reference
from edgejax.measure.tables import newest, with_table
from edgejax.models import Decoder
from edgejax.train import make_eval_step, make_schedule
from edgejax.train.recipe import StepRecipe, make_step, start_run

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "optimizer_parity"
MODULES = ("settings", "rows", "tost", "corpus", "run", "analyse", "render")


@pytest.fixture(scope="module")
def parity():
    """The experiment's scripts, which import each other as neighbours."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in MODULES})
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


# Published tables of Student's t (NIST/SEMATECH e-Handbook, section 1.3.6.7.2), to three places.
@pytest.mark.parametrize(
    ("probability", "dof", "value"),
    [
        (0.95, 1, 6.314),
        (0.95, 2, 2.920),
        (0.95, 3, 2.353),
        (0.95, 7, 1.895),
        (0.95, 30, 1.697),
        (0.975, 7, 2.365),
        (0.99, 8, 2.896),
        (0.90, 100, 1.290),
    ],
)
def test_t_quantiles_are_those_of_the_table(parity, probability, dof, value):
    assert parity.tost.t_quantile(probability, dof) == pytest.approx(value, abs=6e-4)


def test_t_quantile_to_four_places_and_at_the_middle(parity):
    assert parity.tost.t_quantile(0.95, 7) == pytest.approx(1.8946, abs=5e-5)
    assert parity.tost.t_quantile(0.5, 7) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dof", [1, 2, 5, 8])
def test_t_distribution_is_the_integral_of_its_density(parity, dof):
    scale = math.gamma((dof + 1) / 2) / (math.sqrt(dof * math.pi) * math.gamma(dof / 2))
    x = np.linspace(-1.7, 1.7, 20_001)
    assert parity.tost.t_central(1.7, dof) == pytest.approx(
        np.trapezoid(scale * (1 + x**2 / dof) ** (-(dof + 1) / 2), x), abs=1e-8
    )


@pytest.mark.parametrize("bad", [0.4, 1.0])
def test_impossible_questions_are_refused(parity, bad):
    with pytest.raises(ValueError, match="probability"):
        parity.tost.t_quantile(bad, 7)
    with pytest.raises(ValueError, match="degrees of freedom"):
        parity.tost.t_quantile(0.9, 0)


@pytest.mark.parametrize(
    ("mean", "sd", "expected"),
    [
        (0.0, 0.002, "equivalent"),
        (0.004, 0.0005, "equivalent"),
        (0.010, 0.002, "not equivalent"),
        (-0.010, 0.002, "not equivalent"),  # better by more than the margin is not the same either
        (0.005, 0.002, "inconclusive"),
        (0.0, 0.050, "inconclusive"),
    ],
)
def test_verdict_on_made_up_gaps(parity, mean, sd, expected):
    shape = np.array([-1.3, -0.9, -0.4, -0.1, 0.2, 0.5, 0.8, 1.2])
    gaps = mean + sd * (shape - shape.mean()) / shape.std(ddof=1)
    low, high = parity.tost.interval(gaps.tolist(), 0.90)
    assert (low + high) / 2 == pytest.approx(mean)
    assert (high - low) / 2 == pytest.approx(1.894579 * sd / math.sqrt(8), rel=1e-6)
    assert parity.tost.verdict(low, high, 0.005) == expected


def test_a_border_is_not_inside(parity):
    assert parity.tost.verdict(-0.005, 0.0, 0.005) == "inconclusive"
    assert parity.tost.verdict(0.0, 0.005, 0.005) == "inconclusive"


def finished(run, loss, n_steps=10):
    """A row as run.py writes it."""
    return run._asdict() | {
        "validation_loss": loss,
        "validation_tokens": 100,
        "training_losses": [5.0 - 0.1 * i for i in range(n_steps)],
        "state_bytes": 800,
        "weight_bytes": 400,
        "wall_s": 1.0,
        "cpu_s": 2.0,
        "source": {"sha256": "s"},
        "data": {"text": "d"},
    }


def simulate(parity, settings, loss_of, known):
    """All runs of an experiment whose losses are ``loss_of(run)``."""
    rows = []
    for run in parity.rows.missing(settings, rows, known):
        rows.append(finished(run, loss_of(run)))
    return rows


@pytest.fixture
def settings(parity):
    return parity.settings.load_settings(quick=False)


def test_settings_are_those_of_the_rule(settings):
    assert settings.question == {"reference": "adamw", "margin": 0.005, "confidence": 0.90}
    assert len(settings.training["seeds"]) >= 8
    assert not set(settings.training["seeds"]) & set(settings.grid["seeds"])
    assert [o.label for o in settings.with_claim()] == ["adamw", "adamw8bit", "adamw4bit"]
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert f"{settings.model_config().n_params():,} parameters" in readme


def test_order_of_runs(parity, settings):
    def loss(run):
        return 5.0 + abs(math.log10(run.learning_rate / 3e-3)) + 0.001 * run.seed

    rows = simulate(parity, settings, loss, {"adamw", "adamw8bit", "adamw4bit", "lion8bit"})
    labels = [(row["kind"], row["optimizer"], row["seed"]) for row in rows]
    assert {row["learning_rate"] for row in rows if row["kind"] == "final"} == {3e-3}
    n_grid, seeds = len(settings.grid["learning_rates"]), settings.training["seeds"]
    assert labels[3 * n_grid : 3 * n_grid + 4] == [
        ("final", "adamw", seeds[0]),
        ("final", "adamw8bit", seeds[0]),
        ("final", "adamw4bit", seeds[0]),
        ("final", "adamw", seeds[1]),
    ]
    assert labels[-1] == ("final", "lion8bit", seeds[settings.training["n_seeds_without_claim"] - 1])
    assert parity.rows.n_steps_left(settings, rows, {"adamw", "adamw8bit", "adamw4bit", "lion8bit"}) == 0
    # An optimizer that came later is all that is left, and nothing is done twice.
    later = list(parity.rows.missing(settings, rows, {o.name for o in settings.optimizers}))
    assert {run.optimizer for run in later} == {"apollo_mini", "scale_sgd"}


def test_each_verdict_from_rows(parity, settings):
    worse = {"adamw8bit": 0.001, "adamw4bit": 0.02, "lion8bit": 0.3}

    def loss(run):
        noise = 0.002 * math.sin(7 * run.seed + len(run.optimizer))
        return 5.0 * (1 + worse.get(run.optimizer, 0) + noise * (run.optimizer != "adamw"))

    rows = simulate(parity, settings, loss, {"adamw", "adamw8bit", "adamw4bit", "lion8bit"})
    found = {f["label"]: f for f in parity.analyse.results_of(settings, rows)["optimizers"]}
    assert found["adamw8bit"]["verdict"] == "equivalent"
    assert found["adamw4bit"]["verdict"] == "not equivalent"
    assert found["adamw4bit"]["mean_gap"] == pytest.approx(0.02, abs=0.002)
    assert found["lion8bit"]["verdict"] is None
    assert len(found["lion8bit"]["relative_gaps"]) == settings.training["n_seeds_without_claim"]
    assert found["adamw"]["verdict"] is None
    assert not found["scale_sgd"]["is_complete"]
    json.dumps(found, allow_nan=False)


def test_no_verdict_before_all_seeds_are_there(parity, settings):
    rows = simulate(parity, settings, lambda run: 5.0 + 0.001 * run.seed, {"adamw", "adamw8bit"})
    last = settings.training["seeds"][-1]
    rows = [row for row in rows if (row["kind"], row["optimizer"], row["seed"]) != ("final", "adamw", last)]
    found = {f["label"]: f for f in parity.analyse.results_of(settings, rows)["optimizers"]}
    assert found["adamw8bit"]["is_complete"]
    assert found["adamw8bit"]["verdict"] is None


def test_a_diverged_run_is_not_equivalent_and_no_rate_is_chosen_that_diverges(parity, settings):
    def loss(run):
        if run.optimizer == "adamw8bit" and (
            run.learning_rate > 3e-3 or run.seed == settings.training["seeds"][2]
        ):
            return None
        return 6.0 - math.log10(run.learning_rate)  # the higher the rate, the lower

    rows = simulate(parity, settings, loss, {"adamw", "adamw8bit"})
    found = {f["label"]: f for f in parity.analyse.results_of(settings, rows)["optimizers"]}
    assert found["adamw8bit"]["learning_rate"] == 3e-3
    assert found["adamw"]["at_edge_of_grid"]
    assert found["adamw8bit"]["verdict"] == "not equivalent"
    assert None in found["adamw8bit"]["losses"]


def test_torn_last_row_is_taken_away(parity, tmp_path):
    path = tmp_path / "rows.jsonl"
    parity.rows.append_row(path, {"a": 1})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"a": 2, "b"')
    assert parity.rows.read_rows(path) == [{"a": 1}]
    parity.rows.append_row(path, {"a": 3})
    assert parity.rows.read_rows(path) == [{"a": 1}, {"a": 3}]


def test_folder_of_other_settings_is_refused(parity, settings, tmp_path):
    fewer = dataclasses.replace(settings, optimizers=settings.optimizers[:3])
    parity.settings.settle(tmp_path, fewer)
    parity.settings.settle(tmp_path, settings)  # more optimizers are welcome
    with pytest.raises(SystemExit, match="scale_sgd"):
        parity.settings.settle(tmp_path, fewer)
    wider = dataclasses.replace(settings, question=settings.question | {"margin": 0.05})
    with pytest.raises(SystemExit, match="question"):
        parity.settings.settle(tmp_path, wider)


def test_sides_share_no_long_line(parity, settings):
    records = python_reference()
    data = settings.data
    held_out = parity.corpus.held_out_names(records, data["held_out_fraction"], data["split_seed"])
    lines = {True: set(), False: set()}
    n_bytes = {True: 0, False: 0}
    for record in records:
        side = record.name in held_out
        n_bytes[side] += len(record.text.encode())
        lines[side] |= {line.strip() for line in record.text.splitlines() if len(line.strip()) >= 40}
    assert lines[True].isdisjoint(lines[False])
    assert 0.1 < n_bytes[True] / sum(n_bytes.values()) <= data["held_out_fraction"]


def test_tokenizer_is_the_same_each_time(parity):
    texts = ["def f(x): return x", "an expression is evaluated, and an exception is raised"] * 3
    first, second = (parity.corpus.train_tokenizer(texts, 300).to_str() for _ in range(2))
    assert first == second
    assert parity.corpus.train_tokenizer(texts, 300).token_to_id(parity.corpus.END) == 0


def test_readme_holds_what_the_newest_result_says(parity):
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, parity.render.render(newest(FOLDER / "results"))) == readme


@pytest.mark.parametrize("label", ["adamw4bit", "adamw4bit, bfloat16 weights"])
def test_rates_and_seed_in_the_state_are_those_of_a_recipe(parity, label):
    """One compiled step for all runs does what a step compiled for one run does."""
    quick = parity.settings.load_settings(quick=True)
    optimizer = next(o for o in quick.optimizers if o.label == label)
    corpus = parity.corpus.load_corpus(quick.data)
    run = parity.rows.Run("final", label, 1e-2, seed=5)
    eval_step = make_eval_step(Decoder(quick.model_config()), mode="full")
    programs = parity.run.compile_programs(quick, optimizer)
    row = parity.run.train(quick, run, programs, corpus, eval_step, lambda: False)

    training = quick.training
    recipe = StepRecipe(
        mode="full", optimizer=optimizer.name, optimizer_options={"seed": 5}, seed=5, bfloat16=optimizer.bfloat16,
        learning_rate=make_schedule("cosine", 1e-2, steps=training["steps"], warmup=training["warmup"]),
        weight_decay=training["weight_decay"], clip_norm=training["clip_norm"], remat="none",
    )  # fmt: skip
    params = Decoder(quick.model_config()).init(jax.random.key(5))
    frozen, state = start_run(recipe, quick.model_config(), params, None)
    step, losses = make_step(recipe, quick.model_config(), None), []
    for number in range(training["steps"]):
        batch = micro_batches(corpus.train, number, 1, training["rows_per_step"], 5)
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    assert row["training_losses"] == pytest.approx(losses, rel=1e-5)
    assert min(losses) < losses[0] - 0.05  # it moved, so that the rates were not nought


@pytest.mark.slow
def test_quick_run_stops_goes_on_and_ends_in_a_table(parity, tmp_path):
    command = [sys.executable, str(FOLDER / "run.py"), "--quick", "--work", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert any(line.startswith("grid") for line in process.stdout)  # the first row is there
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
    assert process.returncode == 128 + signal.SIGINT, rest
    n_before = len(parity.rows.read_rows(tmp_path / "rows.jsonl"))
    assert n_before >= 1
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    settings = parity.settings.load_settings(quick=True)
    rows = parity.rows.read_rows(tmp_path / "rows.jsonl")
    assert len({parity.rows.run_of(row) for row in rows}) == len(rows) == 4 * (2 + 2), done.stdout
    assert len(done.stdout.splitlines()) < len(rows) + 8
    analysed = subprocess.run(
        [sys.executable, str(FOLDER / "analyse.py"), "--work", str(tmp_path)],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    result = Path(analysed.stdout.splitlines()[0])
    assert result.parent == tmp_path  # a quick result never stands among the others
    table = parity.render.render(result)
    assert table.startswith("**Made with --quick")
    assert all(f"| {optimizer.label} |" in table for optimizer in settings.optimizers)
