"""The plan of a run as numbers and in words. Every number knows where it comes from."""

import math
from dataclasses import dataclass

from ..configuration_ldae import LEARNED_TOKENIZERS
from ..recipes import Recipe
from .costs import Parameters
from .dry_run import Measured
from .memory import Layout
from .optimization import Plan


BACKWARD = 2 / 3  # of a micro-batch's time, in which gradients are exchanged


@dataclass(frozen=True)
class Known:
    """A number and where it comes from."""

    value: float
    source: str


@dataclass(frozen=True)
class RunPlan:
    """What `plan_run` found. Sizes in bytes, times in seconds of one step unless they say otherwise.

    Attributes:
        plan: steps, batches and learning rate. machine: in words. forward_flops, training_flops, tokenizer_flops: of an
            image. memory: of one device by layout, and in it by what it holds; `layout` is that of the run.
        room: memory of a device. remedies: other ways to run that fit into it, with what they need.
        checkpoint: on the disk, and in host memory while it is written.
        images_per_second: of one device, as far as it computes. worker_rate: the same of one worker, of which each
            device has `workers`. exchange: that each device sends in a step. bandwidth: of that, per second.
        None stands for what nobody knows.
    """

    recipe: Recipe
    plan: Plan
    num_images: Known
    machine: str
    parameters: Parameters
    forward_flops: float
    training_flops: float
    tokenizer_flops: float
    memory: dict[Layout, dict[str, float]]
    layout: Layout
    room: Known | None
    remedies: dict[str, float]
    checkpoint: int
    images_per_second: Known
    worker_rate: Known | None
    workers: int
    exchange: float
    bandwidth: Known | None
    measured: Measured | None

    @property
    def images(self) -> int:
        """Of one device in a step."""
        return self.plan.global_batch_size // self.plan.num_processes

    @property
    def computing(self) -> float:
        return self.images / self.images_per_second.value

    @property
    def exchanging(self) -> float:
        """Whether or not the backward pass hides it; 0 where nobody knows."""
        return 0.0 if self.bandwidth is None else self.exchange / self.bandwidth.value

    @property
    def exposed(self) -> float:
        """The part of the exchange that the backward pass of the last micro-batch does not hide."""
        return max(0.0, self.exchanging - BACKWARD * self.computing / self.plan.accumulation)

    @property
    def loading(self) -> float:
        """By all workers of a device; 0 where nobody knows."""
        return 0.0 if self.worker_rate is None else self.images / (self.workers * self.worker_rate.value)

    @property
    def step(self) -> float:
        """All of it; images are loaded beside the rest."""
        return max(self.computing + self.exposed, self.loading)

    @property
    def days(self) -> float:
        """Of the run, without evaluations."""
        return self.plan.total_steps * self.step / 86_400

    @property
    def gpu_hours(self) -> float:
        return 24 * self.days * self.plan.num_processes

    @property
    def workers_needed(self) -> int | None:
        """So many of each device keep up with it."""
        if self.worker_rate is None:
            return None
        return math.ceil(self.images / (self.computing + self.exposed) / self.worker_rate.value)

    @property
    def needed(self) -> float:
        """Memory of a device in the run's layout."""
        return sum(self.memory[self.layout].values())

    @property
    def fits(self) -> bool:
        return self.room is None or self.needed <= self.room.value

    @property
    def bottleneck(self) -> str:
        """What limits the run: `"memory"`, `"data"`, `"gradient exchange"` or `"network"`."""
        if not self.fits:
            return "memory"
        if self.loading > self.computing + self.exposed:
            return "data"
        return "gradient exchange" if self.exposed > 0.1 * self.step else "network"

    # ---- in words

    def lines(self) -> list[str]:
        """The plan, as `ldae plan` prints it."""
        rate = self.images_per_second
        teraflops = rate.value * self.training_flops / 1e12
        sections = {
            "model": self._model(),
            "run": [*self.plan.lines(), f"(images {self.num_images.source}, the rest from the recipe)"],
            "memory": self._memory(),
            "checkpoint": [f"{self.checkpoint / 1e9:.2g} GB, and as much host memory while it is written (counted)"],
            "network": [f"{rate.value:,.1f} images/s a device, {teraflops:,.3g} TFLOP/s ({rate.source})"],
            "data": [self._data()],
            "gradients": [self._gradients()],
            "time": [
                f"{self.step:.3g} s a step, {self.images / self.step * self.plan.num_processes:,.0f} images/s in all",
                f"{duration(self.days)}, {self.gpu_hours:,.0f} device-hours; evaluations are not in it",
            ],
            "bottleneck": [self.bottleneck, *self._advice()],
        }
        lines = [f"{self.recipe.title}: {self.recipe.why}", self.machine, ""]
        for title, texts in sections.items():
            lines += [f"{title if not number else '':<12}{text}" for number, text in enumerate(texts)]
        return lines

    def _model(self) -> list[str]:
        encoder, decoder = self.parameters.encoder, self.parameters.decoder
        lines = [
            f"{(encoder + decoder) / 1e6:,.1f} M parameters, encoder {encoder / 1e6:,.1f} and decoder "
            f"{decoder / 1e6:,.1f} (counted)",
            f"{self.forward_flops / 1e9:,.3g} GFLOP an image forward, {self.training_flops / 1e9:,.3g} in training "
            "(matrix products, counted)",
        ]
        if self.tokenizer_flops:
            lines.append(
                f"{self.tokenizer_flops / 1e9:,.3g} GFLOP more in its tokenizer (counted), unless latents are cached"
            )
        if self.recipe.model["tokenizer"] in LEARNED_TOKENIZERS and self.recipe.tokenizer["pretrained"] is None:
            lines.append("its tokenizer is learned: its own training comes first and is not in this plan")
        return lines

    def _memory(self) -> list[str]:
        names = list(dict.fromkeys(name for parts in self.memory.values() for name in parts))
        columns = [f"{'* ' if layout == self.layout else ''}{layout.name}" for layout in self.memory]
        if self.plan.num_processes == 1:
            columns = [column.replace("DDP", "alone") for column in columns]
        width = max(map(len, columns)) + 2
        lines = [
            f"of a device in GiB, {self.plan.per_device_batch_size} images in a forward pass "
            "(counted, but the libraries are assumed)",
            " " * 18 + "".join(f"{column:>{width}}" for column in columns),
        ]
        rows = {name: [parts.get(name) for parts in self.memory.values()] for name in names}
        rows["sum"] = [sum(parts.values()) for parts in self.memory.values()]
        for name, sizes in rows.items():
            cells = ["-" if size is None else f"{size / 2**30:.2f}" for size in sizes]
            lines.append(f"{name:<18}" + "".join(f"{cell:>{width}}" for cell in cells))
        if self.room is not None:
            lines.append(f"{self.room.value / 2**30:.0f} GiB are there ({self.room.source})")
        if self.measured is not None and self.measured.peak_memory is not None:
            lines.append(f"{self.measured.peak_memory / 2**30:.2f} GiB were taken (measured here, on one device)")
        return lines

    def _data(self) -> str:
        if self.worker_rate is None:
            return "nobody knows how fast images are read; a --dry-run with the images on this machine tells"
        return (
            f"workers needed to keep up: {self.workers_needed} for each device, there are {self.workers} "
            f"({self.worker_rate.value:,.0f} images/s each, {self.worker_rate.source})"
        )

    def _gradients(self) -> str:
        if not self.exchange:
            return "one device has nobody to exchange them with"
        sent = f"{self.exchange / 1e9:.2f} GB a device and step under DDP"
        if self.bandwidth is None:
            return f"{sent}; nobody knows how fast the link is, --bandwidth says it"
        shown = (
            f"{self.exposed * 1e3:.0f} of them after the backward pass" if self.exposed else "within the backward pass"
        )
        return (
            f"{sent} at {self.bandwidth.value / 1e9:.0f} GB/s ({self.bandwidth.source}): "
            f"{self.exchanging * 1e3:.0f} ms, {shown}"
        )

    def _advice(self) -> list[str]:
        lines = []
        if not self.fits:
            lines.append("what fits:" if self.remedies else "nothing that is offered here fits; take larger devices")
            lines += [f"  {way} ({size / 2**30:.0f} GiB)" for way, size in self.remedies.items()]
        if self.loading > self.computing + self.exposed:
            lines.append(f"--num-workers {self.workers_needed} keeps up, if each has a core to itself")
        elif self.exposed > 0.1 * self.step:
            lines.append(f"{self.exposed / self.step:.0%} of a step; more images between two exchanges hide more of it")
        return lines


def duration(days: float) -> str:
    """In the unit that suits it."""
    if days >= 2:
        return f"{days:.1f} days"
    return f"{24 * days:.1f} hours" if days >= 2 / 24 else f"{24 * 60 * days:.1f} minutes"
