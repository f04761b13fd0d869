"""Images side by side, with words below the columns and beside the rows."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from .style import DPI, FONT, LINE, ONE_COLUMN, TWO_COLUMNS, new_figure, text_width


GAP, WIDE_GAP, PAD = 0.04, 0.24, 0.05  # inches between images, around an arrow, and between an image and its words


def image_figure(
    rows: Sequence[Sequence[torch.Tensor | None]],
    columns: Sequence[str] = (),
    names: Sequence[str] = (),
    *,
    arrows: Sequence[str] = (),
) -> Figure:
    """Rows of square images, each (C,H,W) in 0...1; values outside are clipped. None leaves a place empty.

    It is as wide as one column of a paper if the words fit below their images there, else as two.

    Args:
        columns: words below the columns, in lines of their own where they have line breaks. names: beside the rows.
        arrows: matplotlib's style of the arrow from each column to the next; none with ().
    """
    count, gap = len(rows[0]), WIDE_GAP if arrows else GAP
    left = max(map(text_width, names)) + 2 * PAD if names else GAP
    sides = {width: (width - left - GAP - (count - 1) * gap) / count for width in (ONE_COLUMN, TWO_COLUMNS)}
    fits = max(map(text_width, columns), default=0) < sides[ONE_COLUMN] + gap - GAP
    width = ONE_COLUMN if fits else TWO_COLUMNS
    side = sides[width]
    below = PAD + LINE * max(text.count("\n") + 1 for text in columns) if columns else GAP
    height = len(rows) * (side + GAP) + below
    figure = new_figure(width, height, layout="none")

    for row, images in enumerate(rows):
        bottom = height - (row + 1) * (side + GAP)
        middle = (bottom + side / 2) / height
        for column, image in enumerate(images):
            x = left + column * (side + gap)
            if image is not None:
                axis = figure.add_axes((x / width, bottom / height, side / width, side / height))
                # Pixels as squares, and in an SVG as they are: files stay small.
                axis.imshow(_at_most(image, round(side * DPI)).permute(1, 2, 0).numpy(), interpolation="none")
                axis.axis("off")
            if arrows and column:
                ends = ((x - gap + 0.03) / width, middle), ((x - 0.03) / width, middle)
                look = dict(arrowstyle=arrows[column - 1], color="black", linewidth=0.8, mutation_scale=6)
                figure.add_artist(FancyArrowPatch(*ends, transform=figure.transFigure, shrinkA=0, shrinkB=0, **look))
        if names:
            figure.text(PAD / width, middle, names[row], fontsize=FONT, va="center")
    for column, text in enumerate(columns):
        x = left + column * (side + gap) + side / 2
        for number, line in enumerate(text.split("\n")):  # each by itself, so that all stand on one line
            y = below - PAD - number * LINE - FONT / 72
            figure.text(x / width, y / height, line, fontsize=FONT, ha="center", va="baseline")
    return figure


def _at_most(image: torch.Tensor, side: int) -> torch.Tensor:
    """An image (C,H,W) within 0...1, made smaller if it has more pixels than can be printed."""
    image = image.detach().float().cpu().clamp(0, 1)
    if image.shape[-1] > side:
        image = F.interpolate(image[None], (side, side), mode="bilinear", antialias=True)[0]
    return image
