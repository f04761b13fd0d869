"""What a ledger says of the rows of an experiment: numbers by seed, all of one protocol, and the floors beside them."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..evaluation.distances import comparison
from ..evaluation.finetuning.recipe import FineTuningRecipe
from ..evaluation.groups import Group
from ..evaluation.measures import floor_of
from ..evaluation.protocols import signature
from ..recipes import Recipe, RecipeError, load_recipe
from ..recipes.display import END_OF_PATH
from ..recipes.files import read
from .experiments import Experiment, Row


# Measure -> the task of its rows in the ledger. At full size a probe is the paper's own, on augmented images.
TASKS = {
    "probe": "linear_probe",
    "cached_probe": "linear_probe",
    "distance": "frechet_distance",
    "fine_tune": "fine_tune",
    "depth": "sweep_depth",
    "timesteps": "sweep_timestep",
    "best_noisy": "sweep_timestep",
}
SWEEPS = ("sweep_depth", "sweep_timestep")
FULL_PROBE = "full_linear_probe"
# They do not depend on the recipe, only on the dimension. A name may go on, as in `raw pixels at 32x32`.
SHARED_FLOORS = ("raw pixels", "random whitened patches")


@dataclass
class Numbers:
    """Of an experiment at a tier.

    Attributes:
        values: by label and measure of a row, its numbers by seed.
        floors: by measure and name, what is measured of no trained encoder, over all rows.
        left_out: sentences on rows of the ledger that were measured in another way than most.
        machines: on which the models were trained, as far as it was recorded.
    """

    values: dict[tuple[str, str], dict[int, float]]
    floors: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)
    machines: set[str] = field(default_factory=set)

    def of(self, row: Row) -> dict[int, float]:
        return self.values[row.label, row.measure]


def task_of(measure: str, tier: str | None) -> str:
    """The task that measures it at a tier; None is full size."""
    return FULL_PROBE if measure == "probe" and tier is None else TASKS[measure]


def numbers(experiment: Experiment, rows: Iterable[dict], tier: str | None) -> Numbers:
    """The numbers of an experiment's rows in a ledger.

    Only results as the recipe says count: without overrides, on the recipe's data at its image size, of clean input at
    its timestep where the row does not say otherwise. Of the protocols under which a task was measured the one with the
    most trained models counts, and what was measured under another is left out.

    Raises:
        RecipeError: there is no such tier.
        ValueError: a row of the ledger is no result as our commands write it.
    """
    if tier is not None:
        read(tier, "tier")  # raises: else every row would only be one that the tier does not have
    found, rows = Numbers({(row.label, row.measure): {} for row in experiment.rows}), list(rows)
    for task in dict.fromkeys(task_of(row.measure, tier) for row in experiment.rows):
        wanted = [row for row in experiment.rows if task_of(row.measure, tier) == task]
        by_recipe = {row.recipe: _of_recipe(row.recipe, rows, task, tier) for row in wanted}
        counts = Counter(one.protocol for of_recipe in by_recipe.values() for one in of_recipe)
        if not counts:
            continue
        chosen = counts.most_common(1)[0][0]
        for name, of_recipe in by_recipe.items():
            by_recipe[name] = kept = [one for one in of_recipe if one.protocol == chosen]
            if lost := {one.seed for one in of_recipe} - {one.seed for one in kept}:
                seeds = ", ".join(map(str, sorted(lost)))
                found.left_out.append(f"{task} of {name}, seed {seeds}: measured under another protocol than the rest")
        for row in wanted:
            for one in by_recipe[row.recipe]:
                with _reading(one.number, task):
                    number = _number(row, one.row)
                if number is not None:
                    found.values[row.label, row.measure][one.seed] = number
        measured = [one for of_recipe in by_recipe.values() for one in of_recipe]
        floors = _all_floors(measured, rows, task, load_recipe(END_OF_PATH, tier).tier)
        found.floors |= {row.measure: floors for row in wanted}
        places = [one.row["training"].get("machine") or {} for one in measured]
        found.machines |= {str(place.get("gpu") or place.get("cpu")) for place in places if place}
    return found


class _Result(NamedTuple):
    """A row of the ledger, its number from 1, and what of its protocol is equal where two may be compared."""

    number: int
    row: dict
    seed: int
    protocol: str


@contextmanager
def _reading(number: int, task: str) -> Iterator[None]:
    """Raises ValueError, which names the row of the ledger, where it lacks something."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"Row {number} of the ledger is no {task} as our commands write it: {error!r}.") from error


def _of_recipe(name: str, rows: Sequence[dict], task: str, tier: str | None) -> list[_Result]:
    """The results of one recipe and task, the last one of each seed and protocol."""
    try:
        group, recipe, last = Group(name, recipe=name), load_recipe(name, tier), {}
    except RecipeError:  # the tier has no such model
        return []
    for number, row in enumerate(rows, start=1):
        if (row.get("task"), row.get("tier")) != (task, recipe.tier):
            continue
        with _reading(number, task):
            seed = (row.get("training") or {}).get("seed")  # None of a model that was not trained here
            if group.matches(row) and type(seed) is int and _is_plain(row, recipe):
                protocol = _protocol(row)
                last[seed, protocol] = _Result(number, row, seed, protocol)
    return list(last.values())


def _is_plain(row: dict, recipe: Recipe) -> bool:
    """Whether it is of the encoder itself, on the recipe's data and at its image size, at its timestep on clean input
    unless that is what is varied."""
    protocol = row["protocol"]
    split = protocol.get("test") or protocol.get("reference")
    if Path(split["dataset"]).name != Path(recipe.data["dataset"]).name:
        return False
    if row["task"] == "frechet_distance":
        return True
    if floor_of(row) is not None or protocol["image_size"] != recipe.model["image_size"]:
        return False
    if row["task"] == "sweep_timestep" or recipe.is_masked:
        return True
    features = protocol["features"]
    at = features.get("timestep", recipe.model["feature_timestep"])
    noise = str(features.get("noise") or "clean").partition(",")[0]
    return (at, noise) == (recipe.model["feature_timestep"], "clean")


def _protocol(row: dict) -> str:
    """What two rows have in common if they may be compared. What the model decides is not part of it: the size of its
    images, and in fine-tuning the layer decay that goes with its width."""
    if row["task"] == "frechet_distance":
        return comparison(row)
    protocol = {key: value for key, value in row["protocol"].items() if key != "image_size"}
    if row["task"] == "fine_tune":
        settings = dict(protocol["fine_tune"])
        if settings["layer_decay"] == FineTuningRecipe().for_width(row["dim"]).layer_decay:
            del settings["layer_decay"]
        protocol["fine_tune"] = settings
    return signature(row | {"protocol": protocol})


def _number(row: Row, one: dict) -> float | None:
    """What a row of the ledger says of a row of the table; None if it lacks that point."""
    if row.measure == "distance":
        return _finite(one["frechet_distance"])
    if row.measure == "best_noisy":  # the best of the noisy points on held-out images, on the test images
        noisy = [point for point in one["points"] if point["noise"] != "clean"]
        return _finite(max(noisy, key=lambda point: point["held_out_top1"])["top1"]) if noisy else None
    if row.point:
        points = [point for point in one["points"] if all(point.get(key) == value for key, value in row.point)]
        return _finite(points[0]["top1"]) if points else None
    return _finite(one["top1"])


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise ValueError(f"{number} is no result")
    return float(number)


def _all_floors(measured: Sequence[_Result], rows: Sequence[dict], task: str, tier: str | None) -> dict[str, list]:
    """By name: those of the results' own rows, and what all recipes share, of any row that was measured like them.

    A sweep measures no floors: those beside it are of linear probes with the same head on the same images.
    """
    found: dict[str, list[float]] = {}
    with_dims = []
    for one in measured:
        with _reading(one.number, task):
            with_dims.append((_like(one.row), one.row.get("dim")))
            for name, value in _floors(one.row).items():
                if not name.startswith(SHARED_FLOORS):
                    found.setdefault(name, []).append(value)
    for number, row in enumerate(rows, start=1):
        other = "linear_probe" if task in SWEEPS else task
        if (row.get("task"), row.get("tier")) != (other, tier):
            continue
        with _reading(number, other):
            shared = {name: value for name, value in _floors(row).items() if name.startswith(SHARED_FLOORS)}
            if shared and (_like(row), row.get("dim")) in with_dims:
                for name, value in shared.items():
                    found.setdefault(name, []).append(value)
    return found


def _like(row: dict) -> str:
    """What rows have in common if the floors of one may stand beside the other."""
    if row["task"] == "frechet_distance":
        return comparison(row)
    if row["task"] not in ("linear_probe", *SWEEPS):
        return signature(row)
    # Of a floor the head counts, not where or when the encoder beside it was probed; nor how a point was selected.
    protocol = row["protocol"]
    head = {key: value for key, value in protocol[row["task"]].items() if key not in ("selection", "seed")}
    images = {split: protocol[split]["dataset"] for split in ("train", "test")}
    return json.dumps([head, images, protocol["image_size"]], sort_keys=True)


def _floors(one: dict) -> dict[str, float]:
    """Of a row of the ledger, by name, without the K that only some rows state."""
    key = "frechet_distance" if one["task"] == "frechet_distance" else "top1"
    entries = (one.get("floors") or {}).items()
    return {name.partition(", K = ")[0]: _finite(entry[key]) for name, entry in entries if entry.get(key) is not None}
