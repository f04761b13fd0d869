"""How long the commands of an experiment should take on this machine: from steps that are really taken, for seconds."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..evaluation.linear_probe import linear_probe
from ..recipes import Recipe, load_recipe
from ..recipes.display import END_OF_PATH
from ..training.checkpointing import checkpoints
from ..training.costs import (
    forward_flops_per_image,
    recipe_flops_per_image,
    tokenizer_flops_per_image,
)
from ..training.dry_run import measure_loading, measure_training
from ..training.optimization import Plan
from ..training.planning import WORKER_RATES, find_images
from .jobs import FEW_SAMPLES, SHORT_FINE_TUNING, Job, Options


PROBE_IMAGES, PROBE_EPOCHS = 4_096, 9  # of the short measurement; the real one has 90
FULL_PROBE_EPOCHS, FULL_FINE_TUNING_EPOCHS = 90, 100
START = 8.0  # seconds until a command has imported what it needs


@dataclass
class Machine:
    """What was measured, on the final method at a tier.

    Attributes:
        flops: per second, of training steps. loading: images per second of one worker. images: of an epoch.
        probe: seconds of a linear probe's head on the tier's training set.
    """

    flops: float
    loading: float | None
    images: int
    probe: float

    def lines(self) -> list[str]:
        """What was measured, for people."""
        loading = "" if self.loading is None else f", {self.loading:,.0f} images/s read by a worker"
        return [
            f"measured here: {self.flops / 1e9:,.0f} GFLOP/s in training steps{loading}, {self.probe:.0f} s a probe"
        ]


def measure(tier: str | None, options: Options, seconds: float = 10.0) -> Machine:
    """Takes training steps of the final method, reads its images if they are here, and fits a small probe.

    Raises:
        ValueError: nobody knows how many images there are, or a step does not fit the machine or the time.
    """
    recipe = load_recipe(END_OF_PATH, tier)
    count, source = find_images(recipe, None, None)
    plan = Plan.derive(recipe, int(count.value), options.processes, options.per_device_batch_size)
    precision = dict(mixed_precision="bf16", gradient_checkpointing=False)
    found = measure_training(recipe, plan, **precision, seconds=seconds)
    flops = found.images_per_second * recipe_flops_per_image(recipe) * options.processes
    loading = WORKER_RATES.get(recipe.data["dataset"])
    if source is not None:
        loading = measure_loading(source, recipe, seconds / 2)
    dim, labels = recipe.model_config().hidden_size, torch.arange(PROBE_IMAGES) % 10
    features = torch.randn(PROBE_IMAGES, dim, generator=torch.Generator().manual_seed(0))
    head = linear_probe(features, labels, features, labels, epochs=PROBE_EPOCHS, progress=False)
    whole = head["seconds"] * (int(count.value) / PROBE_IMAGES) * (90 / PROBE_EPOCHS)
    return Machine(flops, loading, int(count.value), whole)


class Estimate:
    """Seconds of jobs on a machine."""

    def __init__(self, machine: Machine, options: Options):
        self.machine, self.options = machine, options

    def seconds(self, job: Job) -> float:
        """How long a command should take, from what is done of it."""
        times = {"tokenizer": self._tokenizer, "pretrain": self._pretrain}
        return START + times.get(job.kind, self._measurement)(job)

    def total(self, jobs: Iterable[Job]) -> float:
        return sum(map(self.seconds, jobs))

    @cached_property
    def _reading(self) -> float:
        """Seconds in which an image is read; 0 where nobody knows."""
        if self.machine.loading is None:
            return 0.0
        return 1 / (self.machine.loading * max(1, self.options.num_workers) * self.options.processes)

    def _per_image(self, flops: float) -> float:
        """Seconds of an image that is read and worked on, at once if workers do the reading."""
        working = flops / self.machine.flops
        if self.options.num_workers:
            return max(working, self._reading)
        return working + self._reading

    def _pretrain(self, job: Job) -> float:
        recipe = job.recipe
        images = recipe.train["epochs"] * self.machine.images
        steps = images / recipe.train["global_batch_size"]
        done = checkpoints(job.output.parent / "checkpoints")
        share = 1 - min(1.0, int(done[-1].name.rpartition("-")[2]) / steps) if done else 1.0
        tokenizer = 0.0 if recipe.is_masked else tokenizer_flops_per_image(recipe.model_config(), recipe.tokenizer)
        if "--cache-latents" in job.words:
            tokenizer /= recipe.train["epochs"]
        return share * images * self._per_image(recipe_flops_per_image(recipe) + tokenizer)

    def _tokenizer(self, job: Job) -> float:
        recipe = job.recipe
        flops = tokenizer_flops_per_image(recipe.model_config(), recipe.tokenizer)
        # Encoder and a decoder that costs somewhat more, forward and backward; networks of its losses come on top.
        return recipe.tokenizer["epochs"] * self.machine.images * self._per_image(3 * 2.5 * flops)

    def _measurement(self, job: Job) -> float:
        recipe, images = job.recipe, self.machine.images
        forward = _encoder_flops(recipe)
        if job.kind == "distance":
            samples = FEW_SAMPLES if recipe.tier else dict(num_samples=50_000, steps=250)
            return samples["num_samples"] * samples["steps"] * 2 * forward / self.machine.flops
        if job.kind == "fine_tune":
            epochs = SHORT_FINE_TUNING["epochs"] if recipe.tier else FULL_FINE_TUNING_EPOCHS
            return epochs * images * self._per_image(3 * forward)
        if job.words[0] == "full-probe":
            return FULL_PROBE_EPOCHS * images * self._per_image(forward)
        points = {"timesteps": 10, "best_noisy": 10, "depth": 7}.get(job.kind, 1)
        passes = 1 if job.kind == "depth" else points
        floors = 30.0 if "none" not in job.words and job.kind == "probe" else 0.0
        return passes * 1.2 * images * self._per_image(forward) + points * self.machine.probe + floors


def _encoder_flops(recipe: Recipe) -> float:
    """Of a forward pass of the encoder, about half of the whole network."""
    if recipe.is_masked:
        recipe = load_recipe(END_OF_PATH, recipe.tier)
    return forward_flops_per_image(recipe.model_config()) / 2


def duration(seconds: float) -> str:
    """As `40 s`, `12 min` or `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def dry_run_text(jobs: Sequence[Job], tier: str | None, options: Options) -> str:
    """The commands that are missing, each with the time that it should take here, and all of it."""
    if not jobs:
        return "Nothing is missing; the table comes from the ledger (--table-only)."
    try:
        machine = measure(tier, options)
    except ValueError as error:  # the data are not here, or the model is too large for this machine
        commands = [job.command for job in jobs]
        return "\n".join([*commands, "", f"{len(jobs)} commands; how long they take here cannot be said: {error}"])
    estimate = Estimate(machine, options)
    lines = [f"{duration(estimate.seconds(job)):>7}  {job.command}" for job in jobs]
    total = f"{len(jobs)} commands, about {duration(estimate.total(jobs))} on this machine, one after the other"
    return "\n".join([*lines, "", *machine.lines(), total])
