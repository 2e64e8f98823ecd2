"""The page of a run: ``report.html``, one file that needs nothing else to be read.

``report_html`` is a pure function of ``ReportData``; ``write_report`` puts its text into a file in one step,
so that a half-written page never replaces a whole one.
"""

import dataclasses
import html
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgejax.core.errors import RunError
from edgejax.core.units import format_bytes, format_seconds
from edgejax.measure.charts import Point, byte_bar, loss_chart
from edgejax.measure.report_style import STYLE


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """What the model says to one prompt, before training and after it."""

    prompt: str
    before: str
    after: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReportData:
    """Everything the page shows; nothing is looked up elsewhere."""

    title: str  # the model's name, as a rule
    device: str  # what the numbers were measured on, for "measured on <device>"
    started: str  # ISO 8601 date and time
    duration_s: float
    train_loss: Sequence[Point] = ()  # (step, nats per token) of every step
    held_out_loss: Sequence[
        Point
    ] = ()  # (step, nats per token) of every evaluation, step 0 = before training
    tokens_per_s: float | None = None
    peak_bytes: int | None = None  # of the process, as the operating system saw it
    memory_bytes: Mapping[str, int] = dataclasses.field(default_factory=dict)  # by source
    memory_notes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # how each source is known
    receipt: Mapping[str, str] = dataclasses.field(default_factory=dict)  # each tree as it was allocated
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    hashes: Mapping[str, str] = dataclasses.field(default_factory=dict)  # SHA-256 by what was hashed
    samples: Sequence[Sample] = ()


def report_html(run: ReportData) -> str:
    """The page as text. Every word that came from outside is escaped.

    >>> page = report_html(ReportData(title="tiny", device="a CPU", started="2026-01-01", duration_s=3.0))
    >>> page.startswith("<!doctype html>") and "measured on a CPU" in page
    True
    """
    title = html.escape(run.title)
    sections = [
        _section("Loss", loss_chart(run.train_loss, run.held_out_loss) + _held_out_table(run.held_out_loss)),
        _section("Memory by source", byte_bar(run.memory_bytes, run.memory_notes)),
        _section("Receipt", _pairs(run.receipt)),
        _section("Before and after", "".join(_sample(sample) for sample in run.samples)),
        _section("Settings", _pairs(run.settings)),
        _section("Versions and hashes", _pairs(run.versions) + _pairs(run.hashes, code=True)),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title} - edgejax run</title>'
        f"<style>{STYLE}</style></head>\n<body><main>"
        f'<header><p class="over">edgejax run</p><h1>{title}</h1>'
        f'<p class="sub">{html.escape(run.started)} &middot; {format_seconds(run.duration_s)} &middot; '
        f"measured on {html.escape(run.device)}</p></header>\n"
        f"{_cards(run)}\n{''.join(sections)}</main></body></html>\n"
    )


def write_report(path: str | os.PathLike, run: ReportData) -> Path:
    """Writes the page to ``path`` (through a neighbouring file that is renamed) and returns the path.

    Raises:
      RunError: the folder is missing or cannot be written, or the disk is full.
    """
    target = Path(path)
    part = target.with_name(target.name + ".part")
    try:
        part.write_text(report_html(run), encoding="utf-8")
        os.replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise RunError(
            f"cannot write the report {target}: {error.strerror or error}; the run itself is whole"
        ) from error
    return target


def perplexity(loss_nats: float) -> float:
    """exp(loss), infinite where it would overflow."""
    return math.exp(loss_nats) if loss_nats < 700 else math.inf


def _cards(run: ReportData) -> str:
    cards = []
    if run.held_out_loss:
        first, last = run.held_out_loss[0][1], run.held_out_loss[-1][1]
        cards.append(_card("held-out loss", f"{last:.3f}", f"was {first:.3f} nats per token"))
        cards.append(_card("held-out perplexity", f"{perplexity(last):.2f}", f"was {perplexity(first):.2f}"))
    if run.tokens_per_s is not None:
        cards.append(_card("speed", f"{run.tokens_per_s:,.0f}", "tokens per second, median of the steps"))
    if run.peak_bytes is not None:
        cards.append(_card("peak memory", format_bytes(run.peak_bytes), "resident set of the whole process"))
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def _card(name: str, value: str, note: str) -> str:
    return (
        f'<div class="card"><p class="name">{html.escape(name)}</p><p class="value">{html.escape(value)}</p>'
        f'<p class="note">{html.escape(note)}</p></div>'
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>{body}</section>\n" if body else ""


def _held_out_table(points: Sequence[Point]) -> str:
    if not points:
        return ""
    rows = "".join(
        f'<tr><td class="num">{step:,.0f}</td><td class="num">{loss:.4f}</td>'
        f'<td class="num">{perplexity(loss):.3f}</td></tr>'
        for step, loss in points
    )
    return (
        "<details><summary>held-out numbers</summary><table><thead><tr>"
        '<th class="num">step</th><th class="num">loss, nats per token</th><th class="num">perplexity</th>'
        f"</tr></thead><tbody>{rows}</tbody></table></details>"
    )


def _sample(sample: Sample) -> str:
    return (
        f'<article><p class="prompt">{html.escape(sample.prompt)}</p><div class="pair">'
        f"<div><h3>before</h3><pre>{html.escape(sample.before)}</pre></div>"
        f"<div><h3>after</h3><pre>{html.escape(sample.after)}</pre></div></div></article>"
    )


def _pairs(pairs: Mapping[str, Any], code: bool = False) -> str:
    if not pairs:
        return ""
    tag = "code" if code else "span"
    rows = "".join(
        f'<tr><th scope="row">{html.escape(str(name))}</th><td><{tag}>{html.escape(_text(value))}</{tag}></td></tr>'
        for name, value in pairs.items()
    )
    return f'<table class="pairs"><tbody>{rows}</tbody></table>'


def _text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(_text(item) for item in value) or "none"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} = {_text(item)}" for name, item in value.items()) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
