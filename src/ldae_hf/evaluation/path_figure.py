"""Table 1 as a figure: the linear probe and the distance part ways along the path, in the paper and here."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from .figures import save_figure
from .path_results import PathGroup


PROBE, DISTANCE = "#0b6fa4", "#b5410b"
WIDTH, HEIGHT, FONT = 3.4, 3.1, 7.5  # of a panel in inches, and in points
DECADE = 10  # a distance that spans more has a logarithmic axis

Numbers = list[float | None]


def path_figure(group: PathGroup, path: str | Path) -> Path:
    """Draws two panels over the steps, the paper's numbers and ours: probe on the left axis, distance on the right.

    A dashed line is the distance of the tokenizer's reconstructions. Steps of which there is no number are left out.

    Args:
        path: the picture's file, `.png` or `.svg`.

    Returns:
        `path`.
    """
    ours = [[mean(values) if values else None for values in (step.top1, step.distance)] for step in group.steps]
    floors = [step.floors.get("reconstruction") for step in group.steps]
    paper = [[step.paper_top1, step.paper_fid] for step in group.steps]
    shown = [i for i in range(len(ours)) if any(number is not None for number in (*ours[i], *paper[i]))]
    names = [group.steps[i].recipe.replace("_", " ") for i in shown]

    figure = Figure(figsize=(2 * WIDTH, HEIGHT), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _panel(left, "paper, ImageNet-1k", names, *([paper[i][k] for i in shown] for k in (0, 1)), distance_name="FID-50K")
    reconstruction = [mean(floors[i]) if floors[i] else None for i in shown]
    numbers = ([ours[i][k] for i in shown] for k in (0, 1))
    name = group.label.partition(" (")[0]
    _panel(right, "ours", names, *numbers, distance_name=name, reconstruction=reconstruction)
    return save_figure(figure, path)


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
    other = axis.twinx()
    _line(axis, top1, color=PROBE, marker="o")
    _line(other, distance, color=DISTANCE, marker="s")
    _line(other, reconstruction, color=DISTANCE, linestyle="dashed", linewidth=0.9, label="reconstruction")
    values = [value for value in (*distance, *reconstruction) if value is not None]
    if values and min(values) > 0 and max(values) > DECADE * min(values):
        other.set_yscale("log", subs=())
        other.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        other.yaxis.set_major_formatter("{x:g}")  # the exponent of a power of ten would be too small to read
    axis.set_title(title, fontsize=FONT + 0.5)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_xticks(range(len(names)), names, rotation=60, ha="right", rotation_mode="anchor", fontsize=FONT)
    for side, label, color in ((axis, "linear probe, top-1 (%)", PROBE), (other, distance_name, DISTANCE)):
        side.set_ylabel(label, color=color, fontsize=FONT)
        side.tick_params(axis="y", which="both", labelsize=FONT, labelcolor=color)
        side.spines["top"].set_visible(False)
    if any(value is not None for value in reconstruction):
        other.legend(fontsize=FONT, frameon=False)


def _line(axis: Axes, values: Numbers, **style) -> None:
    """Joins the points that there are."""
    places = [place for place, value in enumerate(values) if value is not None]
    if places:
        axis.plot(places, [values[place] for place in places], markersize=3, **({"linewidth": 1.2} | style))
