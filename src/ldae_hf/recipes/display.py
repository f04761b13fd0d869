"""Recipes as text: the path, one resolved recipe, the difference of two."""

import yaml

from .files import SECTIONS, read, recipe_names, tier_names
from .loader import load_recipe
from .recipe import Recipe


def tree_text() -> str:
    """Every recipe under its parent, with the paper's linear probe and what the step changes; then the tiers."""
    recipes = {name: load_recipe(name) for name in recipe_names()}
    rows = [("recipe", "paper", "change")]

    def add(name: str, lead: str, branch: str, below: str) -> None:
        recipe = recipes[name]
        number = recipe.paper.get("linear_probe_top1", "")
        if "protocol" in recipe.paper:
            number = f"{number} *"
        parent = recipes.get(recipe.parent)
        rows.append((lead + branch + name, str(number), _changes(parent, recipe) if parent else recipe.why))
        children = [child for child, other in recipes.items() if other.parent == name]
        children.sort(key=lambda child: (len(child), child))  # epochs_800 comes before epochs_1600
        for child in children:
            last = child == children[-1]
            add(child, lead + below, "└─ " if last else "├─ ", "   " if last else "│  ")

    for name, recipe in recipes.items():
        if recipe.parent is None:
            add(name, "", "", "")
    lines = _columns(rows)
    lines += ["", "paper: ImageNet-1k linear probe, top-1 in %, clean input at timestep 10"]
    protocols = {recipe.paper["protocol"] for recipe in recipes.values() if "protocol" in recipe.paper}
    lines += [f"* {protocol}" for protocol in sorted(protocols)]
    lines += ["", "tiers, for --tier:"]
    lines += _columns([(f"  {tier}", read(tier, "tier")["why"]) for tier in tier_names()])
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


def _changes(parent: Recipe, recipe: Recipe) -> str:
    return ", ".join(
        f"{key}: {_scalar(getattr(parent, section)[short])} → {_scalar(getattr(recipe, section)[short])}"
        for key, origin in recipe.origins.items()
        if origin == recipe.name
        for section, _, short in [key.partition(".")]
    )


def _scalar(value) -> str:
    return yaml.safe_dump(value, default_flow_style=True, sort_keys=False, width=1000).removesuffix("...\n").strip()


def _columns(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
