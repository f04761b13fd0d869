"""Recipes as text: the tree, the path, one resolved recipe, the difference of two."""

from collections.abc import Mapping, Sequence
from itertools import chain, repeat, zip_longest
from textwrap import wrap

import yaml

from .files import SECTIONS, read, read_sweep, recipe_names, sweep_members, sweep_names, tier_names
from .loader import load_recipe
from .recipe import Recipe


END_OF_PATH = "l_dae"
WIDTH = 140  # of the tree


Results = Mapping[str, Sequence[str]]  # recipe -> what was measured of it, a cell for each tier


def tree_text(ours: Results | None = None, source: str = "") -> str:
    """The path from top to bottom, what branches off under each step, the paper's numbers beside ours; then the tiers.

    A sweep is one line with its members below; a member that the path goes through stands in the path instead.

    Args:
        ours: results, as `cpu 41.4 ±0.6 (3)`, with the half of a 95 % interval over so many seeds; None for none.
        source: where they come from, for the line below the tree.
    """
    family, results_of = {name: load_recipe(name) for name in recipe_names()}, ours or {}
    path = family[END_OF_PATH].steps
    members = {sweep: [name for name in sweep_members(sweep) if name not in path] for sweep in sweep_names()}
    sweep_of = {name: sweep for sweep, names in members.items() for name in names}
    rows = [("recipe", "", "paper", "fid", ["ours"], ["change"])]

    def add(name: str, lead: str, below: str) -> None:
        if name in members:
            paper, fid, results, changes, children = "", "", [], [read_sweep(name)["why"]], members[name]
        else:
            recipe = family[name]
            paper, fid, results = _paper_number(recipe), str(recipe.paper.get("fid", "")), results_of.get(name, [])
            changes = _changes(family[recipe.parent], recipe) if recipe.parent else [recipe.why]
            children = [other for other in family if family[other].parent == name and other not in path]
            children = list(dict.fromkeys(sweep_of.get(child, child) for child in children))
        rows.append((lead + name, below + ("│" if children else ""), paper, fid, results, changes))
        for child in children:
            last = child == children[-1]
            add(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))

    for name in path:
        add(name, "", "")
    widths = [max(len(row[column]) for row in rows) for column in (0, 2, 3)]
    widths.append(max(len(result) for row in rows for result in row[4]))
    rest = WIDTH - sum(widths) - 2 * len(widths)
    lines = []
    for first, below, paper, fid, results, changes in rows:
        if len(changes) > 1:  # break between changes, not inside one
            changes = [change.replace(" ", "\u00a0") for change in changes]
        parts = wrap(", ".join(changes), rest, break_long_words=False, break_on_hyphens=False)
        cells = chain([(first, paper, fid)], repeat((below, "", "")))
        for part, result in zip_longest(parts, results, fillvalue=""):
            cell = (*next(cells), result)
            columns = [f"{text:<{width}}" for text, width in zip(cell, widths, strict=True)]
            lines.append("  ".join([*columns, part.replace("\u00a0", " ")]).rstrip())
    lines += ["", "the path runs down the left edge: each step changes the one above it"]
    lines += ["paper: ImageNet-1k linear probe, top-1 in %, clean input at timestep 10; fid: of 50,000 samples"]
    protocols = {recipe.paper["protocol"] for recipe in family.values() if "protocol" in recipe.paper}
    lines += [f"* {protocol}" for protocol in sorted(protocols)]
    if ours is not None:
        lines += [f"ours: {source}; linear probe on the images of the tier, mean ± half its 95 % interval (seeds)"]
    lines += ["", "tiers, for --tier:"]
    lines += _columns([(f"  {tier}", read(tier, "tier")["why"]) for tier in tier_names()])
    return "\n".join(lines)


def path_markdown(ours: Results | None = None) -> str:
    """The steps of the path as a markdown table: what changes, the paper's linear probe, ours (see [`tree_text`])."""
    path = [load_recipe(name) for name in load_recipe(END_OF_PATH).steps]
    lines = ["| step | changes | paper top-1 | ours |", "|---|---|---|---|"]
    for parent, recipe in zip([None, *path], path, strict=False):
        changes = ", ".join(f"`{change}`" for change in _changes(parent, recipe)) if parent else recipe.why
        cells = (f"`{recipe.name}`", changes, _paper_number(recipe), ", ".join((ours or {}).get(recipe.name, [])))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def show_text(recipe: Recipe) -> str:
    """The resolved recipe as YAML; a comment says who set each value that is not the root's."""
    lines = [f"# {recipe.title}: {recipe.why}", f"# path: {' > '.join(recipe.steps)}"]
    if recipe.paper:
        lines.append(f"# paper: {_scalar(recipe.paper)}")
    for section in SECTIONS:
        lines.append(f"{section}:")
        values = {key: f"  {key}: {_scalar(value)}" for key, value in getattr(recipe, section).items()}
        width = max(map(len, values.values()))
        for key, text in values.items():
            origin = recipe.origins.get(f"{section}.{key}")
            lines.append(f"{text:<{width}}  # {origin}" if origin else text)
    return "\n".join(lines)


def diff_text(first: Recipe, second: Recipe) -> str:
    """The values in which two resolved recipes differ, one row each."""
    rows = [
        (f"{section}.{key}", _scalar(value), _scalar(getattr(second, section)[key]))
        for section in SECTIONS
        for key, value in getattr(first, section).items()
        if value != getattr(second, section)[key]
    ]
    if not rows:
        return f"{first.title} and {second.title} have the same values."
    return "\n".join(_columns([("key", first.title, second.title), *rows]))


def _changes(parent: Recipe, recipe: Recipe) -> list[str]:
    return [
        f"{key}: {_scalar(getattr(parent, section)[short])} → {_scalar(getattr(recipe, section)[short])}"
        for key, origin in recipe.origins.items()
        if origin == recipe.name
        for section, _, short in [key.partition(".")]
    ]


def _paper_number(recipe: Recipe) -> str:
    """The paper's linear probe, with a star where its protocol is another."""
    number = str(recipe.paper.get("linear_probe_top1", ""))
    return f"{number} *" if "protocol" in recipe.paper else number


def _scalar(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
