"""The path: the linear probe of each step as bars (Figure 6), and beside the distance of generated images (Table 1)."""

from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from ...recipes import load_recipe
from ...recipes.display import END_OF_PATH
from ..intervals import t_interval
from ..ledger import LEDGER
from ..path_results import PathGroup
from ..probe_results import last_of_each_seed, probe_results
from .style import FONT, ONE_COLUMN, OUR_FILL, PAPER_FILL, SERIES, TWO_COLUMNS, new_figure, say


# Of our floors, by the last word of their names: marker, and name in the legend.
FLOORS = {"latents": ("|", "its latents"), "patches": ("x", "random patches"), "encoder": ("+", "untrained")}
DECADE = 10  # a distance that spans more has a logarithmic axis

Numbers = list[float | None]


@dataclass
class Step:
    """Top-1 in percent of a recipe of the path: the paper's, ours of each seed, and that of the floors by kind."""

    recipe: str
    paper: float | None
    ours: list[float] = field(default_factory=list)
    floors: dict[str, list[float]] = field(default_factory=dict)


def path_steps(ledger: str | Path | None = LEDGER, tier: str | None = None) -> tuple[list[Step], str]:
    """The steps of which there is a number, in the order of the path, and the data set of ours.

    Args:
        ledger: as [`probe_results`] reads it; None for the paper alone. tier: of our results; None is full size.

    Raises:
        ValueError: there is no such ledger or tier, or a row is no result.
    """
    path = {name: load_recipe(name) for name in load_recipe(END_OF_PATH).steps}
    measured = {name: {} for name in path} if ledger is None else probe_results(path, ledger, tier)
    dataset = load_recipe(END_OF_PATH, tier).data["dataset"]
    steps = []
    for name, recipe in path.items():
        step = Step(name, recipe.paper.get("linear_probe_top1"))
        for found in last_of_each_seed(measured[name]).values():
            if found.dataset == dataset:
                step.ours.append(found.top1)
                for floor, top1 in found.floors.items():
                    kind = floor.partition(",")[0].split()[-1]
                    step.floors.setdefault(kind, []).append(top1)
        if step.paper is not None or step.ours:
            steps.append(step)
    return steps, dataset


def path_bars(steps: list[Step], ours: str) -> Figure:
    """Draws a bar for each step from the top down, from 0 on, with its number: the paper's on the left, ours beside it.

    Ours are the mean over seeds, with a line of its 95 % interval where there are several. Marks are floors, a
    linear probe on what is no trained encoder: white within our bar, black where a floor is higher than it.

    Args:
        steps: from [`path_steps`]. ours: title of our panel, which is left out where there is no number of ours.
    """
    panels = [("paper, ImageNet-1k", PAPER_FILL, [[] if step.paper is None else [step.paper] for step in steps])]
    if any(step.ours for step in steps):
        panels.append((ours, OUR_FILL, [step.ours for step in steps]))
    figure = new_figure(ONE_COLUMN, 0.75 + 0.19 * len(steps))
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, fill, values) in zip(axes, panels, strict=True):
        floors = [_floors_of(step) if fill == OUR_FILL else {} for step in steps]
        means = [mean(numbers) for numbers in values if numbers]
        highest = max([*means, *(value for found in floors for value in found.values())])
        for place, numbers in enumerate(values):
            if numbers:
                error = t_interval(numbers).half_width
                bar = dict(xerr=error, color=fill, ecolor="black", error_kw=dict(linewidth=0.8))
                axis.barh(place, mean(numbers), 0.72, **bar)
                ends = [mean(numbers) + (error or 0) + 0.04 * highest]
                ends += [value + 0.09 * highest for value in floors[place].values()]  # beyond the mark
                end = max(ends)
                axis.text(end, place, f"{mean(numbers):.1f}", fontsize=FONT, va="center")
        axis.set_xlim(0, 1.42 * highest)
        axis.set_xticks([])
        axis.spines["bottom"].set_visible(False)
        say(axis, "top-1 (%)", title=title)
        axis.tick_params(axis="y", length=0)
    axes[0].set_yticks(range(len(steps)), [step.recipe.replace("_", " ") for step in steps])
    axes[0].set_ylim(len(steps) - 0.5, -0.5)
    if len(panels) > 1:
        _mark_floors(figure, axes[1], steps)
    return figure


def _floors_of(step: Step) -> dict[str, float]:
    """The means of the floors that are marked."""
    return {kind: mean(step.floors[kind]) for kind in FLOORS if kind in step.floors}


def _mark_floors(figure: Figure, axis: Axes, steps: list[Step]) -> None:
    look = dict(linestyle="none", markersize=5, markeredgewidth=1.1)
    for kind, (marker, name) in FLOORS.items():
        found = [(_floors_of(step)[kind], place, step.ours) for place, step in enumerate(steps) if kind in step.floors]
        for value, place, ours in found:
            color = "white" if ours and value < mean(ours) else "black"  # there is no bar behind the latter
            axis.plot([value], [place], marker=marker, color=color, **look)
        if found:
            axis.plot([], [], marker=marker, color="black", label=name, **look)
    if axis.get_legend_handles_labels()[0]:
        spacing = dict(handletextpad=0.2, columnspacing=1)
        figure.legend(loc="outside lower center", ncols=3, fontsize=FONT, frameon=False, **spacing)


def path_figure(group: PathGroup) -> Figure:
    """Draws two panels over the steps, the paper's numbers and ours: probe on the left axis, distance on the right.

    A dashed line is the distance of the tokenizer's reconstructions. Steps of which there is no number are left out.
    """
    ours = [[mean(values) if values else None for values in (step.top1, step.distance)] for step in group.steps]
    floors = [step.floors.get("reconstruction") for step in group.steps]
    paper = [[step.paper_top1, step.paper_fid] for step in group.steps]
    shown = [i for i in range(len(ours)) if any(number is not None for number in (*ours[i], *paper[i]))]
    names = [group.steps[i].recipe.replace("_", " ") for i in shown]

    figure = new_figure(TWO_COLUMNS, 3.1)
    left, right = figure.subplots(1, 2)
    _panel(left, "paper, ImageNet-1k", names, *([paper[i][k] for i in shown] for k in (0, 1)), distance_name="FID-50K")
    reconstruction = [mean(floors[i]) if floors[i] else None for i in shown]
    numbers = ([ours[i][k] for i in shown] for k in (0, 1))
    name = group.label.partition(" (")[0]
    _panel(right, "ours", names, *numbers, distance_name=name, reconstruction=reconstruction)
    return figure


def _panel(
    axis: Axes,
    title: str,
    names: list[str],
    top1: Numbers,
    distance: Numbers,
    *,
    distance_name: str,
    reconstruction: Numbers = (),
) -> None:
    probe, apart = ({key: style[key] for key in ("color", "marker")} for style in SERIES[:2])
    other = axis.twinx()
    _line(axis, top1, **probe)
    _line(other, distance, **apart)
    _line(other, reconstruction, color=apart["color"], linestyle="dashed", linewidth=0.9, label="reconstruction")
    values = [value for value in (*distance, *reconstruction) if value is not None]
    if values and min(values) > 0 and max(values) > DECADE * min(values):
        other.set_yscale("log", subs=())
        other.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        other.yaxis.set_major_formatter("{x:g}")  # the exponent of a power of ten would be too small to read
    say(axis, title=title)
    say(other)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor")
    for side, label, style in ((axis, "linear probe, top-1 (%)", probe), (other, distance_name, apart)):
        side.set_ylabel(label, color=style["color"], fontsize=FONT)
        side.tick_params(axis="y", which="both", labelcolor=style["color"])
    other.spines["right"].set_visible(True)
    axis.spines["right"].set_visible(True)
    if any(value is not None for value in reconstruction):
        other.legend(fontsize=FONT, frameon=False)


def _line(axis: Axes, values: Numbers, **style) -> None:
    """Joins the points that there are."""
    places = [place for place, value in enumerate(values) if value is not None]
    if places:
        axis.plot(places, [values[place] for place in places], markersize=3, **({"linewidth": 1.2} | style))
