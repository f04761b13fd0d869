"""What the runs of a comparison cost, in a sentence, so that equal epochs are not taken for equal FLOPs."""

from ..recipes import Recipe, RecipeError, load_recipe
from ..training.costs import recipe_flops_per_image
from .groups import Group
from .measures import seed_of


def budget(group: Group) -> str:
    """Seeds, epochs, images seen, training FLOPs, where it was measured, and at which timestep, of a group with rows.

    FLOPs are those of the recipe's network on the images seen: no tokenizer, no data. What nobody recorded is left out.
    """
    row = group.rows[0]
    seeds = list(dict.fromkeys(map(seed_of, group.rows)))
    what = "seed" if all(isinstance(seed, int) for seed in seeds) else "encoder"
    parts = [f"{what}{'' if len(seeds) == 1 else 's'} {', '.join(map(str, seeds))}"]
    recipe = _recipe_of(row)
    images = sorted({count for row in group.rows if (count := (row.get("training") or {}).get("images_seen"))})
    if recipe:
        parts.append(f"{recipe.train['epochs']:,} epochs")
    if images:
        parts.append(f"{_either(f'{count:,}' for count in images)} images seen")
    if recipe and images:
        flops = recipe_flops_per_image(recipe)
        parts.append(f"{_either(f'{count * flops:.2e}' for count in images)} training FLOPs")
    machines = {place.get("gpu") or place.get("cpu") for row in group.rows if (place := row.get("machine"))} - {None}
    if machines:
        parts.append(f"measured on {_either(sorted(machines))}")
    timesteps = {row["protocol"]["features"].get("timestep") for row in group.rows} - {None}
    if timesteps:
        parts.append(f"features at t = {_either(map(str, sorted(timesteps)))}")
    return f"{group.name}: {'; '.join(parts)}"


def _recipe_of(row: dict) -> Recipe | None:
    try:
        return load_recipe(row["recipe"], row.get("tier"), row.get("overrides") or ()) if row.get("recipe") else None
    except RecipeError:  # a file of the user's own, or of another version
        return None


def _either(texts) -> str:
    return " or ".join(texts)
