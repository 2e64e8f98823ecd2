"""``edgejax plan`` for this machine, an amount of memory and a phone."""

import json
import re
import xml.etree.ElementTree
from pathlib import Path

import pytest

from edgejax.cli import host_plan
from edgejax.cli import main as program
from edgejax.cli.host_plan import find_place
from edgejax.core.errors import ConfigError

MB = 10**6


@pytest.fixture
def planned(monkeypatch, tmp_path, capsys):
    """Runs ``edgejax plan`` with made-up footprints, and gives what it printed and which dry runs it asked for."""
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))
    asked = []

    def dry_run_of(options, limit_bytes=None, environment=None):
        assert environment["JAX_PLATFORMS"] == "cpu"  # whose memory it is, wherever JAX computes
        kept = Path(environment["JAX_COMPILATION_CACHE_DIR"])
        assert not list(kept.iterdir())  # what compiling takes is not known of a program that was kept
        (kept / "program").touch()
        asked.append(options)
        if options["schedule"] == "whole" and options["boundaries"] == "int8":
            raise ConfigError("it went wrong")
        kept = {"none": 400, "mlp": 100, "full": 90}[options["remat"]] * options["seq"] // 512 * MB
        found = {
            "peak_bytes": 300 * MB + kept, "running_bytes": 300 * MB + kept, "compiling_bytes": 200 * MB,
            "uncertain_bytes": 9 * MB, "floor_bytes": 250 * MB, "sources_bytes": {"trees": 300 * MB, "the step itself": kept},
            "bytes_per_parameter": 16, "remark": "",
            "xla": {"argument_bytes": 1, "output_bytes": 1, "alias_bytes": 1, "temp_bytes": kept, "generated_code_bytes": 0},
        }  # fmt: skip
        return found, False  # which a plan does not mind

    monkeypatch.setattr(host_plan, "dry_run_of", dry_run_of)

    def plan(*words):
        asked.clear()
        code = program.main(["plan", "--model", "smollm2-360m", *words])
        return code, capsys.readouterr(), list(asked)

    return plan


@pytest.mark.quick
def test_a_plan_for_an_amount(planned):
    code, said, asked = planned("--device", "430MB")
    assert code == 0
    assert [(o["schedule"], o["seq"]) for o in asked] == [
        *[("whole", 512)] * 4, ("whole", 1024), *[("streamed", 1024)] * 3,  # only where nothing else fits
    ]  # fmt: skip
    assert {options["model"] for options in asked} == {"shape:smollm2-360m"}  # nothing is fetched for a plan
    assert {(options["sample_tokens"], options["base"]) for options in asked} == {(0, "int4")}
    assert "smollm2-360m on this machine: 410.1 MiB of memory" in said.out
    assert "-> 381.5 MiB  speed 0.79" in said.out
    assert " x 667.6 MiB" in said.out
    assert "it went wrong" in said.out
    assert "--memory 430MB" in said.out
    code, said, asked = planned("--device", "430MB", "--json")
    assert [(o["schedule"], o["boundaries"]) for o in asked] == [("whole", "int8")]  # the rest was kept
    plan = json.loads(said.out)
    assert plan["chosen"]["settings"]["remat"] == "mlp"
    assert plan["budget_bytes"] == 430 * MB
    assert plan["chosen"]["needed_bytes"] == 409 * MB
    assert {"peak_bytes", "sources_bytes", "fits"} <= set(plan["candidates"][0])


@pytest.mark.quick
def test_a_picture(planned, tmp_path, capsys):
    page = tmp_path / "plan.html"
    code, _, _ = planned("--device", "430MB", "--picture", str(page))
    assert code == 0
    text = page.read_text()
    parsed = xml.etree.ElementTree.fromstring(re.search(r"<svg.*?</svg>", text)[0])
    drawn = list(parsed.iter("rect"))
    widths = [float(part.get("width")) for part in drawn]
    assert len({part.get("class") for part in drawn}) == len(drawn)  # a colour each
    assert sum(widths) == pytest.approx(
        100 * 400 / 700, abs=0.1
    )  # the longest is 700 MB, and drawn to its end
    assert text.count("<svg") == 3
    assert text.count(", chosen") == 1
    assert "Rows of 1024 do not fit" in text
    assert "http" not in text  # nothing from anywhere else
    code, said, _ = planned("--device", "430MB", "--picture", str(tmp_path / "none" / "plan.html"))
    assert code == 2
    assert "cannot write the picture" in said.err


@pytest.mark.quick
def test_nothing_fits(planned):
    code, said, _ = planned("--device", "300MB")
    assert code == 2
    assert "Nothing fits" in said.out
    assert "What no setting goes below is 238.4 MiB" in said.out


@pytest.mark.quick
def test_all_parameters(planned):
    code, said, asked = planned("--device", "2GB", "--full")
    assert code == 0
    tried = sorted(options["optimizer"] for options in asked[:4])  # by two threads
    assert tried == ["adamw", "adamw4bit", "adamw4bit", "adamw8bit"]
    assert not any(
        {"rank", "sample_tokens"} & set(options) for options in asked
    )  # the sample may be the most
    assert "--mode full" in said.out


@pytest.mark.quick
def test_places(monkeypatch):
    assert find_place("rtx3060") is None
    phone = find_place("Pixel 7")
    assert phone.memory_bytes == round(1.2 * 2**30)
    assert "stands in for the phone; an app gets 1.20 GiB to 1.20 GiB there, as reported" in phone.evidence
    assert "by the share of its memory that apps got on others" in find_place("pixel8").evidence
    here = find_place("this")
    assert here.memory_bytes > 0
    assert find_place("1GiB").memory_bytes == 2**30
    with pytest.raises(ConfigError, match="is a chip"):
        find_place("Snapdragon 778G")


def test_a_plan_by_the_real_compiler(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("EDGEJAX_CACHE", str(tmp_path))
    words = ["plan", "--device", "500MB", "--model", "tiny", "--seq", "64", "--base", "int8", "--json"]
    assert program.main(words) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["failed"] == {}
    assert plan["chosen"]["settings"]["remat"] == "none"
    assert len(plan["candidates"]) == 4
    for candidate in plan["candidates"]:
        assert 100 * MB < candidate["sources_bytes"]["Python, JAX and data"] < 430 * MB
        assert candidate["compiling_bytes"] > candidate["sources_bytes"]["Python, JAX and data"]
