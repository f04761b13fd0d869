"""The spectrum of the PCA: how the variance of patches is spread over its directions, and what K of them keep."""

from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from ...image_processing_ldae import LDAEImageProcessor
from .style import FONT, ONE_COLUMN, SERIES, new_figure, say


LONGEST = 22  # characters of a name that the legend has room for


def spectrum_figure(processors: Mapping[str, LDAEImageProcessor]) -> Figure:
    """Variance along each direction in squared normalised pixels, and the share that the first directions hold.

    K is marked; in the legend stand the patch, K, and the share that it keeps.

    Args:
        processors: fitted ones, by their names in the legend.

    Raises:
        ValueError: there are more than can be told apart.
    """
    if len(processors) > len(SERIES):
        raise ValueError(f"{len(processors)} spectra cannot be told apart in one figure; draw at most {len(SERIES)}.")
    figure = new_figure(ONE_COLUMN, 1.75 + 0.15 * (len(processors) > 1) * len(processors))
    left, right = figure.subplots(1, 2)
    for (name, processor), style in zip(processors.items(), SERIES, strict=False):
        variance, kept = processor.explained_variance.clamp(min=0), processor.latent_dim
        share = 100 * variance.cumsum(0) / variance.sum()
        numbers = range(1, len(variance) + 1)
        line = dict(color=style["color"], linestyle=style["linestyle"], linewidth=1.2)
        mark = dict(color=style["color"], marker=style["marker"], markersize=4.5, linestyle="none")
        label = f"{processor.patch_size}x{processor.patch_size}, K = {kept}, {share[kept - 1]:.1f} %"
        if len(processors) > 1:
            label = f"{name if len(name) <= LONGEST else f'…{name[1 - LONGEST :]}'}: {label}"
        left.plot(numbers, variance.numpy(), **line, label=label)
        right.plot(numbers, share.numpy(), **line)
        left.plot(kept, variance[kept - 1].item(), **mark)
        right.plot(kept, share[kept - 1].item(), **mark)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")  # the exponent of a power of ten would be too small to read
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        last = max(len(processor.explained_variance) for processor in processors.values())
        ticks = [4**power for power in range(8) if 4**power <= last]
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.xaxis.set_minor_locator(NullLocator())
    right.set_ylim(0, 103)
    say(left, "direction", "variance")
    say(right, "directions kept", "variance kept (%)")
    figure.legend(loc="outside lower center", fontsize=FONT, frameon=False)
    return figure
