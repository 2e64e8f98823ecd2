"""Small charts as HTML with inline SVG: no script, no font and no picture from anywhere else.

Lines are SVG stretched over the whole width (``preserveAspectRatio="none"`` with strokes that do not scale);
labels and points are HTML placed by percentages, so that text keeps its size on a phone.
"""

import html
import math
from collections.abc import Mapping, Sequence

from edgejax.core.units import format_bytes

Point = tuple[float, float]
_MAX_LINE_POINTS = 600  # more than a screen has columns for; a longer series is averaged in buckets


def nice_ticks(low: float, high: float, n_wanted: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten apart) inside ``[low, high]``, about ``n_wanted`` of them.

    >>> nice_ticks(0.0, 100.0)
    [0.0, 20.0, 40.0, 60.0, 80.0, 100.0]
    """
    if not high > low:
        return [low]
    rough = (high - low) / n_wanted
    magnitude = 10.0 ** math.floor(math.log10(rough))
    step = next(m * magnitude for m in (1, 2, 5, 10) if m * magnitude >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    digits = max(0, -math.floor(math.log10(step)))
    return [round(k * step, digits) for k in range(first, last + 1)]


def thin_out(points: Sequence[Point], n_max: int = _MAX_LINE_POINTS) -> list[Point]:
    """At most ``n_max`` points: the means of equal runs of ``points``; unchanged when there are few.

    >>> thin_out([(0, 1.0), (1, 3.0), (2, 5.0), (3, 7.0)], n_max=2)
    [(0.5, 2.0), (2.5, 6.0)]
    """
    if len(points) <= n_max:
        return list(points)
    size = math.ceil(len(points) / n_max)
    runs = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]


def running_mean(points: Sequence[Point], weight: float = 0.9) -> list[Point]:
    """Exponential mean of y, corrected for its start (Kingma & Ba 2015, section 3), for eyes only."""
    mean, out = 0.0, []
    for k, (x, y) in enumerate(points, start=1):
        mean = weight * mean + (1.0 - weight) * y
        out.append((x, mean / (1.0 - weight**k)))
    return out


def loss_chart(train: Sequence[Point], held_out: Sequence[Point]) -> str:
    """Train loss per step as a line (faint: as it was; strong: its running mean), held-out losses as points.

    Args:
      train: (step, nats per token) of every step.
      held_out: (step, nats per token) of every evaluation.

    Returns: an HTML ``<figure>``; points that are not finite are left out and counted in the caption.
    """
    finite_train = [p for p in train if math.isfinite(p[1])]
    finite_held = [p for p in held_out if math.isfinite(p[1])]
    n_dropped = len(train) + len(held_out) - len(finite_train) - len(finite_held)
    points = finite_train + finite_held
    if not points:
        return "<figure><figcaption>No finite loss was recorded.</figcaption></figure>"
    x_low, x_high = _padded([x for x, _ in points], 0.0)
    y_low, y_high = _padded([y for _, y in points], 0.06)

    def left(x: float) -> float:
        return 100.0 * (x - x_low) / (x_high - x_low)

    def top(y: float) -> float:
        return 100.0 * (y_high - y) / (y_high - y_low)

    def path(series: Sequence[Point]) -> str:
        return " ".join(f"{'ML'[k > 0]}{left(x):.2f} {top(y):.2f}" for k, (x, y) in enumerate(series))

    y_ticks = nice_ticks(y_low, y_high)
    x_ticks = [x for x in nice_ticks(x_low, x_high) if x == int(x)]
    grid = " ".join(f"M0 {top(y):.2f}H100" for y in y_ticks)
    lines = [f'<path class="grid" d="{grid}"/>']
    if finite_train:
        lines.append(f'<path class="raw" d="{path(thin_out(finite_train))}"/>')
        lines.append(f'<path class="mean" d="{path(thin_out(running_mean(finite_train)))}"/>')
    if len(finite_held) > 1:
        lines.append(f'<path class="held" d="{path(finite_held)}"/>')
    labels = [f'<span class="ty" style="top:{top(y):.2f}%">{y:g}</span>' for y in y_ticks]
    labels += [f'<span class="tx" style="left:{left(x):.2f}%">{x:,.0f}</span>' for x in x_ticks]
    dots = [
        f'<i style="left:{left(x):.2f}%;top:{top(y):.2f}%" title="step {x:.0f}: {y:.4f}"></i>'
        for x, y in finite_held
    ]
    dropped = f" {n_dropped} values were not finite and are not drawn." if n_dropped else ""
    if len(finite_train) > _MAX_LINE_POINTS:
        dropped += (
            f" Each drawn point is the mean of {math.ceil(len(finite_train) / _MAX_LINE_POINTS)} steps."
        )
    summary = f"Loss in nats per token over {len(train)} steps, {len(held_out)} held-out evaluations."
    return (
        f'<figure><div class="key"><span class="k-train">train, each step and running mean</span>'
        f'<span class="k-held">held-out</span></div>'
        f'<div class="plot" role="img" aria-label="{html.escape(summary)}">'
        f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{"".join(lines)}</svg>'
        f"{''.join(labels)}{''.join(dots)}</div>"
        f"<figcaption>{summary} Horizontal: optimizer steps.{dropped}</figcaption></figure>"
    )


def byte_bar(parts: Mapping[str, int], notes: Mapping[str, str]) -> str:
    """One bar of labelled parts, widths in proportion to their bytes, and a table that says the numbers.

    Args:
      parts: bytes of each part, in the order they are drawn; none may be negative.
      notes: how each part is known, by the same names.
    """
    total = sum(parts.values())
    if total <= 0:
        return "<p>No memory was recorded.</p>"
    x, rects, rows = 0.0, [], []
    for k, (name, n_bytes) in enumerate(parts.items()):
        share = 100.0 * n_bytes / total
        title = html.escape(f"{name}: {format_bytes(n_bytes)}")
        rects.append(
            f'<rect class="p{k % 6}" x="{x:.3f}" y="0" width="{share:.3f}" height="10"><title>{title}</title></rect>'
        )
        rows.append(
            f'<tr><th scope="row"><span class="swatch p{k % 6}"></span>{html.escape(name)}'
            f"<small>{html.escape(notes.get(name, ''))}</small></th>"
            f'<td class="num">{format_bytes(n_bytes)}</td><td class="num">{share:.1f}%</td></tr>'
        )
        x += share
    label = html.escape(", ".join(f"{name} {format_bytes(n)}" for name, n in parts.items()))
    return (
        f'<svg class="bar" viewBox="0 0 100 10" preserveAspectRatio="none" role="img" aria-label="{label}">'
        f'{"".join(rects)}</svg><table class="parts"><thead><tr><th>source</th><th class="num">bytes</th>'
        f'<th class="num">share</th></tr></thead><tbody>{"".join(rows)}</tbody>'
        f'<tfoot><tr><th scope="row">total</th><td class="num">{format_bytes(total)}</td><td></td></tr>'
        "</tfoot></table>"
    )


def _padded(values: Sequence[float], margin: float) -> tuple[float, float]:
    """Ends of an axis around ``values``, never of zero length."""
    low, high = min(values), max(values)
    room = (high - low) * margin if high > low else max(abs(low) * 0.1, 0.5)
    return low - room, high + room
