"""Rows of a ledger as a model card shows them: those of this model, beside the paper's numbers and the floors."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import mean, stdev

from ..recipes import Recipe, load_recipe, recipe_names


IMAGENET = ("ILSVRC/imagenet-1k", "timm/imagenet-1k-wds")
PROBE, KNN, DISTANCE, RECONSTRUCTION = "linear_probe", "knn", "frechet_distance", "reconstruction"
COMMANDS = {PROBE: "ldae probe", KNN: "ldae knn", DISTANCE: "ldae fid", RECONSTRUCTION: "ldae tokenizer evaluate"}


@dataclass
class Result:
    """One number of this model, with the row that it stands in.

    Attributes:
        name: what was measured, `what` with its unit. protocol: on what and how, briefly. dataset: and its split.
        floors: the same number of what needs no training. comparable: measured as the paper's.
        runs: by encoder, the number of every run of the recipe under this protocol, this one included.
    """

    task: str
    row: dict
    name: str
    protocol: str
    value: float
    dataset: tuple[str, str | None]
    floors: dict[str, float] = field(default_factory=dict)
    comparable: bool = False
    runs: dict[str, float] = field(default_factory=dict)

    @property
    def is_accuracy(self) -> bool:
        return self.task in (PROBE, KNN)

    @property
    def what(self) -> str:
        return f"{self.name}, top-1" if self.is_accuracy else self.name

    @property
    def shown(self) -> str:
        return f"{self.value:.1f}" if self.task != RECONSTRUCTION else f"{self.value:.4f}"

    @property
    def seeds(self) -> str:
        """How many runs there are, and where they lie."""
        values = list(self.runs.values())
        return f"{len(values)}: {mean(values):.1f} ±{stdev(values):.1f}" if len(values) > 1 else "1"

    @property
    def better_floors(self) -> dict[str, float]:
        return {name: value for name, value in self.floors.items() if value > self.value}

    @property
    def beaten_floors(self) -> dict[str, float]:
        return {name: value for name, value in self.floors.items() if value <= self.value}


def results_of_model(rows: Iterable[dict], recipe: Recipe, config, training: dict) -> list[Result]:
    """The results of the model that was trained by `recipe` as `training` says; of equal ones the last row counts.

    A row is this model's if recipe, tier, overrides, data, seed, steps, the weights that it began with and the basis of
    its PCA are; one of a tokenizer, if the tokenizer is. Rows of the recipe's other runs, on these data from these
    weights, only count in `Result.runs`.

    Raises:
        ValueError: a row that should be this model's is not as our commands write it.
    """
    own, runs = {}, {}
    for row in rows:
        if row.get("task") not in COMMANDS:
            continue
        try:
            if not _is_of_recipe(row, recipe, config) or not _began_alike(row, recipe, training):
                continue
            result, encoder = _result(row, recipe)
            key = (result.name, result.protocol)
            runs.setdefault(key, {})[encoder] = result.value
            if row["task"] == RECONSTRUCTION or _is_of_run(row, config, training):
                own[key] = result
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            where = f"The row of {row.get('time')} with task {row['task']!r}"
            raise ValueError(f"{where} is no result as `{COMMANDS[row['task']]}` writes it: {error!r}.") from error
    for key, result in own.items():
        result.runs = runs[key]
    return sorted(own.values(), key=lambda result: list(COMMANDS).index(result.task))


def paper_and_ours(recipe: Recipe, results: list[Result]) -> list[dict]:
    """Rows of `what`, `paper`, `how` and `ours` (one result or none); a row has both only if they were measured alike.

    At full size the paper's numbers of the same model after a longer training stand there too.
    """
    full_size, names = _is_full_size(recipe), recipe_names()
    longer = [load_recipe(name) for name in names if full_size and name != recipe.name]
    family = [recipe] + [other for other in longer if (other.model, other.data) == (recipe.model, recipe.data)]
    table, left = [], list(results)
    for member in family:
        paper = member.paper
        epochs = f"{load_recipe(member.name).train['epochs']:,} epochs" if member.name in names else ""
        clean = f"clean input at t = {member.model['feature_timestep']}"
        source = f"Table {paper['table']}" if "table" in paper else f"the text on {paper.get('text', 'it')}"
        for key, what, protocol in (
            ("linear_probe_top1", "linear probe, top-1", paper.get("protocol", clean)),
            ("fine_tune_top1", "fine-tuning, top-1", ""),
            ("fid", "FID-50K", ""),
        ):
            if key in paper:
                alike = [r for r in left if r.comparable and member is recipe and key == "linear_probe_top1"][:1]
                left = [result for result in left if result not in alike]
                how = ", ".join(filter(None, ("ImageNet-1k at 256 px", protocol, epochs)))
                how = f"{how} ({source})" if full_size else f"not comparable, the full-size recipe: {how} ({source})"
                table.append(dict(what=what, paper=paper[key], how=how, ours=alike))
    return table + [dict(what=result.what, paper="", how=result.protocol, ours=[result]) for result in left]


def _is_full_size(recipe: Recipe) -> bool:
    return recipe.tier is None and not recipe.overrides


def _is_of_recipe(row: dict, recipe: Recipe, config) -> bool:
    if row["task"] == RECONSTRUCTION:
        return config.tokenizer_fingerprint is not None and row["protocol"]["tokenizer"] == config.tokenizer_fingerprint
    found = (row["recipe"], row["tier"], row.get("overrides") or [])
    return found == (recipe.name, recipe.tier, recipe.overrides)


def _began_alike(row: dict, recipe: Recipe, training: dict) -> bool:
    """On the same data, from new weights or from the same ones; a tokenizer's row says nothing of either."""
    if row["task"] == RECONSTRUCTION:
        return True
    default = {"dataset": recipe.data["dataset"], "start_from": None}
    return all((row["training"] or {}).get(key, value) == training.get(key, value) for key, value in default.items())


def _is_of_run(row: dict, config, training: dict) -> bool:
    basis = row["protocol"].get("features", {}).get("processor", config.processor_fingerprint)
    trained = row["training"] or {}
    same = all(training.get(key) is not None and trained.get(key) == training[key] for key in ("seed", "steps"))
    return same and basis == config.processor_fingerprint


def _result(row: dict, recipe: Recipe) -> tuple[Result, str]:
    """What a row says, and the fingerprint of what it was measured on."""
    task, protocol = row["task"], row["protocol"]
    if task == DISTANCE:
        name, _, label = row["label"].partition(" (")
        floors = {floor: float(entry["frechet_distance"]) for floor, entry in row["floors"].items()}
        reference = protocol["reference"]["dataset"], protocol["reference"]["split"]
        label = label.removesuffix(")")
        return Result(task, row, name, label, float(row[task]), reference, floors), protocol["encoder"]
    test = protocol["test"]
    where = f"{test['dataset']} {test['split'] or ''}".strip() + f" at {protocol['image_size']} px"
    dataset = test["dataset"], test["split"]
    if task == RECONSTRUCTION:
        label = f"{where}; pixels in [-1, 1], K = {row['latent_dim']}; PCA {row['pca']['squared_error']:.4f}"
        found = Result(task, row, "tokenizer, squared error", label, float(row["squared_error"]), dataset)
        return found, protocol["tokenizer"]
    features = protocol["features"]
    timestep, noise = features["timestep"], features.get("noise", "clean")
    name = "linear probe" if task == PROBE else f"{protocol[KNN]['k']}-NN"
    floors = {floor: float(entry["top1"]) for floor, entry in row["floors"].items()}
    result = Result(task, row, name, f"{where}, {noise} input at t = {timestep}", float(row["top1"]), dataset, floors)
    as_the_paper = (test["dataset"] in IMAGENET, protocol["image_size"], timestep, noise)
    is_probe = task == PROBE and _is_full_size(recipe)
    result.comparable = is_probe and as_the_paper == (True, 256, recipe.model["feature_timestep"], "clean")
    return result, features["encoder"]
