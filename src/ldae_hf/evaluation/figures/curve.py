"""Figure 5: accuracy over K, the latent dimension of a token, for each tokenizer; the paper's points and ours."""

from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ...recipes import load_recipe, sweep_members
from ..ledger import LEDGER
from ..probe_results import probe_results
from .style import FONT, ONE_COLUMN, SERIES, TWO_COLUMNS, new_figure, say


SWEEPS = {
    "patch_pca_k": "patch PCA",
    "patch_ae_k": "patch AE",
    "patch_vae_k": "patch VAE",
    "conv_vae_k": "conv. VAE",
    "pixels_size": "pixels",
    "l_dae_k": "l-DAE",
}
HEIGHT = 2.55  # inches


@dataclass(frozen=True)
class Curve:
    """Points of one sweep, by falling K: (K, top-1 of each encoder in percent); the paper's have one value each."""

    name: str
    points: list[tuple[int, list[float]]]


@dataclass(frozen=True)
class Panel:
    """Curves of the same images; `patch_dim` is P, the values of a patch of the full image."""

    title: str
    patch_dim: int
    curves: list[Curve]


def curve_panels(ledger: str | Path | None = LEDGER, tier: str | None = None) -> list[Panel]:
    """The paper's points and, where there are any, ours out of a ledger.

    Args:
        ledger: as [`probe_results`] reads it; None for the paper alone. tier: of our results; None is full size.

    Raises:
        ValueError: there is no such ledger or tier, or a row is no result.
    """
    panels = [_panel("paper, ImageNet-1k", None, lambda name: _paper(name))]
    if ledger is not None:
        members = {name: load_recipe(name) for sweep in SWEEPS for name in _members(sweep)}
        measured = probe_results(members, ledger, tier)
        dataset = load_recipe("l_dae", tier).data["dataset"]
        panels.append(
            _panel(
                f"ours, {dataset} (tier {tier})" if tier else f"ours, {dataset}",
                tier,
                lambda name: [found.top1 for found in measured[name].values() if found.dataset == dataset],
            )
        )
    return [panel for panel in panels if panel.curves]


def curve_figure(panels: list[Panel]) -> Figure:
    """Draws the mean over encoders, and the standard deviation where there are several, over K and over its share of P.

    The pixels of a smaller image have fewer values in a patch, all of which are kept; K / P is of the full image's
    patch.

    Args:
        panels: from [`curve_panels`], side by side.
    """
    figure = new_figure(ONE_COLUMN if len(panels) == 1 else TWO_COLUMNS, HEIGHT)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    styles = dict(zip(SWEEPS.values(), SERIES, strict=True))
    shares = [k / panel.patch_dim for panel in panels for curve in panel.curves for k, _ in curve.points]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in panel.curves:
            places = [latent_dim for latent_dim, _ in curve.points]
            means = [mean(values) for _, values in curve.points]
            spread = [stdev(values) if len(values) > 1 else 0 for _, values in curve.points]
            look = dict(**styles[curve.name], markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8)
            axis.errorbar(places, means, spread if any(spread) else None, **look)
        _axes(axis, panel, min(shares) / 1.3, max(shares) * 1.3)
    axes[0].set_ylabel("linear probe, top-1 (%)", fontsize=FONT)
    drawn = {curve.name for panel in panels for curve in panel.curves}
    handles = [Line2D([], [], **style, markersize=4, label=name) for name, style in styles.items() if name in drawn]
    ncols = 3 if len(panels) == 1 else len(handles)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, fontsize=FONT, frameon=False, columnspacing=1.2
    )
    return figure


def _axes(axis: Axes, panel: Panel, lowest: float, highest: float) -> None:
    """K below and K / P above, both by powers of two; the range of K / P is the same in all panels."""
    above = axis.twiny()
    for one, end in ((axis, panel.patch_dim), (above, 1)):
        one.set_xscale("log", base=2)
        one.set_xlim(lowest * end, highest * end)
        one.xaxis.set_minor_locator(NullLocator())
    places = [2**power for power in range(11) if lowest <= 2**power / panel.patch_dim <= highest]
    parts = [4**power for power in range(6) if lowest <= 1 / 4**power <= highest]
    axis.set_xticks(places, [str(place) for place in places])
    above.set_xticks([1 / part for part in parts], [f"1/{part}" if part > 1 else "1" for part in parts])
    say(axis, "K", title=panel.title)
    say(above, f"K / P, of the P = {panel.patch_dim} values of a patch")
    for one in (axis, above):
        one.spines["top"].set_visible(True)


def _panel(title: str, tier: str | None, values_of) -> Panel:
    side = load_recipe("patch_pca", tier).model["patch_size"]
    curves = []
    for sweep, shown in SWEEPS.items():
        points = [(load_recipe(name, tier).model["latent_dim"], values_of(name)) for name in _members(sweep)]
        points = sorted((point for point in points if point[1]), reverse=True)
        if points:
            curves.append(Curve(shown, points))
    return Panel(title, 3 * side**2, curves)


def _members(sweep: str) -> list[str]:
    """The recipes of a sweep and the one that it starts from, which is a point too."""
    members = sweep_members(sweep)
    return [load_recipe(members[0]).parent, *members]


def _paper(name: str) -> list[float]:
    number = load_recipe(name).paper.get("linear_probe_top1")
    return [] if number is None else [number]
