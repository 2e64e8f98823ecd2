"""The README's numbers are those of the newest result file."""

import importlib.util
from pathlib import Path

import pytest

from edgejax.measure.tables import newest, with_table

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "experiments" / "first_run" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_what_the_newest_result_says(render):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme, render.render(newest(render.RESULTS))) == readme


def test_a_changed_number_is_noticed(render):
    numbers = render.render(newest(render.RESULTS))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(readme.replace("tokens/s", "tokens/h"), numbers) != readme.replace(
        "tokens/s", "tokens/h"
    )
    assert "tokens/s" in numbers
    with pytest.raises(ValueError, match="has no <!-- numbers --> followed by"):
        with_table("a <!-- /numbers --><!-- numbers --> z", numbers)
