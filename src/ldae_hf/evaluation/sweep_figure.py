"""A sweep as a figure: the paper's curve on the left, where it has one, ours on the right."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes

from .figures.style import FONT, GREY, ONE_COLUMN, SERIES, new_figure, save_figure, say
from .sweeps import PAPER_BLOCKS, PAPER_DEPTH, PAPER_TIMESTEPS


HEIGHT = 2.0  # inches
INPUTS = {"clean": "clean input", "frozen": "noisy input"}

Curves = dict[str, list[tuple[float, float]]]  # by name, places and top-1 in percent


def sweep_figure(row: dict, path: str | Path) -> Path:
    """Draws top-1 over the places of a sweep, as a result of `run_depth_sweep` and its siblings holds them.

    Args:
        path: the picture's file, `.png` or `.svg`.

    Returns:
        `path`.
    """
    draw = {"sweep_depth": _depth, "sweep_timestep": _timesteps, "sweep_layers": _layers}[row["task"]]
    panels, label = draw(row)
    figure = new_figure(ONE_COLUMN, HEIGHT)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves, end) in zip(axes, panels, strict=True):
        _panel(axis, curves, end)
        say(axis, title=title, beside="linear probe, top-1 (%)" if axis is axes[0] else "")
    figure.supxlabel(label, fontsize=FONT)
    if len(panels[-1][1]) > 1:
        axes[-1].legend(fontsize=FONT, frameon=False, handlelength=1.2, borderpad=0.1, labelspacing=0.2)
    return save_figure(figure, path)


def _depth(row: dict):
    ours = {"": [(point["block"], point["top1"]) for point in row["points"]]}
    paper = ("paper", {"": list(PAPER_DEPTH.items())}, PAPER_BLOCKS / 2)
    return [paper, ("ours", ours, row["encoder_blocks"])], "block (dashed: the encoder's end)"


def _timesteps(row: dict):
    ours = {
        INPUTS[noise]: [(point["timestep"], point["top1"]) for point in row["points"] if point["noise"] == noise]
        for noise in dict.fromkeys(point["noise"] for point in row["points"])
    }
    paper = {INPUTS[noise]: list(numbers.items()) for noise, numbers in PAPER_TIMESTEPS.items()}
    return [("paper", paper, None), ("ours", ours, None)], "timestep"


def _layers(row: dict):
    pools = dict.fromkeys(point["pool"] for point in row["points"])
    curves = {
        pool.replace("_", " "): [(point["layer"], point["top1"]) for point in row["points"] if point["pool"] == pool]
        for pool in pools
    }
    return [("", curves, None)], "layer"


def _panel(axis: Axes, curves: Curves, end: float | None) -> None:
    if end is not None:
        axis.axvline(end, color=GREY, linestyle="dashed", linewidth=0.8)
    for (name, points), style in zip(curves.items(), SERIES, strict=False):
        places, top1 = zip(*sorted(points), strict=True)
        axis.plot(places, top1, markersize=2.5, linewidth=1.1, label=name, **style)
    axis.set_xticks(*_ticks(sorted({place for points in curves.values() for place, _ in points})))


def _ticks(places: Sequence[float]) -> tuple[list[float], list[str]]:
    """Places and their names, without those that would touch the one before."""
    chosen = []
    for place in places:
        if not chosen or place - chosen[-1] >= 0.14 * (places[-1] - places[0]):
            chosen.append(place)
    return chosen, [f"{place:g}" for place in chosen]
