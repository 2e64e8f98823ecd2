"""The README's tables are the newest results', and these were reached with the constants that are in use."""

import importlib.util
import json
from pathlib import Path

from edgejax.devices import parse_budget
from edgejax.measure.tables import newest
from edgejax.plan import process

FOLDER = Path(__file__).resolve().parents[2] / "experiments" / "memory_forecast"


def _module(name: str):
    spec = importlib.util.spec_from_file_location(f"memory_forecast_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_readme_has_the_tables_of_the_newest_results():
    render = _module("render")
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert render.with_tables(readme) == readme


def test_the_constants_are_those_that_were_judged():
    analyse = _module("analyse")
    record = json.loads(newest(FOLDER / "results").read_text(encoding="utf-8"))
    for name, value in record["config"].items():
        assert getattr(process, name) == value, f"{name} changed: run experiments/memory_forecast again"
    found = record["results"]
    assert analyse.analyse(found["rows"]) == {name: found[name] for name in found if name != "rows"}
    assert found["n_settings"] >= 24
    assert found["median_error"] <= 0.03
    assert found["worst_error"] <= 0.08
    assert found["n_ended_within"] == found["n_limited"] == found["n_settings"]


def test_runs_stayed_within_the_memory_that_they_were_given():
    record = json.loads(newest(FOLDER / "budgets").read_text(encoding="utf-8"))
    rows = record["results"]["rows"]
    assert [row["amount"] for row in rows] == ["450MB", "600MB", "1GB", "2GB"]
    for row in rows:
        assert row["exit_status"] == 0
        assert row["largest_process_bytes"] <= parse_budget(row["amount"])
        fastest = row["settings"]["remat"] == "none" and not row["settings"]["small_code"]
        assert fastest or row["peak_rss_bytes"] >= 0.7 * parse_budget(row["amount"])
