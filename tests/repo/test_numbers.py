"""The README's numbers are those of the newest result file."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def render():
    spec = importlib.util.spec_from_file_location("render", ROOT / "experiments" / "first_run" / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_readme_holds_what_the_newest_result_says(render):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert render.with_numbers(readme, render.render(render.newest())) == readme


def test_a_changed_number_is_noticed(render):
    numbers = render.render(render.newest())
    assert render.with_numbers(f"a {render.BEGIN} 1 {render.END} z", numbers).count(numbers) == 1
    assert "tokens/s" in numbers
