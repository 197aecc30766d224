"""Small SVG charts for pages: a loss curve, paired bars, changes with their intervals.

They take their colours from the page's CSS variables, so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape


def loss_curve(
    points: Sequence[tuple[float, float]], *, width: int = 720, height: int = 240
) -> str:
    """Loss over trained tokens: every step faint, a running mean strong. points: (tokens, loss)."""
    points = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    if len(points) < 2:
        return ""
    left, right, top, bottom = 44, 14, 12, 30
    top_x = max(x for x, _ in points)
    ticks_y = ticks(0.0, max(y for _, y in points), 4)
    ticks_x = ticks(0.0, top_x, 5)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + (width - left - right) * x / (top_x or 1),
            height - bottom - (height - top - bottom) * y / (ticks_y[-1] or 1),
        )

    def line(kind: str, pairs: Sequence[tuple[float, float]]) -> str:
        dots = " ".join("{:.1f},{:.1f}".format(*place(x, y)) for x, y in pairs)
        return f'<polyline class="{kind}" points="{dots}"/>'

    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss curve">']
    for y in ticks_y:
        _, at = place(0, y)
        parts.append(f'<line class="grid" x1="{left}" x2="{width - right}" y1="{at}" y2="{at}"/>')
        parts.append(f'<text x="{left - 8}" y="{at + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in ticks_x:
        if x <= top_x:
            at, _ = place(x, 0)
            label = f"{x / 1000:g}k" if x >= 1000 else f"{x:g}"
            parts.append(f'<text x="{at:.1f}" y="{height - 8}" text-anchor="middle">{label}</text>')
    parts += [line("raw", points), line("mean", _running_mean(points)), "</svg>"]
    return "".join(parts)


def power_law(
    points: Sequence[tuple[float, float]],
    alpha: float,
    c0: float,
    *,
    width: int = 720,
    height: int = 320,
) -> str:
    """Loss against compute, both in logarithms, with the fitted line. points: (compute, loss)."""
    left, right, top, bottom = 54, 20, 14, 34
    xs, ys = ([math.log10(point[axis]) for point in points] for axis in (0, 1))
    law = [alpha * (math.log10(c0) - x) for x in (min(xs), max(xs))]
    low, high = min(*ys, *law), max(*ys, *law)

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - min(xs)) / ((max(xs) - min(xs)) or 1)
        up = (y - low) / ((high - low) or 1)
        return left + (width - left - right) * across, height - bottom - (
            height - top - bottom
        ) * up

    ends = " ".join(
        "{:.1f},{:.1f}".format(*place(x, y)) for x, y in zip((min(xs), max(xs)), law, strict=True)
    )
    parts = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="loss against compute">']
    parts.append(f'<polyline class="mean" points="{ends}"/>')
    for (compute, loss), x, y in zip(points, xs, ys, strict=True):
        across, up = place(x, y)
        parts.append(f'<circle cx="{across:.1f}" cy="{up:.1f}" r="4" fill="currentColor"/>')
        parts.append(f'<text x="{left - 8}" y="{up + 4:.1f}" text-anchor="end">{loss:.2f}</text>')
        parts.append(
            f'<text x="{across:.1f}" y="{height - 8}" text-anchor="middle">{compute:.1e}</text>'
        )
    return "".join([*parts, "</svg>"])


def bars(before: float, after: float, labels: tuple[str, str], *, width: int = 320) -> str:
    """Two bars, one above the other, on one scale; labels stand at their ends."""
    top = max(before, after) or 1.0
    room = width - 84
    parts = [f'<svg viewBox="0 0 {width} 40" role="img" aria-label="{escape(" → ".join(labels))}">']
    for kind, value, label, y in (
        ("before", before, labels[0], 2),
        ("after", after, labels[1], 22),
    ):
        long = max(room * value / top, 2)
        parts.append(f'<rect class="{kind}" x="0" y="{y}" rx="3" width="{long:.1f}" height="16"/>')
        parts.append(f'<text x="{long + 7:.1f}" y="{y + 12.5}">{escape(label)}</text>')
    return "".join([*parts, "</svg>"])


def change(
    value: float, low: float, high: float, limit: float, *, up: bool = False, width: int = 320
) -> str:
    """A change with its interval, around «no change»; a dashed line at the limit. up: more is better,
    so the limit is a least."""
    reach = 1.15 * max(abs(low), abs(high), abs(limit), 0.01)

    def at(x: float) -> float:
        return width / 2 + (width / 2 - 8) * x / reach

    kind = "bad" if limit and (value < limit if up else value > limit) else "good"
    return (
        f'<svg viewBox="0 0 {width} 34" role="img" aria-label="{100 * value:+.1f} %">'
        f'<line class="grid" x1="0" x2="{width}" y1="17" y2="17"/>'
        f'<line class="axis" x1="{at(0):.1f}" x2="{at(0):.1f}" y1="4" y2="30"/>'
        + (
            f'<line class="limit" x1="{at(limit):.1f}" x2="{at(limit):.1f}" y1="4" y2="30"/>'
            if limit
            else ""
        )
        + f'<line class="{kind} whisker" x1="{at(low):.1f}" x2="{at(high):.1f}" y1="17" y2="17"/>'
        f'<circle class="{kind}" cx="{at(value):.1f}" cy="17" r="5.5"/></svg>'
    )


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round steps that cover low to high.

    >>> ticks(0, 3.7, 4)
    [0.0, 1.0, 2.0, 3.0, 4.0]
    """
    span = (high - low) or 1.0
    size = 10.0 ** math.floor(math.log10(span / count))
    step = next(size * k for k in (1, 2, 2.5, 5, 10) if span / (size * k) <= count + 1e-9)
    number = math.ceil(span / step - 1e-9)
    return [round(low + i * step, 10) for i in range(number + 1)]


def _running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Mean over the points around each: a window of a tenth of the run."""
    half = max(len(points) // 20, 1)
    means = []
    for i, (x, _) in enumerate(points):
        around = [y for _, y in points[max(i - half, 0) : i + half + 1]]
        means.append((x, sum(around) / len(around)))
    return means
