"""An experiment as a figure: each row's number, its difference to the row that it is compared with, and the verdict."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import NamedTuple

from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from matplotlib.transforms import offset_copy

from ..evaluation.figures.style import FONT, GREY, LINE, OUR_FILL, SERIES, TWO_COLUMNS, new_figure, say, text_width
from ..evaluation.intervals import Interval, t_interval
from ..recipes import load_recipe
from ..recipes.display import END_OF_PATH
from .experiments import MEASURES, Experiment, Row, latent_dims
from .numbers import Numbers
from .table import verdicts
from .verdicts import FEWEST, MARGIN, Claim, Verdict


# Inches.
ROW, EDGE, GAP = 0.19, 0.06, 0.12
TITLE, HEAD, AXIS = 1.8 * LINE, 2.5 * LINE, 0.42  # above all panels; above the rows; ticks and unit below them
TITLE_PAD, TICK = 6 / 72, 0.28  # of a panel's title; from one tick to the next, at least
HANDLE = 0.34  # of an entry of a legend, beside its words

AGAINST = "compared with"
OURS, SEED, PAPER = "ours: mean, 95 % t-interval", "a seed", "paper, ImageNet-1k"
DIRECTION, EQUAL = "claim, no number", f"claim: equal, within ±{MARGIN:g}"
UP, DOWN = -0.14, 0.22  # parts of a row from its middle, so that ours, seeds and the paper do not hide each other
VERDICTS = {"holds": OUR_FILL, "reversed": SERIES[1]["color"]}  # the others are black
VERDICTS |= dict.fromkeys(("not run", "too few seeds", "not testable"), GREY)
# In the colours of SERIES; those that share one stand in no panel together. A name may go on, `raw pixels at 32x32`.
FLOORS = {"raw pixels": 1, "random whitened patches": 2, "untrained encoder": 3, "latents": 4}
FLOORS |= {"real": 1, "reconstruction": 2, "noise": 3}


class _Line(NamedTuple):
    """What is drawn of a row; `against` is empty where there is no row to compare it with."""

    name: str
    ours: dict[int, float]
    paper: float | None
    against: str
    claim: Claim | None
    paper_difference: float | None
    verdict: Verdict | None


class _Floor(NamedTuple):
    """With its numbers in its name."""

    label: str
    values: list[float]
    style: dict


class _Columns(NamedTuple):
    """Inches from the left at which the columns begin, and the width of each of the two panels."""

    number: float
    against: float
    difference: float
    verdict: float
    panel: float


def experiment_figure(experiment: Experiment, found: Numbers, tier: str | None) -> Figure:
    """Draws two panels for each measure that share its rows, in the order of the table.

    On the left is the number: ours as the mean and its 95 % t-interval over seeds, each seed as a dot, and as thin
    lines the floors, each at its median, with a band where they differ from row to row. The paper's number is there at
    full size, where it is of the same data, and where there is none of ours. On the right is the difference to the row
    whose name stands before it: ours paired by seed, with its interval, the paper's, and a band of ±2 points where the
    paper says that both are equal. An interval of two seeds may be wider than the panel: it ends in an arrow.

    Args:
        found: its numbers, from [`numbers`]. tier: that they are of; None is full size.
    """
    said, dims = verdicts(experiment, found, tier), latent_dims(experiment, tier)
    groups: dict[str, list[_Line]] = {}
    for row in experiment.rows:
        line = _line(row, experiment, found, said.get((row.label, row.measure)), dims.get(row.label))
        groups.setdefault(row.measure, []).append(line)
    columns = _columns([line for lines in groups.values() for line in lines])
    floors = {measure: _floors(found.floors.get(measure, {})) for measure in groups}
    heights = [
        HEAD + ROW * len(lines) + AXIS + _height([floor.label for floor in floors[measure]])
        for measure, lines in groups.items()
    ]
    words = (OURS, SEED, PAPER, EQUAL, DIRECTION)
    height = TITLE + sum(heights) + GAP * len(heights) + _height(words) + EDGE

    figure = new_figure(TWO_COLUMNS, height, layout="none")
    _write(figure, EDGE, height - LINE, f"{experiment.title} ({f'tier {tier}' if tier else 'full size'})")
    top, entries = height - TITLE, {}
    for (measure, lines), taken in zip(groups.items(), heights, strict=True):
        left, right = _panels(figure, columns, MEASURES[measure], lines, top)
        has_ours = any(line.ours for line in lines)
        _draw_numbers(left, lines, floors[measure], with_paper=tier is None or not has_ours)
        dataset = Path(load_recipe(END_OF_PATH, tier).data["dataset"]).name
        say(left, MEASURES[measure].rpartition(", ")[2], title=f"ours, {dataset}" if has_ours else "paper")
        if any(line.against for line in lines):
            _draw_differences(right, lines)
            say(right, "less is better" if measure == "distance" else "points", title="difference")
        else:
            right.set_axis_off()
        drawn = _entries(left) | _entries(right)
        own = {floor.label: drawn.pop(floor.label) for floor in floors[measure]}
        _legend(figure, own, top - HEAD - ROW * len(lines) - AXIS)
        entries |= drawn
        top -= taken + GAP
    _legend(figure, {name: entries[name] for name in words if name in entries}, top)
    return figure


def _line(row: Row, experiment: Experiment, found: Numbers, verdict: Verdict | None, latent_dim: int | None) -> _Line:
    reference = experiment.reference(row)
    known = reference is not None and None not in (row.paper, reference.paper)
    return _Line(
        name=row.label + (f", K = {latent_dim}" if latent_dim else ""),
        ours=found.of(row),
        paper=row.paper,
        against="" if reference is None else reference.label,
        claim=experiment.claim(row),
        paper_difference=row.paper - reference.paper if known else None,
        verdict=verdict,
    )


def _floors(found: Mapping[str, list[float]]) -> list[_Floor]:
    """In the order of `FLOORS`, and what is none of them behind; the latents of all tokenizers are one."""
    kinds: dict[str, list[float]] = {kind: [] for kind in FLOORS}
    for name, values in sorted(found.items()):
        kind = next((kind for kind in FLOORS if name.startswith(kind) or name.endswith(kind)), name)
        kinds.setdefault(kind, []).extend(values)
    floors = []
    for kind, values in kinds.items():
        if values:
            low, high = (f"{end(values):.1f}" for end in (min, max))
            label = f"{kind} {low}" if low == high else f"{kind} {low} ... {high}"
            floors.append(_Floor(label, values, SERIES[FLOORS.get(kind, 5)]))
    return floors


# -- What is drawn ----------------------------------------------------------------------------------------------------


def _draw_numbers(axis: Axes, lines: Sequence[_Line], floors: Sequence[_Floor], with_paper: bool) -> None:
    for floor in floors:
        style = {key: floor.style[key] for key in ("color", "linestyle")}
        axis.axvline(median(floor.values), linewidth=0.9, label=floor.label, zorder=1, **style)
        axis.axvspan(min(floor.values), max(floor.values), color=style["color"], alpha=0.1, linewidth=0, zorder=0)
    points = [value for floor in floors for value in floor.values]
    intervals = {}
    for place, line in enumerate(lines):
        if line.ours:
            values = list(line.ours.values())
            intervals[place] = t_interval(values)
            axis.plot(values, [place + DOWN] * len(values), ".", color=OUR_FILL, alpha=0.55, markersize=3.5, label=SEED)
            points += values
        if with_paper and line.paper is not None:
            _draw_paper(axis, line.paper, place + DOWN)
            points.append(line.paper)
    _draw_ours(axis, intervals, points)


def _draw_differences(axis: Axes, lines: Sequence[_Line]) -> None:
    axis.axvline(0, color="black", linewidth=0.7, zorder=1)
    points, intervals = [0.0], {}
    for place, line in enumerate(lines):
        if line.claim == "equal":
            look = dict(color="#56b4e9", alpha=0.3, linewidth=0, label=EQUAL)
            axis.add_patch(Rectangle((-MARGIN, place - 0.5), 2 * MARGIN, 1, **look))
            points += [-MARGIN, MARGIN]
        if line.paper_difference is not None:
            _draw_paper(axis, line.paper_difference, place + DOWN)
            points.append(line.paper_difference)
        elif line.claim in ("lower", "higher"):
            # Beside the line at 0, so many points of print from it: how far is not said.
            marker, offset = ("$\\leftarrow$", -7) if line.claim == "lower" else ("$\\rightarrow$", 7)
            at = offset_copy(axis.transData, axis.figure, x=offset, units="points")
            look = dict(color=GREY, marker=marker, markersize=7, linestyle="none", markeredgewidth=0.3)
            axis.plot([0], [place + DOWN], transform=at, label=DIRECTION, **look)
        if line.verdict and line.verdict.difference:
            intervals[place] = line.verdict.difference
    _draw_ours(axis, intervals, points)


def _draw_paper(axis: Axes, value: float, place: float) -> None:
    axis.plot([value], [place], "D", color=GREY, markersize=3.2, label=PAPER, zorder=2)


def _draw_ours(axis: Axes, intervals: Mapping[int, Interval], points: list[float]) -> None:
    """Means with their intervals by place, and the limits of the panel: around all points, and the intervals of as many
    seeds as a verdict needs. What reaches beyond them ends in an arrow."""
    for place, (mean, half_width, count) in intervals.items():
        look = dict(fmt="o", color=OUR_FILL, markersize=3.5, capsize=1.5, elinewidth=1, zorder=3, label=OURS)
        axis.errorbar(mean, place + UP, xerr=half_width, **look)
        points = [*points, mean]
        if count >= FEWEST:
            points += [mean - half_width, mean + half_width]
    if not points:
        axis.set_xticks([])
        return
    edge = 0.06 * (max(points) - min(points)) or 1
    low, high = min(points) - edge, max(points) + edge
    axis.set_xlim(low, high)
    for place, (mean, half_width, _) in intervals.items():
        for marker, end, is_beyond in (
            ("<", low, half_width and mean - half_width < low),
            (">", high, half_width and mean + half_width > high),
        ):
            if is_beyond:
                axis.plot([end], [place + UP], marker, color=OUR_FILL, markersize=3.5, clip_on=False, zorder=3)


def _entries(axis: Axes) -> dict[str, Artist]:
    """What a legend says of a panel, by name, each once."""
    return {name: entry for entry, name in zip(*axis.get_legend_handles_labels(), strict=True)}


# -- Where things are -------------------------------------------------------------------------------------------------


def _columns(lines: Sequence[_Line]) -> _Columns:
    name = max(_width(line.name) for line in lines)
    against = max(map(_width, {AGAINST, *(line.against for line in lines)}))
    verdict = max(map(_width, {"verdict", *(line.verdict.word for line in lines if line.verdict)}))
    panel = (TWO_COLUMNS - name - against - verdict - 11 * EDGE) / 2
    number = name + 3 * EDGE
    difference = number + panel + against + 5 * EDGE
    return _Columns(number, number + panel + 2 * EDGE, difference, difference + panel + 2 * EDGE, panel)


def _panels(figure: Figure, columns: _Columns, measure: str, lines: Sequence[_Line], top: float) -> list[Axes]:
    """The two panels with the words around them, from `top` inches down."""
    rows, (width, height) = ROW * len(lines), figure.get_size_inches()
    lowest = top - HEAD - rows
    _write(figure, EDGE, top - 0.5 * LINE, measure, fontweight="bold")
    heads = {AGAINST: columns.against, "verdict": columns.verdict} if any(line.against for line in lines) else {}
    for words, place in heads.items():
        _write(figure, place, top - HEAD + TITLE_PAD, words, va="baseline")
    for number, line in enumerate(lines):
        middle = top - HEAD - ROW * (number + 0.5)
        if number % 2 == 0:
            at = dict(transform=figure.dpi_scale_trans, zorder=-1)
            figure.add_artist(Rectangle((0, middle - ROW / 2), width, ROW, color="0.95", linewidth=0, **at))
        _write(figure, EDGE, middle, line.name)
        _write(figure, columns.against, middle, line.against)
        if line.verdict:
            word = line.verdict.word
            _write(figure, columns.verdict, middle, word, color=VERDICTS.get(word, "black"))
    axes = []
    for place in (columns.number, columns.difference):
        axis = figure.add_axes((place / width, lowest / height, columns.panel / width, rows / height))
        axis.patch.set_visible(False)  # the bands of the rows lie below it
        axis.set_ylim(len(lines) - 0.5, -0.5)
        axis.set_yticks([])
        axis.spines["left"].set_visible(False)
        axis.xaxis.set_major_locator(MaxNLocator(int(columns.panel / TICK), steps=[1, 2, 5, 10]))
        axes.append(axis)
    return axes


def _width(words: str) -> float:
    """Inches that words take in print: hinting makes them narrower on the screen, where they are measured."""
    return 1.09 * text_width(words)


def _write(figure: Figure, x: float, y: float, words: str, **look) -> None:
    """Words that begin at `x`, their middle at `y`, in inches from the lower left corner."""
    look = {"va": "center_baseline"} | look
    figure.text(x, y, words, fontsize=FONT, transform=figure.dpi_scale_trans, **look)


def _in_columns(names: Sequence[str]) -> int:
    """How many columns a legend of these names can have."""
    widths = [HANDLE + _width(name) for name in names]
    for count in range(len(names), 1, -1):
        rows = math.ceil(len(names) / count)
        columns = [widths[first : first + rows] for first in range(0, len(names), rows)]
        if sum(map(max, columns)) <= TWO_COLUMNS - EDGE:
            return count
    return 1


def _height(names: Sequence[str]) -> float:
    """Inches of a legend of these names."""
    return 1.15 * LINE * math.ceil(len(names) / _in_columns(names)) if names else 0.0


def _legend(figure: Figure, entries: Mapping[str, Artist], top: float) -> None:
    if entries:
        place = dict(loc="upper left", bbox_to_anchor=(EDGE, top), bbox_transform=figure.dpi_scale_trans)
        spacing = dict(borderpad=0, borderaxespad=0, handlelength=1.6, handletextpad=0.6, columnspacing=1.2)
        look = dict(fontsize=FONT, frameon=False, labelspacing=0.3)
        columns = _in_columns(list(entries))
        figure.legend(list(entries.values()), list(entries), ncols=columns, **place, **spacing, **look)
