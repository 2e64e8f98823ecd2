"""A plan as a page: for each setting its bytes by source against what there is. One file that needs nothing else."""

import html
import os
from pathlib import Path

from edgejax.core.errors import RunError
from edgejax.core.units import format_bytes
from edgejax.measure.report_style import STYLE
from edgejax.plan.search import Option, Plan

_COLOURS = 10  # six of the style sheet and four of its own, in turn; a plan has at most ten sources
_STYLE = """
:root{--c6:#b0413e;--c7:#0f8b9d;--c8:#c9a227;--c9:#d77fa1}
.p6{fill:var(--c6)}.p7{fill:var(--c7)}.p8{fill:var(--c8)}.p9{fill:var(--c9)}
.scale{position:relative;margin:.35rem 0 .9rem}.scale svg{display:block;width:100%;height:1.6rem;border-radius:4px}
.limit{stroke:var(--ink);stroke-width:2;vector-effect:non-scaling-stroke}.all{fill:var(--line)}
.key span::before{width:.75rem;height:.75rem;border-radius:3px;background:var(--c)}
"""


def plan_html(plan: Plan) -> str:
    """The page as text. Every word that came from outside is escaped.

    A bar ends where the setting's memory does, and a line stands where the budget ends; bars that would be three times as
    long are cut there.
    """
    options = [*plan.fitting(), *plan.too_large()]
    largest = max((option.footprint.peak_bytes for option in options), default=0)
    scale = min(max(largest, plan.memory_bytes), 3 * plan.memory_bytes)
    names = list(dict.fromkeys(name for option in options for name in option.footprint.sources))
    key = "".join(
        f'<span style="--c:var(--c{number % _COLOURS})">{html.escape(name)}</span>'
        for number, name in enumerate(names)
    )
    reserve = f" less {format_bytes(plan.reserve_bytes)} in reserve" if plan.reserve_bytes else ""
    title = html.escape(f"{plan.model} on {plan.device}")
    bars = "".join(_bar(plan, option, names, scale) for option in options)
    failed = "".join(
        f"<p><code>{html.escape(settings)}</code>: {html.escape(why)}</p>"
        for settings, why in plan.failed.items()
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>{title} - edgejax plan</title>'
        f"<style>{STYLE}{_STYLE}</style></head>\n<body><main>"
        f'<header><p class="over">edgejax plan</p><h1>{title}</h1><p class="sub">{format_bytes(plan.memory_bytes)} of '
        f"memory{reserve}, up to the line. Bytes: {html.escape(plan.evidence)}. Speed: calculated "
        f"from operations.</p></header>\n<section><div class='key'>{key}</div>{bars}{failed}</section>\n"
        f"{_longer(plan)}</main></body></html>\n"
    )


def _bar(plan: Plan, option: Option, names: list[str], scale: int) -> str:
    found = option.footprint
    fits = found.needed_bytes <= plan.budget_bytes
    state = "chosen" if option is plan.chosen else "fits" if fits else "does not fit"
    x, parts = 0.0, []
    for name, size in found.sources.items():
        width = 100 * size / scale
        parts.append(
            f'<rect class="p{names.index(name) % _COLOURS}" x="{x:.3f}" y="1" width="{width:.3f}" height="8">'
            f"<title>{html.escape(name)}: {format_bytes(size)}</title></rect>"
        )
        x += width
    if found.compiling_bytes > found.running_bytes:
        width = 100 * found.compiling_bytes / scale - x
        parts.append(
            f'<rect class="all" x="{x:.3f}" y="3" width="{width:.3f}" height="4"><title>while compiling: '
            f"{format_bytes(found.compiling_bytes)}</title></rect>"
        )
    limit = 100 * plan.budget_bytes / scale
    label = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.sources.items())
    return (
        f"<div><code>{html.escape(option.candidate.describe())}</code> <small>{format_bytes(found.peak_bytes)}, "
        f"speed {option.relative_speed:.2f}, {state}</small><div class='scale'>"
        f'<svg viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{html.escape(label)}">'
        f'{"".join(parts)}<path class="limit" d="M{limit:.3f} 0V10"/></svg></div></div>'
    )


def _longer(plan: Plan) -> str:
    if plan.longer is None:
        return ""
    options = [*plan.longer.fitting(), *plan.longer.too_large()]
    rows = "".join(
        f"<tr><td><code>{html.escape(option.candidate.describe())}</code></td>"
        f'<td class="num">{format_bytes(option.footprint.peak_bytes)}</td></tr>'
        for option in options
    )
    seq = plan.longer.options[0].candidate.seq
    verdict = "fit" if plan.longer.chosen is not None else "do not fit"
    return f"<section><h2>Rows of {seq} {verdict}</h2><table><tbody>{rows}</tbody></table></section>\n"


def write_picture(path: str | os.PathLike, plan: Plan) -> Path:
    """Writes the page and returns its path.

    Raises:
      RunError: it cannot be written.
    """
    target = Path(path)
    try:
        target.write_text(plan_html(plan), encoding="utf-8")
    except OSError as error:
        raise RunError(f"cannot write the picture {target}: {error.strerror or error}") from error
    return target
