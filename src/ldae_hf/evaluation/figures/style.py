"""What all figures share: widths in print, sizes of words, colours, and how a figure becomes files."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


ONE_COLUMN, TWO_COLUMNS = 3.3, 6.9  # inches: as wide as a figure is printed
FONT = 7.5  # points, of all words
LINE = 1.25 * FONT / 72  # inches from one line of words to the next
DPI = 300
GREY = "0.45"
# Okabe and Ito's colours, which colour-blind people tell apart; markers and dashes do it in grey.
SERIES = (
    dict(color="#0072b2", marker="o", linestyle="solid"),
    dict(color="#d55e00", marker="s", linestyle="dashed"),
    dict(color="#009e73", marker="^", linestyle="dashdot"),
    dict(color="#aa4499", marker="D", linestyle="dotted"),
    dict(color="#000000", marker="v", linestyle=(0, (6, 2))),
    dict(color="#e69f00", marker="P", linestyle=(0, (3, 1, 1, 1, 1, 1))),
)
PAPER_FILL, OUR_FILL = "0.78", "#0072b2"


def new_figure(width: float, height: float, **options) -> Figure:
    """A figure of so many inches, whose lines are laid out by matplotlib unless `options` say otherwise."""
    figure = Figure(figsize=(width, height), **({"layout": "constrained"} | options))
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure, `.png` or `.svg`, and the folders above it that are missing; text in an SVG stays text.

    The same figure always makes the same file.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    options = {"metadata": {"Date": None}} if path.suffix == ".svg" else {"pil_kwargs": {"optimize": True}}
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "ldae"}):
        figure.savefig(path, dpi=DPI, **options)
    return path


def save_both(figure: Figure, output: str | Path) -> list[Path]:
    """Writes a figure as `output.png` and `output.svg`; an ending of these two that `output` has is left off."""
    stem = Path(output)
    stem = stem.with_suffix("") if stem.suffix in (".png", ".svg") else stem
    return [save_figure(figure, stem.with_name(stem.name + ending)) for ending in (".png", ".svg")]


def say(axis: Axes, below: str = "", beside: str = "", title: str = "") -> None:
    """The words of a panel, and its frame without the upper and the right side."""
    axis.set_xlabel(below, fontsize=FONT)
    axis.set_ylabel(beside, fontsize=FONT)
    axis.set_title(title, fontsize=FONT)
    axis.tick_params(which="both", labelsize=FONT)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)


def text_width(text: str) -> float:
    """Inches that a text takes, of its longest line."""
    figure = new_figure(1, 1, layout="none")
    return figure.text(0, 0, text, fontsize=FONT).get_window_extent().width / figure.dpi
