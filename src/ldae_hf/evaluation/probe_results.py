"""Linear probes of recipes out of a ledger: what a figure or a table of recipes may show side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from ..recipes import Recipe
from .ledger import LEDGER, read_ledger


class ProbeResult(NamedTuple):
    """Top-1 in percent of an encoder, and of its floors by name, on a data set."""

    top1: float
    floors: dict[str, float]
    dataset: str


def probe_results(
    recipes: Mapping[str, Recipe], ledger: str | Path = LEDGER, tier: str | None = None
) -> dict[str, dict[str, ProbeResult]]:
    """What a ledger says of recipes at one tier: recipe -> encoder -> result, the last one of an encoder.

    Only results as the recipe says count: without overrides, of clean input at its timestep, and of the paper's kind of
    feature, the mean over tokens after the last block.

    Args:
        recipes: by name. ledger: JSON lines, as `ldae probe` appends them. tier: None is full size.

    Raises:
        ValueError: there is no such file, or a linear probe in it is no result.
    """
    if not Path(ledger).is_file():
        raise ValueError(f"There is no ledger {ledger}; `ldae probe` and `ldae fid` write one with --ledger.")
    found: dict[str, dict[str, ProbeResult]] = {name: {} for name in recipes}
    for number, row in enumerate(read_ledger(ledger), start=1):
        try:
            recipe = recipes.get(row.get("recipe"))
            if recipe is None or row["task"] != "linear_probe" or row.get("overrides") or row["tier"] != tier:
                continue
            features = row["protocol"]["features"]
            if _as_recipe_says(features, recipe):
                floors = {name: float(floor["top1"]) for name, floor in row.get("floors", {}).items()}
                result = ProbeResult(float(row["top1"]), floors, row["protocol"]["train"]["dataset"])
                found[recipe.name][features.get("encoder", f"of row {number}")] = result
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{ledger}: row {number} is no result as `ldae probe` writes it.") from error
    return found


def _as_recipe_says(features: dict, recipe: Recipe) -> bool:
    stated = (features["timestep"], features.get("noise", "clean"), features.get("layer", "last"))
    pool = features.get("pool", "mean over tokens, after")
    after_norm = isinstance(pool, str) and pool.startswith("mean over tokens, after")
    return stated == (recipe.model["feature_timestep"], "clean", "last") and after_norm
