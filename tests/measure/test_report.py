"""The page of a run: it holds what it must, escapes what came from outside, and needs nothing else."""

import html.parser
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgejax.core.errors import RunError
from edgejax.measure.charts import nice_ticks, running_mean, thin_out
from edgejax.measure.report import ReportData, Sample, report_html, write_report

pytestmark = pytest.mark.quick

EVIL = "<script>alert('x')</script> & \"y\""


def run_data(**changes) -> ReportData:
    fields = dict(
        title="smollm2-135m",
        device="a test CPU, 2 cores",
        started="2026-01-02 03:04:05",
        duration_s=185.0,
        train_loss=[(1, 3.0), (2, 2.5), (3, 2.25)],
        held_out_loss=[(0, 3.0), (3, 2.0)],
        tokens_per_s=412.3,
        peak_bytes=688 * 2**20,
        memory_bytes={"weights": 3 * 2**20, "adapters": 2**20},
        memory_notes={"weights": "bytes of the arrays"},
        settings={"learning_rate": 3e-4, "rslora": False, "resume": None, "targets": ("q_proj", "k_proj")},
        versions={"jax": "0.10.2"},
        hashes={"model": "bcc81830"},
        samples=[Sample(prompt="The with statement", before="was this", after="is that")],
    )
    return ReportData(**(fields | changes))


class Outline(html.parser.HTMLParser):
    """Collects tags and attributes, and fails on a tag that closes what is not open."""

    VOID = frozenset({"meta", "path", "br", "hr", "img", "link", "input"})

    def __init__(self):
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict]] = []

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parser = Outline()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_page_says_everything_it_was_given():
    page = report_html(run_data())
    for text in (
        "measured on a test CPU, 2 cores", "3 min 05 s", "2.000", f"{math.e**3:.2f}", f"{math.e**2:.2f}", "412",
        "688.0 MiB", "3.00 MiB", "75.0%", "4.00 MiB", "bytes of the arrays", "0.0003", "q_proj, k_proj", "0.10.2",
        "bcc81830", "The with statement", "was this", "is that",
    ):  # fmt: skip
        assert text in page, text


def test_page_is_well_formed_and_needs_nothing_from_elsewhere():
    page = outline(report_html(run_data()))
    tags = {tag for tag, _ in page.seen}
    assert not tags & {"script", "link", "img", "iframe", "object"}
    for _, attributes in page.seen:
        assert not {"src", "href", "srcset"} & set(attributes)
        assert not any(name.startswith("on") for name in attributes)
    assert "url(" not in report_html(run_data())
    assert "http" not in report_html(run_data())
    assert "prefers-color-scheme:dark" in report_html(run_data())
    assert ("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}) in page.seen


@pytest.mark.parametrize(
    "changes",
    [
        {"title": EVIL},
        {"device": EVIL},
        {"started": EVIL},
        {"memory_bytes": {EVIL: 5}, "memory_notes": {EVIL: EVIL}},
        {"settings": {EVIL: EVIL}},
        {"settings": {"targets": [EVIL]}},
        {"versions": {EVIL: EVIL}},
        {"hashes": {EVIL: EVIL}},
        {"samples": [Sample(prompt=EVIL, before=EVIL, after=EVIL)]},
    ],
)
def test_text_from_outside_is_escaped(changes):
    page = report_html(run_data(**changes))
    assert "<script" not in page
    assert "&lt;script&gt;" in page
    outline(page)


def test_curve_has_one_vertex_a_step_and_one_dot_an_evaluation():
    page = outline(report_html(run_data()))
    raw = next(a["d"] for tag, a in page.seen if tag == "path" and a["class"] == "raw")
    assert len(re.findall(r"[ML]", raw)) == 3
    # x: the axis runs from step 0 to 3; y falls as the loss falls (SVG counts downwards).
    xs, ys = zip(*((float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", raw)), strict=True)
    assert xs == pytest.approx((100 / 3, 200 / 3, 100), abs=0.01)
    assert list(ys) == sorted(ys)
    assert [a["title"] for tag, a in page.seen if tag == "i"] == ["step 0: 3.0000", "step 3: 2.0000"]


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "none"), (True, "yes"), (3e-4, "0.0003"), (12, "12"), ((), "none"), (("a", 0.5), "a, 0.5"),
        ({}, "none"), ({"b2": 0.95, "nesterov": False}, "b2 = 0.95, nesterov = no"),
    ],
)  # fmt: skip
def test_settings_read_as_a_person_writes_them(value, text):
    assert f"<span>{text}</span>" in report_html(run_data(settings={"x": value}))


def test_bar_is_in_proportion():
    page = outline(report_html(run_data()))
    rects = [a for tag, a in page.seen if tag == "rect"]
    assert [float(a["width"]) for a in rects] == [75.0, 25.0]
    assert [float(a["x"]) for a in rects] == [0.0, 75.0]


@pytest.mark.parametrize("losses", [[], [(1, math.nan)], [(1, 2.0)], [(1, 2.0), (2, math.inf), (3, 2.0)]])
def test_odd_curves_still_make_a_page(losses):
    page = report_html(run_data(train_loss=losses, held_out_loss=[]))
    outline(page)
    assert ("not drawn" in page) == any(not math.isfinite(y) for _, y in losses[1:])
    assert "nan" not in re.findall(r'd="[^"]*"', page).__str__()


def test_a_bare_run_makes_a_page_without_empty_sections():
    page = report_html(ReportData(title="t", device="d", started="s", duration_s=1.0))
    outline(page)
    assert "Settings" not in page
    assert "Before and after" not in page


def test_write_replaces_whole_files_only(tmp_path):
    target = tmp_path / "report.html"
    target.write_text("old")
    assert write_report(target, run_data()) == target
    assert target.read_text(encoding="utf-8") == report_html(run_data())
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_write_names_what_it_could_not_write(tmp_path):
    with pytest.raises(RunError, match=r"missing.report\.html"):
        write_report(tmp_path / "missing" / "report.html", run_data())


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_are_inside_even_and_a_handful(low, length):
    high = low + length
    ticks = nice_ticks(low, high)
    room = 1e-6 * max(abs(low), abs(high), length)
    assert all(low - room <= t <= high + room for t in ticks)
    assert len(ticks) <= 7
    assert ticks == sorted(set(ticks))


def test_thinning_keeps_the_mean_and_short_series_are_kept():
    points = [(float(i), float(i % 7)) for i in range(1200)]
    thin = thin_out(points)
    assert len(thin) == 600
    assert sum(y for _, y in thin) / 600 == pytest.approx(sum(y for _, y in points) / 1200)
    assert thin_out(points[:600]) == points[:600]


def test_running_mean_of_a_constant_is_the_constant():
    assert [y for _, y in running_mean([(k, 2.5) for k in range(5)])] == pytest.approx([2.5] * 5)
