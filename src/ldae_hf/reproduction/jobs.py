"""What is missing of an experiment, as commands of `ldae`: trainings of tokenizers and models, and measurements."""

import json
import shlex
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LEARNED_TOKENIZERS
from ..latent_tokenizers import CONFIG_NAME
from ..manifest import MANIFEST
from ..recipes import Recipe, RecipeError, load_recipe
from ..training.run_folder import identity
from ..training.token_cache import can_be_cached
from .experiments import Experiment, Row, not_testable
from .numbers import SHARED_FLOORS, Numbers


# Of the tiers that are no full size: few images, few samples.
FEW_SAMPLES = dict(num_samples=10_000, steps=50, batch_size=128)
SHORT_FINE_TUNING = dict(
    epochs=14,
    warmup_epochs=1,
    global_batch_size=128,
    learning_rate=2e-3,
    mixup=0,
    cutmix=0,
    rand_augment=0,
    random_erasing=0,
    crop_scale="0.36,1",
    ema_decay=0.999,
)


@dataclass(frozen=True)
class Options:
    """How the machine is used, and where things are.

    Attributes:
        runs: the folder of all runs. ledger: to which results are appended.
        processes: GPUs of a training. checkpoint_every: steps; default one epoch.
        extractor: of the Fréchet distance. perceptual_weights: LPIPS's, for a tokenizer that is trained with it.
    """

    runs: Path = Path("runs")
    ledger: Path = Path("benchmarks/results/ledger.jsonl")
    processes: int = 1
    num_workers: int = 2
    per_device_batch_size: int | None = None
    checkpoint_every: int | None = None
    compile: bool = False
    extractor: Path | None = None
    perceptual_weights: Path | None = None


@dataclass(frozen=True)
class Job:
    """One command of `ldae`.

    Attributes:
        title: for people. recipe, seed: of the model. words: of the command, without `ldae`.
        kind: "tokenizer", "pretrain", or the measure. output: the folder that holds `made` when it is done; None for a
            measurement, whose row in the ledger says that it is. on_all: whether several GPUs share the work.
    """

    title: str
    recipe: Recipe
    seed: int
    kind: str
    words: tuple[str, ...]
    output: Path | None = None
    made: str | None = None
    on_all: bool = False

    @property
    def command(self) -> str:
        return shlex.join(["ldae", *self.words])

    @property
    def stops(self) -> bool:
        """Whether it can be told to stop after some minutes, and goes on when it is run again."""
        return self.kind in ("tokenizer", "pretrain", "fine_tune") or self.words[0] == "full-probe"

    def is_done(self) -> bool:
        return self.output is not None and self.made is not None and (self.output / self.made).is_file()


def missing_jobs(
    experiment: Experiment,
    found: Numbers,
    tier: str | None,
    seeds: Sequence[int],
    options: Options,
    labels: Sequence[str] = (),
) -> tuple[list[Job], list[str]]:
    """The commands for what the ledger lacks, in the order of the experiment's trainings: all seeds of a row before the
    next row; a training that is finished is not among them.

    Args:
        labels: of rows; only these and what they are compared with.

    Returns:
        The jobs, and sentences on numbers that cannot be measured with these options.

    Raises:
        ValueError: no row has such a label, or a folder that a job would go on with holds another run.
    """
    jobs: dict[tuple, Job] = {}
    skipped, with_floors, shared = {}, set(), _shared_floors(found)
    if unknown := [label for label in labels if label not in {row.label for row in experiment.rows}]:
        known = ", ".join(dict.fromkeys(row.label for row in experiment.rows))
        raise ValueError(f"{experiment.name} has no row {unknown[0]!r}; choose of {known}.")
    wanted = {*labels} | {row.against for row in experiment.rows if row.label in labels}
    for row in experiment.in_order():
        if labels and row.label not in wanted:
            continue
        if not_testable(row, experiment.reference(row), tier):
            continue
        lacking = [seed for seed in seeds if seed not in found.of(row)]
        if lacking and row.measure == "distance" and options.extractor is None:
            skipped["The Fréchet distance needs --extractor, a network of `ldae extractor`; it is left out."] = True
            continue
        recipe = load_recipe(row.recipe, tier)
        for seed in lacking:
            floors = []
            if row.measure in ("probe", "cached_probe") and not found.of(row) and row.recipe not in with_floors:
                with_floors.add(row.recipe)
                floors, shared = [*_own_floors(recipe), *shared], []
            training = _training(recipe, tier, seed, options)
            for job in [*training, _measurement(row, recipe, seed, options, floors)]:
                if not job.is_done():
                    jobs.setdefault((job.words[:2], job.recipe.name, job.seed), job)
    return list(jobs.values()), list(skipped)


def _training(recipe: Recipe, tier: str | None, seed: int, options: Options) -> list[Job]:
    """Of a model, and before it of its tokenizer, which all seeds share, as the paper's do."""
    jobs, words = [], ["pretrain", *_name(recipe, tier), "--seed", str(seed)]
    folder = run_folder(recipe, seed, options)
    if not recipe.is_masked and recipe.model["tokenizer"] in LEARNED_TOKENIZERS:
        owner = tokenizer_owner(recipe, tier)
        tokenizer = options.runs / _tier(recipe) / f"tokenizer-{owner.name}"
        training = ["tokenizer", "train", *_name(owner, tier), "--output-dir", str(tokenizer), *_machine(options)]
        if options.perceptual_weights is not None and owner.tokenizer["perceptual_loss"] == "lpips":
            training += ["--perceptual-weights", str(options.perceptual_weights)]
        title = f"{owner.title}: tokenizer"
        made = dict(output=tokenizer / "tokenizer", made=CONFIG_NAME, on_all=True)
        jobs.append(Job(title, owner, 0, "tokenizer", tuple(training), **made))
        words += ["--tokenizer", str(tokenizer)]
        if recipe.model["tokenizer"] in CONVOLUTIONAL_TOKENIZERS and can_be_cached(recipe.model_config(), recipe.data):
            words.append("--cache-latents")
    words += ["--output-dir", str(folder), *_machine(options), *(["--compile"] if options.compile else [])]
    _check_holds(folder, recipe, seed)
    made = dict(output=folder / "encoder", made=MANIFEST, on_all=True)
    return [*jobs, Job(f"{recipe.title}, seed {seed}", recipe, seed, "pretrain", tuple(words), **made)]


def _measurement(row: Row, recipe: Recipe, seed: int, options: Options, floors: Sequence[str]) -> Job:
    folder, full = run_folder(recipe, seed, options), recipe.tier is None
    encoder, ending = folder / "encoder", ["--num-workers", str(options.num_workers), "--ledger", str(options.ledger)]
    if row.measure == "distance":
        words = ["fid", str(folder), "--extractor", str(options.extractor)]
        words += [] if full else _flags(FEW_SAMPLES)
    elif row.measure == "fine_tune":
        words = ["finetune", str(encoder), "--output-dir", f"{folder}-fine-tuned", "--seed", str(seed)]
        words += [] if full else _flags(SHORT_FINE_TUNING)
    elif row.measure in ("timesteps", "best_noisy"):
        words = ["sweep", "timesteps", str(encoder)]
    elif row.measure == "depth":
        words = ["sweep", "depth", str(folder)]
    elif full and row.measure == "probe":
        words = ["full-probe", str(encoder), "--output-dir", f"{folder}-probe"]
    else:
        words = ["probe", str(encoder), *(word for name in floors or ["none"] for word in ("--floor", name))]
    on_all = row.measure in ("distance", "fine_tune") or words[0] == "full-probe"
    title = f"{recipe.title}, seed {seed}: {' '.join(words[: 2 if words[0] == 'sweep' else 1])}"
    return Job(title, recipe, seed, row.measure, tuple(words + ending), on_all=on_all)


def _own_floors(recipe: Recipe) -> list[str]:
    """Those that are measured for each recipe, once, beside its first seed."""
    return ["untrained"] if recipe.is_masked else ["latents", "untrained"]


def _shared_floors(found: Numbers) -> list[str]:
    """Those that all recipes share and nobody has measured yet: once in the experiment."""
    options = dict(zip(SHARED_FLOORS, ("pixels", "random_patches"), strict=True))
    there = found.floors.get("probe", {})
    return [option for name, option in options.items() if not any(one.startswith(name) for one in there)]


def run_folder(recipe: Recipe, seed: int, options: Options) -> Path:
    """Where the run of a recipe and a seed stands."""
    return options.runs / _tier(recipe) / f"{recipe.name}-seed-{seed}"


def tokenizer_owner(recipe: Recipe, tier: str | None) -> Recipe:
    """The earliest recipe on the way to this one that trains the same tokenizer on the same images."""

    def trained(one: Recipe) -> dict:
        keys = ("tokenizer", "latent_dim", "image_size", "patch_size", "num_channels", "latent_scaling")
        return {key: one.model.get(key) for key in keys} | {"training": one.tokenizer, "data": one.data}

    for name in recipe.steps:
        with suppress(RecipeError):  # the tier has no such model
            one = load_recipe(name, tier)
            if trained(one) == trained(recipe):
                return one
    return recipe


def _check_holds(folder: Path, recipe: Recipe, seed: int) -> None:
    """Raises ValueError if the run in the folder is another one, a finished one too."""
    file, run = folder / "run.json", {"seed": seed, "recipe": recipe.to_dict()}
    if not file.is_file():
        return
    try:
        there = json.loads(file.read_text(encoding="utf-8"))
        name, before, now = there["recipe"]["name"], identity(there), identity(run)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} cannot be read as a run; move {folder} away, or choose another --runs.") from error
    changed = [f"{key}={before[key]!r}, not {now[key]!r}" for key in now if key in before and before[key] != now[key]]
    if name != recipe.name or changed:
        what = changed[0] if name == recipe.name else f"of {name}, not of {recipe.name}"
        raise ValueError(f"{folder} holds another run, {what}; move it away, or choose another --runs.")


def _name(recipe: Recipe, tier: str | None) -> list[str]:
    return [recipe.name, *(["--tier", tier] if tier else [])]


def _tier(recipe: Recipe) -> str:
    return recipe.tier or "full"


def _machine(options: Options) -> list[str]:
    words = ["--num-workers", str(options.num_workers)]
    if options.per_device_batch_size is not None:
        words += ["--per-device-batch-size", str(options.per_device_batch_size)]
    if options.checkpoint_every is not None:
        words += ["--checkpoint-every", str(options.checkpoint_every)]
    return words


def _flags(options: dict) -> list[str]:
    return [word for name, value in options.items() for word in (f"--{name.replace('_', '-')}", str(value))]
