"""Linear probes of recipes out of a ledger: what a figure or a table of recipes may show side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..recipes import Recipe, load_recipe, recipe_names
from .intervals import mean_cell
from .ledger import LEDGER, read_ledger


class ProbeResult(NamedTuple):
    """Top-1 in percent of an encoder, and of its floors by name, on a data set; the seed of its training, if known."""

    top1: float
    floors: dict[str, float]
    dataset: str
    seed: int | None = None


ByEncoder = dict[str, ProbeResult]


def probe_results(
    recipes: Mapping[str, Recipe], ledger: str | Path = LEDGER, tier: str | None = None
) -> dict[str, ByEncoder]:
    """What a ledger says of recipes at one tier: recipe -> encoder -> result, the last one of an encoder.

    Only results as the recipe says count: without overrides, of clean input at its timestep, and of the paper's kind of
    feature, the mean over tokens after the last block.

    Args:
        recipes: by name. ledger: JSON lines, as `ldae probe` appends them. tier: None is full size.

    Raises:
        ValueError: there is no such file, or a linear probe in it is no result.
    """
    return {name: tiers.get(tier, {}) for name, tiers in _by_tier(recipes, ledger).items()}


def last_of_each_seed(results: ByEncoder) -> ByEncoder:
    """Of the encoders of one seed the one that was measured last; all whose seed is not known."""
    last = {encoder if one.seed is None else one.seed: encoder for encoder, one in results.items()}
    return {encoder: results[encoder] for encoder in last.values()}


def probe_cells(ledger: str | Path = LEDGER) -> dict[str, list[str]]:
    """What a ledger says of each packaged recipe on the images that it was trained on, tier by tier, as
    `cpu 41.4 ±0.6 (3)`: the mean over seeds, half its 95 % interval, and how many there are.

    Raises:
        ValueError: as [`probe_results`].
    """
    measured = _by_tier({name: load_recipe(name) for name in recipe_names()}, ledger, elsewhere=False)
    return {
        recipe: [
            f"{tier or 'full size'} {mean_cell([one.top1 for one in last_of_each_seed(results).values()])}"
            for tier, results in sorted(tiers.items(), key=lambda item: item[0] or "full size")
        ]
        for recipe, tiers in measured.items()
    }


def _by_tier(
    recipes: Mapping[str, Recipe], ledger: str | Path, elsewhere: bool = True
) -> dict[str, dict[str | None, ByEncoder]]:
    """Recipe -> tier -> encoder -> result; `elsewhere`: also on other images than those of the training."""
    if not Path(ledger).is_file():
        raise ValueError(f"There is no ledger {ledger}; `ldae probe` and `ldae fid` write one with --ledger.")
    found: dict[str, dict[str | None, ByEncoder]] = {name: {} for name in recipes}
    for number, row in enumerate(read_ledger(ledger), start=1):
        try:
            recipe = recipes.get(row.get("recipe"))
            if recipe is None or row["task"] != "linear_probe" or row.get("overrides"):
                continue
            features, training = row["protocol"]["features"], row.get("training") or {}
            if _as_recipe_says(features, recipe):
                floors = {name: float(floor["top1"]) for name, floor in row.get("floors", {}).items()}
                dataset = row["protocol"]["train"]["dataset"]
                if elsewhere or training.get("dataset", dataset) == dataset:
                    encoders = found[recipe.name].setdefault(row["tier"], {})
                    name = features.get("encoder", f"of row {number}")
                    encoders.pop(name, None)  # so that the order is that in which they were measured
                    encoders[name] = ProbeResult(float(row["top1"]), floors, dataset, training.get("seed"))
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{ledger}: row {number} is no result as `ldae probe` writes it.") from error
    return found


def _as_recipe_says(features: dict, recipe: Recipe) -> bool:
    stated = (features["timestep"], features.get("noise", "clean"), features.get("layer", "last"))
    pool = features.get("pool", "mean over tokens, after")
    after_norm = isinstance(pool, str) and pool.startswith("mean over tokens, after")
    return stated == (recipe.model["feature_timestep"], "clean", "last") and after_norm
