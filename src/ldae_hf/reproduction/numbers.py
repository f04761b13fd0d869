"""What a ledger says of the rows of an experiment: numbers by seed, all of one protocol, and the floors beside them."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from ..evaluation.distances import comparison
from ..evaluation.groups import Group
from ..evaluation.measures import seed_of
from ..evaluation.protocols import signature
from ..recipes import Recipe, RecipeError, load_recipe
from ..recipes.display import END_OF_PATH
from .experiments import Experiment, Row


# Measure -> the task of its rows in the ledger. At full size a probe is the paper's own, on augmented images.
TASKS = {
    "probe": "linear_probe",
    "distance": "frechet_distance",
    "fine_tune": "fine_tune",
    "depth": "sweep_depth",
    "timesteps": "sweep_timestep",
    "best_noisy": "sweep_timestep",
}
FULL_PROBE = "full_linear_probe"
SHARED_FLOORS = ("raw pixels", "random whitened patches")  # they do not depend on the recipe, only on the dimension


@dataclass
class Numbers:
    """Of an experiment at a tier.

    Attributes:
        values: by label and measure of a row, its numbers by seed.
        floors: by measure and name, what is measured of no trained encoder, over all rows.
        left_out: sentences on rows of the ledger that were measured in another way than most.
        dataset: whose test images they are; None without any number.
    """

    values: dict[tuple[str, str], dict[int, float]]
    floors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    def of(self, row: Row) -> dict[int, float]:
        return self.values[row.label, row.measure]


def task_of(measure: str, tier: str | None) -> str:
    """The task that measures it at a tier; None is full size."""
    return FULL_PROBE if measure == "probe" and tier is None else TASKS[measure]


def numbers(experiment: Experiment, rows: Iterable[dict], tier: str | None) -> Numbers:
    """The numbers of an experiment's rows in a ledger.

    Only results as the recipe says count: without overrides, on the recipe's data, of clean input at its timestep where
    the row does not say otherwise. Of the protocols under which a task was measured the one with the most trained
    models counts, and what was measured under another is left out.

    Raises:
        RecipeError: there is no such tier.
        ValueError: a row of the ledger is no result as our commands write it.
    """
    found, rows = Numbers({(row.label, row.measure): {} for row in experiment.rows}), list(rows)
    for task in dict.fromkeys(task_of(row.measure, tier) for row in experiment.rows):
        wanted = [row for row in experiment.rows if task_of(row.measure, tier) == task]
        by_recipe = {row.recipe: _of_recipe(row.recipe, rows, task, tier) for row in wanted}
        counts = Counter(_protocol(one) for of_recipe in by_recipe.values() for one in of_recipe)
        if not counts:
            continue
        chosen = counts.most_common(1)[0][0]
        for name, of_recipe in by_recipe.items():
            by_recipe[name] = kept = [one for one in of_recipe if _protocol(one) == chosen]
            if lost := {seed_of(one) for one in of_recipe} - {seed_of(one) for one in kept}:
                seeds = ", ".join(map(str, sorted(lost, key=str)))
                found.left_out.append(f"{task} of {name}, seed {seeds}: measured under another protocol than the rest")
        for row in wanted:
            for one in by_recipe[row.recipe]:
                number = _number(row, one)
                if number is not None and isinstance(seed_of(one), int):
                    found.values[row.label, row.measure][seed_of(one)] = number
        measured = [one for of_recipe in by_recipe.values() for one in of_recipe]
        dims = {one.get("dim") for one in measured}
        place = (task, load_recipe(END_OF_PATH, tier).tier)
        beside = [one for one in rows if (one.get("task"), one.get("tier")) == place and one.get("dim") in dims]
        beside = [one for one in beside if _protocol(one) == chosen]
        for measure in dict.fromkeys(row.measure for row in wanted):
            floors = found.floors.setdefault(measure, {})
            for one in measured:
                for name, value in _floors(measure, one).items():
                    if name not in SHARED_FLOORS:
                        floors.setdefault(name, []).append(value)
            for one in beside:
                for name, value in _floors(measure, one).items():
                    if name in SHARED_FLOORS:
                        floors.setdefault(name, []).append(value)
    return found


def _of_recipe(name: str, rows: Sequence[dict], task: str, tier: str | None) -> list[dict]:
    """The rows of one recipe and task, the last one of each seed and protocol."""
    try:
        group, recipe, last = Group(name, recipe=name), load_recipe(name, tier), {}
    except RecipeError:  # the tier has no such model
        return []
    for number, row in enumerate(rows, start=1):
        try:
            if (
                row.get("task") == task
                and row.get("tier") == recipe.tier
                and group.matches(row)
                and _is_plain(row, recipe)
            ):
                last[seed_of(row), _protocol(row)] = row
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"Row {number} of the ledger is no {task} as our commands write it: {error!r}.") from error
    return list(last.values())


def _is_plain(row: dict, recipe: Recipe) -> bool:
    """Whether it was measured on the recipe's data, at its timestep on clean input unless that is what is varied."""
    protocol = row["protocol"]
    split = protocol.get("test") or protocol.get("reference")
    if split["dataset"].rstrip("/").rpartition("/")[2] != recipe.data["dataset"].rpartition("/")[2]:
        return False
    features = protocol.get("features")
    if row["task"] in ("frechet_distance", "sweep_timestep") or recipe.is_masked:
        return True
    at = features.get("timestep", recipe.model["feature_timestep"])
    noise = str(features.get("noise") or "clean").partition(",")[0]
    return (at, noise) == (recipe.model["feature_timestep"], "clean")


def _protocol(row: dict) -> str:
    return comparison(row) if row["task"] == "frechet_distance" else signature(row)


def _number(row: Row, one: dict) -> float | None:
    """What a row of the ledger says of a row of the table; None if it lacks that point."""
    if row.measure == "distance":
        return float(one["frechet_distance"])
    if row.measure == "best_noisy":  # the best of the noisy points on held-out images, on the test images
        noisy = [point for point in one["points"] if point["noise"] != "clean"]
        return float(max(noisy, key=lambda point: point["held_out_top1"])["top1"]) if noisy else None
    if row.point:
        points = [point for point in one["points"] if all(point.get(key) == value for key, value in row.point)]
        return float(points[0]["top1"]) if points else None
    return float(one["top1"])


def _floors(measure: str, one: dict) -> dict[str, float]:
    """Of a row of the ledger, by name, without the K that only some rows state."""
    key = "frechet_distance" if measure == "distance" else "top1"
    entries = (one.get("floors") or {}).items()
    return {name.partition(", K = ")[0]: float(entry[key]) for name, entry in entries if entry.get(key) is not None}
