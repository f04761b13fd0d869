"""Figure 5: accuracy over K, the latent dimension of a token, for each tokenizer; the paper's points and ours."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from ...recipes import load_recipe, sweep_members
from ..intervals import t_interval
from ..ledger import LEDGER
from ..probe_results import ProbeResult, last_of_each_seed, probe_results
from .style import FONT, GREY, LINE, ONE_COLUMN, SERIES, TWO_COLUMNS, new_figure, say


SWEEPS = {
    "patch_pca_k": "patch PCA",
    "patch_ae_k": "patch AE",
    "patch_vae_k": "patch VAE",
    "conv_vae_k": "conv. VAE",
    "pixels_size": "pixels",
    "l_dae_k": "l-DAE",
}
# Of our floors, those of all curves alike, by the beginnings of their names: a line in grey, by its dashes.
FLOORS = {"random whitened patches": (0, (5, 1.5)), "untrained encoder": (0, (1, 1.5))}
FEWEST = 3  # encoders whose interval a panel makes room for: that of two is a multiple of what they differ by
HEIGHT = 2.55  # inches


@dataclass(frozen=True)
class Curve:
    """Points of one sweep, by falling K: (K, top-1 of each encoder in percent); the paper's have one value each."""

    name: str
    points: list[tuple[int, list[float]]]


@dataclass(frozen=True)
class Panel:
    """Curves of the same images; `patch_dim` is P, the values of a patch of the full image, and `floors` are the
    numbers of each floor by its name, over all points."""

    title: str
    patch_dim: int
    curves: list[Curve]
    floors: dict[str, list[float]] = field(default_factory=dict)


def curve_panels(ledger: str | Path | None = LEDGER, tier: str | None = None) -> list[Panel]:
    """The paper's points and, where there are any, ours out of a ledger.

    Args:
        ledger: as [`probe_results`] reads it; None for the paper alone. tier: of our results; None is full size.

    Raises:
        ValueError: there is no such ledger or tier, or a row is no result.
    """
    panels = [_panel("paper, ImageNet-1k", None, _paper)]
    if ledger is not None:
        members = {name: load_recipe(name) for sweep in SWEEPS for name in _members(sweep)}
        measured = {name: last_of_each_seed(found) for name, found in probe_results(members, ledger, tier).items()}
        dataset = load_recipe("l_dae", tier).data["dataset"]
        ours = {name: [one for one in found.values() if one.dataset == dataset] for name, found in measured.items()}
        title = f"ours, {dataset} (tier {tier})" if tier else f"ours, {dataset}"
        panels.append(_panel(title, tier, lambda name: [one.top1 for one in ours[name]], _floors(ours)))
    return [panel for panel in panels if panel.curves]


def curve_figure(panels: list[Panel]) -> Figure:
    """Draws the mean over seeds, and its 95 % t-interval where there are several, over K and over its share of P.

    The interval of two seeds may reach beyond the panel. Thin grey lines are the floors, each the median over all
    points. The pixels of a smaller image have fewer values in a patch, all of which are kept; K / P is of the full
    image's patch.

    Args:
        panels: from [`curve_panels`], side by side.
    """
    named = {name for panel in panels for name in panel.floors}
    height = HEIGHT + LINE if named else HEIGHT  # then the legend takes another line
    figure = new_figure(ONE_COLUMN if len(panels) == 1 else TWO_COLUMNS, height)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    styles = dict(zip(SWEEPS.values(), SERIES, strict=True))
    shares = [k / panel.patch_dim for panel in panels for curve in panel.curves for k, _ in curve.points]
    for axis, panel in zip(axes, panels, strict=True):
        for curve in panel.curves:
            places = [latent_dim for latent_dim, _ in curve.points]
            found = [t_interval(values) for _, values in curve.points]
            spread = [one.half_width or 0 for one in found]
            look = dict(**styles[curve.name], markersize=4, linewidth=1.2, capsize=2, elinewidth=0.8)
            axis.errorbar(places, [one.mean for one in found], spread if any(spread) else None, **look)
        for name, values in panel.floors.items():
            axis.axhline(median(values), color=GREY, linewidth=0.8, linestyle=FLOORS[name], zorder=1)
        axis.set_ylim(*_limits(panel))
        _axes(axis, panel, min(shares) / 1.3, max(shares) * 1.3)
    axes[0].set_ylabel("linear probe, top-1 (%)", fontsize=FONT)
    drawn = {curve.name for panel in panels for curve in panel.curves}
    handles = [Line2D([], [], **style, markersize=4, label=name) for name, style in styles.items() if name in drawn]
    look = dict(color=GREY, linewidth=0.8)
    handles += [
        Line2D([], [], **look, linestyle=dashes, label=name) for name, dashes in FLOORS.items() if name in named
    ]
    ncols = 3 if len(panels) == 1 else len(drawn) if not named else 4
    figure.legend(
        handles=handles, loc="outside lower center", ncols=ncols, fontsize=FONT, frameon=False, columnspacing=1.2
    )
    return figure


def _limits(panel: Panel) -> tuple[float, float]:
    """Lowest and highest top-1 that a panel shows: all means and floors, and intervals of enough encoders."""
    shown = [median(values) for values in panel.floors.values()]
    for found in (t_interval(values) for curve in panel.curves for _, values in curve.points):
        spread = found.half_width if found.count >= FEWEST else 0
        shown += [found.mean - spread, found.mean + spread]
    edge = 0.06 * (max(shown) - min(shown)) or 1
    return min(shown) - edge, max(shown) + edge


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


def _panel(title: str, tier: str | None, values_of: Callable[[str], list[float]], floors: dict | None = None) -> Panel:
    side = load_recipe("patch_pca", tier).model["patch_size"]
    curves = []
    for sweep, shown in SWEEPS.items():
        points = [(load_recipe(name, tier).model["latent_dim"], values_of(name)) for name in _members(sweep)]
        points = sorted((point for point in points if point[1]), reverse=True)
        if points:
            curves.append(Curve(shown, points))
    return Panel(title, 3 * side**2, curves, floors or {})


def _members(sweep: str) -> list[str]:
    """The recipes of a sweep and the one that it starts from, which is a point too."""
    members = sweep_members(sweep)
    return [load_recipe(members[0]).parent, *members]


def _floors(measured: dict[str, list[ProbeResult]]) -> dict[str, list[float]]:
    """The numbers of each of `FLOORS` that there is."""
    found: dict[str, list[float]] = {}
    for name in FLOORS:
        for result in (result for results in measured.values() for result in results):
            values = [top1 for floor, top1 in result.floors.items() if floor.startswith(name)]
            if values:
                found.setdefault(name, []).extend(values)
    return found


def _paper(name: str) -> list[float]:
    number = load_recipe(name).paper.get("linear_probe_top1")
    return [] if number is None else [number]
