"""The Python example of the README, run as it is written but for a smaller model, text and number of steps."""

import re
from pathlib import Path

from helpers.tiny_model import write_tiny_model

README = Path(__file__).resolve().parents[2] / "README.md"


def example() -> str:
    return re.search(r"^```python\n(.*?)^```", README.read_text(encoding="utf-8"), re.M | re.S)[1]


def test_example_is_short():
    assert len(example().strip().splitlines()) <= 12


def test_example_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_tiny_model(tmp_path / "model")
    texts = [f"Topic {n}: " + "the with statement wraps a block. " * 20 for n in range(10)]
    (tmp_path / "texts").mkdir()
    for n, text in enumerate(texts):
        (tmp_path / "texts" / f"{n}.txt").write_text(text)
    code = example()
    for written, stand_in in [
        ('"smollm2-135m"', '"model"'),
        ('"python-reference"', '"texts"'),
        ("seq_length=512", "seq_length=64"),
        ("steps=60", "steps=3"),
        ("max_tokens=40", "max_tokens=8"),
    ]:
        assert code.count(written) == 1, f"the example does not say {written} once"
        code = code.replace(written, stand_in)
    names: dict = {}
    exec(compile(code, "README.md", "exec"), names)
    assert "->" in capsys.readouterr().out
    assert names["run"].steps == 3
    assert names["run"].held_out_after.loss != names["run"].held_out_before.loss
    assert (tmp_path / "runs" / "first" / "result.json").exists()
    assert (tmp_path / "first-adapter" / "adapter_model.safetensors").exists()
