"""Both columns of the paper's Table 1 out of a ledger: the linear probe and the Fréchet distance of the same encoders,
along the path. Distances that cannot be compared never share a table.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..recipes import Recipe, load_recipe
from ..recipes.display import END_OF_PATH
from .distances import comparison, distance_label
from .intervals import mean_cell
from .ledger import LEDGER, read_ledger
from .probe_results import ProbeResult, last_of_each_seed, probe_results


HEAD = ("step", "paper top-1", "paper FID", "top-1", "distance")


@dataclass
class PathStep:
    """A recipe of the path, the paper's numbers, and ours of each encoder: top-1 in percent, distances and floors."""

    recipe: str
    paper_top1: float | None
    paper_fid: float | None
    top1: list[float] = field(default_factory=list)
    distance: list[float] = field(default_factory=list)
    floors: dict[str, list[float]] = field(default_factory=dict)


@dataclass
class PathGroup:
    """The path under distances that may be compared; `label` is the name of all of them."""

    label: str
    steps: list[PathStep]

    def floors(self) -> dict[str, tuple[float, float]]:
        """The smallest and the largest of each, over all steps."""
        found = {}
        for step in self.steps:
            for name, values in step.floors.items():
                found.setdefault(name, []).extend(values)
        return {name: (min(values), max(values)) for name, values in found.items()}


def path_groups(ledger: str | Path = LEDGER, tier: str | None = None) -> list[PathGroup]:
    """What a ledger says of the recipes of the path at one tier, in groups of comparable distances.

    Results with overrides do not count, nor probes at another timestep than the recipe's, with noise, or on another
    data set than the distances' reference; of several results of an encoder the last one counts, and of several
    encoders of a seed the last one. Where encoders of a step have both numbers, only these are shown.

    Args:
        ledger: JSON lines, as `ldae probe` and `ldae fid` append them. tier: None is full size.

    Returns:
        Groups in the order in which they appear in the ledger.

    Raises:
        ValueError: there is no such file, a line in it is no result, or it has no distance of the path at this tier.
    """
    path = {name: load_recipe(name) for name in load_recipe(END_OF_PATH).steps}
    probes = probe_results(path, ledger, tier)
    groups: dict[str, dict[str, dict[str, dict]]] = {}  # comparison -> recipe -> encoder -> row
    tiers = set()
    for number, row in enumerate(read_ledger(ledger), start=1):
        try:
            recipe = path.get(row.get("recipe"))
            if recipe is None or row.get("overrides") or row["task"] != "frechet_distance":
                continue
            tiers.add(row["tier"] or "full size")
            if row["tier"] == tier:
                group = groups.setdefault(comparison(row), {name: {} for name in path})
                group[recipe.name].pop(encoder := row["protocol"]["encoder"], None)
                group[recipe.name][encoder] = row  # in the order in which they were measured
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{ledger}: row {number} is no result as `ldae fid` writes it.") from error
    if not groups:
        there = (
            f"; there are some at {', '.join(sorted(tiers))}" if tiers else "; measure some with `ldae fid --ledger`"
        )
        raise ValueError(f"{ledger} has no Fréchet distances of the path's recipes at {tier or 'full size'}{there}.")
    found = []
    for group in groups.values():
        protocol = next(row for rows in group.values() for row in rows.values())["protocol"]
        dataset = protocol["reference"]["dataset"]
        steps = [_step(path[name], probes[name], rows, dataset) for name, rows in group.items()]
        found.append(PathGroup(distance_label(protocol, seed=False), steps))
    return found


def choose_group(groups: list[PathGroup], number: int | None = None) -> PathGroup:
    """The group of this number, from 1 on; without one, the only group that there is.

    Raises:
        ValueError: there are several, or none of this number; the message lists them.
    """
    if number is None and len(groups) == 1:
        return groups[0]
    if number is not None and 1 <= number <= len(groups):
        return groups[number - 1]
    labels = "; ".join(f"{place}: {group.label}" for place, group in enumerate(groups, start=1))
    raise ValueError(f"Distances that cannot be compared share no figure; choose a group: {labels}.")


def path_text(group: PathGroup, markdown: bool = False) -> str:
    """A group as a table, below its label; the last lines are the floors, as they range over the steps.

    A cell of ours is the mean over seeds, ± half its 95 % interval, in brackets their number.
    """
    rows = [HEAD]
    for step in group.steps:
        name = f"`{step.recipe}`" if markdown else step.recipe
        paper = ["" if number is None else f"{number:.1f}" for number in (step.paper_top1, step.paper_fid)]
        rows.append((name, *paper, mean_cell(step.top1), mean_cell(step.distance)))
    for name, (low, high) in group.floors().items():
        value = f"{low:.1f}" if f"{low:.1f}" == f"{high:.1f}" else f"{low:.1f} ... {high:.1f}"
        rows.append((f"floor: {name}", "", "", "", value))
    if markdown:
        lines = [f"| {' | '.join(row)} |" for row in rows]
        return "\n".join([group.label, "", lines[0], "|---|---|---|---|---|", *lines[1:]])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join([group.label, "", *lines])


def _step(recipe: Recipe, probes: dict[str, ProbeResult], rows: dict[str, dict], dataset: str) -> PathStep:
    step = PathStep(recipe.name, recipe.paper.get("linear_probe_top1"), recipe.paper.get("fid"))
    probes = {encoder: found for encoder, found in probes.items() if found.dataset == dataset}
    if both := probes.keys() & rows.keys():
        probes, rows = ({encoder: one for encoder, one in found.items() if encoder in both} for found in (probes, rows))
    step.top1 = [found.top1 for found in last_of_each_seed(probes).values()]
    seeds = {encoder: (row.get("training") or {}).get("seed") for encoder, row in rows.items()}
    last = {encoder if seeds[encoder] is None else seeds[encoder]: row for encoder, row in rows.items()}
    for row in last.values():
        step.distance.append(float(row["frechet_distance"]))
        for name, floor in row["floors"].items():
            step.floors.setdefault(name, []).append(float(floor["frechet_distance"]))
    return step
