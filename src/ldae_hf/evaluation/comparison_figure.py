"""A comparison as a figure: the numbers with their intervals and floors, and how the runs came to them."""

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, NullLocator

from ..training.metrics_log import read_lines
from .comparison import Comparison
from .figures.style import FONT, GREY, LINE, ONE_COLUMN, SERIES, TWO_COLUMNS, new_figure, save_figure, say
from .groups import Group
from .intervals import t_interval, wilson_interval


FLOOR_MARKERS = ("|", "x", "+", "1", "2", "3", "4")
CURVES = {"probe_top1": "online probe, top-1 (%)", "knn_top1": "online k-NN, top-1 (%)", "loss": "loss, each its own"}


def comparison_figure(comparison: Comparison, path: str | Path) -> Path:
    """Draws the means with 95 % intervals, floors in grey, and beside them a curve over epochs if the groups are runs.

    The interval is the t-interval over seeds; of one seed it is that of the test images, dashed. A curve is the mean
    over the runs of a group, of the online probe where all of them have one, else of the online k-NN or of the loss.

    Args:
        path: the picture's file, `.png` or `.svg`.

    Returns:
        `path`.

    Raises:
        ValueError: there are more groups than colours.
    """
    if len(comparison.groups) > len(SERIES):
        raise ValueError(f"A figure shows at most {len(SERIES)} groups, not {len(comparison.groups)}; draw fewer.")
    curve = next((key for key in CURVES if all(_curve(group, key) for group in comparison.groups)), None)
    rows = len(comparison.lines) * (len(comparison.groups) + 1)
    words = len(comparison.groups) + len(comparison.floors)
    figure = new_figure(ONE_COLUMN if curve is None else TWO_COLUMNS, 0.6 + 1.3 * LINE * rows + 0.75 * LINE * words)
    axes = figure.subplots(1, 1 if curve is None else 2, squeeze=False)[0]
    _numbers(axes[0], comparison)
    if curve is not None:
        for style, group in zip(SERIES, comparison.groups, strict=False):
            axes[1].plot(*zip(*_curve(group, curve), strict=True), linewidth=1.2, **style | {"marker": ""})
        axes[1].set_yscale("log" if curve == "loss" else "linear")
        axes[1].yaxis.set_major_locator(MaxNLocator(5))
        axes[1].yaxis.set_major_formatter("{x:g}")  # the exponent of a power of ten would be too small to read
        axes[1].yaxis.set_minor_locator(NullLocator())
        say(axes[1], "epoch", CURVES[curve])
    handles, labels = axes[0].get_legend_handles_labels()
    groups_first = sorted(range(len(labels)), key=lambda index: labels[index] in comparison.floors)
    handles, labels = ([found[index] for index in groups_first] for found in (handles, labels))
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=FONT, frameon=False)
    return save_figure(figure, path)


def _numbers(axis: Axes, comparison: Comparison) -> None:
    """A band for each line of the comparison: the groups one below the other, and the floors in its middle."""
    height, places, named = len(comparison.groups) + 1, [], set()
    for number, line in enumerate(comparison.lines):
        top = -number * height - 1
        places.append(top - (len(comparison.groups) - 1) / 2)
        for place, (group, values) in enumerate(zip(comparison.groups, line.values, strict=True)):
            found, style = t_interval(list(values.values())), SERIES[place]
            errors, bar = None if found.half_width is None else [[found.half_width]] * 2, "solid"
            if errors is None and line.test_images is not None:
                low, high = wilson_interval(found.mean, line.test_images)
                errors, bar = [[found.mean - low], [high - found.mean]], (0, (2, 1))
            look = dict(fmt=style["marker"], color=style["color"], markersize=3.5, capsize=2)
            label = group.name if number == 0 else None
            _, _, bars = axis.errorbar(found.mean, top - place, xerr=errors, label=label, **look)
            for one in bars:
                one.set_linestyle(bar)
        for marker, name in zip(FLOOR_MARKERS, comparison.floors, strict=False):
            if name in line.floors:
                label = None if name in named else name
                axis.plot(mean(line.floors[name]), places[-1], marker, color=GREY, markersize=5, label=label)
                named.add(name)
    axis.set_ylim(-len(comparison.lines) * height, 0)
    axis.set_yticks(places, [line.name for line in comparison.lines])
    axis.grid(axis="x", color="0.87", linewidth=0.5)
    axis.set_axisbelow(True)
    say(axis, "%")


def _curve(group: Group, key: str) -> list[tuple[float, float]]:
    """(epoch, mean over the group's runs) at the steps that all of them report; [] without runs or reports."""
    runs = [read_lines(folder / "metrics.jsonl") for folder in group.folders]
    epochs = {line["step"]: line["epoch"] for run in runs for line in run if "epoch" in line}
    if not epochs:
        return []
    per_step = max(epochs.values()) / max(epochs)  # the line of an evaluation says only its step
    values = [{line["step"]: line[key] for line in run if key in line} for run in runs]
    shared = [step for step in values[0] if all(step in found for found in values)]
    return [(step * per_step, mean(found[step] for found in values)) for step in shared]
