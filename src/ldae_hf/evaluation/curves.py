"""Curves as SVG that a page can hold: text is text, colours are the page's, and long runs are thinned."""

import json
import math
from collections.abc import Sequence
from statistics import median

from .html_text import text


Point = tuple[float, float | None]  # step and value; None where the value is not finite

WIDTH, HEIGHT = 360, 196  # in units of which a phone shows about one per pixel
LEFT, RIGHT, TOP, BOTTOM = 48, 344, 18, 160
BINS = 1000  # of steps, in each of which a long run keeps two points
TREND_BINS = 120  # of steps, in each of which a long run shows its median


def thinned(points: Sequence[Point], bins: int = BINS) -> list[Point]:
    """At most two points, the lowest and the highest, for each of so many bins of steps; a bin without a finite value
    keeps one point without. A spike stays, however narrow."""
    if len(points) <= 2 * bins:
        return list(points)
    first, span = points[0][0], points[-1][0] - points[0][0]
    kept, members, number = [], [], 0

    def keep() -> None:
        finite = [point for point in members if point[1] is not None]
        if finite:
            ends = {min(finite, key=lambda point: point[1]), max(finite, key=lambda point: point[1])}
            kept.extend(sorted(ends))
        else:
            kept.extend(members[:1])

    for point in points:
        place = min(bins - 1, int((point[0] - first) * bins / (span or 1)))
        if place != number:
            keep()
            members, number = [], place
        members.append(point)
    keep()
    return kept


def trend(points: Sequence[Point], bins: int = TREND_BINS) -> list[Point]:
    """The medians of so many bins of steps, in their middles, where points are so many that a curve is a band."""
    if len(points) < 4 * bins:
        return []
    first, width = points[0][0], (points[-1][0] - points[0][0]) / bins or 1
    values = {}
    for step, value in points:
        if value is not None:
            values.setdefault(min(bins - 1, int((step - first) / width)), []).append(value)
    return [(first + (place + 0.5) * width, median(found)) for place, found in values.items()]


def is_logarithmic(values: Sequence[float]) -> bool:
    """Whether values are read better on a logarithmic axis: all positive, and the largest ten times the smallest."""
    return bool(values) and min(values) > 0 and max(values) > 10 * min(values)


def linear_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers from `low` to `high`, at most so many."""
    if high <= low:
        return [low]
    size = 10.0 ** math.floor(math.log10((high - low) / most))
    size *= next(step for step in (1, 2, 5, 10, 20) if (high - low) / (size * step) < most)
    return [place * size for place in range(math.ceil(low / size), math.floor(high / size) + 1)]


def logarithmic_ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Powers of ten from `low` to `high`, at most so many; with their doubles and fives where they are few."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    inside = [decade for decade in decades if low <= 10.0**decade <= high]
    if len(inside) >= 3:
        return [10.0**decade for decade in inside[:: -(-len(inside) // most)]]
    ticks = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
    return [tick for tick in ticks if low <= tick <= high]


def short(value: float) -> str:
    """A number for an axis: 0.002, 1,500, 120k, 1.5M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.4g}{letter}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def curve_svg(
    name: str,
    points: Sequence[Point],
    last_step: float,
    steps_per_epoch: float | None = None,
    marks: Sequence[tuple[float, str, str]] = (),
    from_zero: bool = False,
) -> str:
    """A curve over steps 0 ... last_step, with epochs below them.

    The points are in `data-points` too, for a script that shows the one under the pointer.

    Args:
        name: for those who cannot see it. points: by rising step.
        marks: (step, class of the line, what happened there) of vertical lines.
        from_zero: let the axis begin at 0; else it is logarithmic where the values ask for it.
    """
    medians, points = trend(points), thinned(points)
    values = [value for _, value in points if value is not None]
    logarithmic, last_step = not from_zero and is_logarithmic(values), max(last_step, 1)
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    low = min(low, 0.0) if from_zero else low
    if logarithmic:
        ticks, place = logarithmic_ticks(low, high), math.log
    else:
        if high - low <= 1e-9 * max(abs(low), abs(high)):
            low, high = low - (abs(low) / 10 or 1), high + (abs(high) / 10 or 1)
        ticks, place = linear_ticks(low, high), float
    bottom, top = place(low), place(high)

    def x(step: float) -> str:
        return f"{LEFT + (RIGHT - LEFT) * min(max(step / last_step, 0), 1):.1f}"

    def y(value: float) -> str:
        return f"{BOTTOM - (BOTTOM - TOP) * (place(value) - bottom) / (top - bottom):.1f}"

    parts = []
    for tick in ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {y(tick)}H{RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 5}" y="{y(tick)}" dy="3.5" text-anchor="end">{short(tick)}</text>')
    for tick in linear_ticks(0, last_step, 5):
        parts.append(f'<text x="{x(tick)}" y="{BOTTOM + 15}" text-anchor="middle">{short(tick)}</text>')
        if steps_per_epoch:
            epoch = f"{tick / steps_per_epoch:.3g}"
            parts.append(f'<text class="faint" x="{x(tick)}" y="{BOTTOM + 29}" text-anchor="middle">{epoch}</text>')
    parts.append(f'<text x="2" y="{BOTTOM + 15}">step</text>')
    if logarithmic:
        parts.append(f'<text class="faint" x="{LEFT - 5}" y="9" text-anchor="end">log</text>')
    if steps_per_epoch:
        parts.append(f'<text class="faint" x="2" y="{BOTTOM + 29}">epoch</text>')
    for step, kind, title in marks:
        parts.append(f'<path class="mark {kind}" d="M{x(step)} {TOP}V{BOTTOM}"><title>{text(title)}</title></path>')
    for kind, line in (("curve band" if medians else "curve", points), ("curve", medians)):
        path, pen_is_down = [], False
        for step, value in line:
            if value is not None:
                path.append(f"{'L' if pen_is_down else 'M'}{x(step)} {y(value)}")
            pen_is_down = value is not None
        if path:
            parts.append(f'<path class="{kind}" d="{"".join(path)}"/>')
    if len(values) <= 60:
        dots = [(step, value) for step, value in points if value is not None]
        parts += [f'<circle class="dot" r="2" cx="{x(step)}" cy="{y(value)}"/>' for step, value in dots]
    parts.append(f'<path class="cross" d="M0 {TOP}V{BOTTOM}"/>')
    data = json.dumps([[step, float(f"{value:.5g}")] for step, value in points if value is not None])
    return (
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(name)}" data-points="{data}" '
        f'data-left="{LEFT}" data-right="{RIGHT}" data-last="{last_step:g}" data-epoch="{steps_per_epoch or 0:g}">'
        f"{''.join(parts)}</svg>"
    )
