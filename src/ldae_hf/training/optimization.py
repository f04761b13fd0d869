"""From a recipe to the numbers of a run: learning rate, steps, accumulation. The only place where they are derived."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from ..recipes import Recipe
from .sharding import copy_, local


@dataclass(frozen=True)
class Plan:
    """What a recipe means on one data set and machine.

    Attributes:
        num_images: images of an epoch. steps_per_epoch: whole global batches in it; the remainder is dropped.
        total_steps, warmup_steps: optimizer steps.
        learning_rate: the peak, base_learning_rate · global batch / 256; a tokenizer's is given as it is.
        global_batch_size = num_processes · accumulation · per_device_batch_size.
        ema_decay: per step, from the recipe's half-life in epochs; None for no EMA.
    """

    num_images: int
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    learning_rate: float
    global_batch_size: int
    num_processes: int
    per_device_batch_size: int
    accumulation: int
    ema_decay: float | None

    @classmethod
    def derive(
        cls,
        recipe: Recipe,
        num_images: int,
        num_processes: int,
        per_device_batch_size: int | None,
        section: str = "train",
        largest: int = 256,
    ) -> "Plan":
        """Resolves a recipe.

        Args:
            section: `"train"`, or `"tokenizer"` for the training of its tokenizer, which has no warm-up and no EMA.
            largest: images of one forward pass at most, where `per_device_batch_size` is not given.
            per_device_batch_size: images of one forward pass; default the largest that divides the global batch's
                share of one process and is at most `largest`.

        Raises:
            ValueError: the global batch does not split over the processes and the per-device batches, or the data set
                is smaller than one global batch.
        """
        train = {"warmup_epochs": 0.0, "ema_half_life_epochs": None} | getattr(recipe, section)
        batch = train["global_batch_size"]
        if num_images < batch:
            raise ValueError(
                f"{recipe.title} needs {batch} images for one step but the data set has {num_images}; "
                f"use a larger data set or --set {section}.global_batch_size=…"
            )
        if batch % num_processes:
            raise ValueError(f"A global batch of {batch} does not split over {num_processes} processes.")
        share = batch // num_processes
        if per_device_batch_size is None:
            per_device_batch_size = max(size for size in range(1, min(share, largest) + 1) if share % size == 0)
        if per_device_batch_size < 1 or share % per_device_batch_size:
            raise ValueError(
                f"A per-device batch of {per_device_batch_size} does not divide the {share} images that each of "
                f"{num_processes} processes contributes to a global batch of {batch}."
            )
        steps_per_epoch = num_images // batch
        half_life = train["ema_half_life_epochs"]
        learning_rate = train["base_learning_rate"] * batch / 256 if section == "train" else train["learning_rate"]
        return cls(
            num_images=num_images,
            steps_per_epoch=steps_per_epoch,
            total_steps=steps_per_epoch * train["epochs"],
            warmup_steps=round(steps_per_epoch * train["warmup_epochs"]),
            learning_rate=learning_rate,
            global_batch_size=batch,
            num_processes=num_processes,
            per_device_batch_size=per_device_batch_size,
            accumulation=share // per_device_batch_size,
            ema_decay=None if half_life is None else 0.5 ** (1 / (half_life * steps_per_epoch)),
        )

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up from 0, then half a cosine to 0 (MAE); `step` counts from 0 and is about to be taken."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.total_steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))

    def lines(self) -> list[str]:
        """The run in words, printed before it starts."""
        ema = "off" if self.ema_decay is None else f"decay {self.ema_decay:.6f} per step"
        return [
            f"images {self.num_images:,} · {self.steps_per_epoch:,} steps an epoch · {self.total_steps:,} steps in all",
            f"global batch {self.global_batch_size} = {self.per_device_batch_size} images x {self.accumulation} "
            f"(accumulation) x {self.num_processes} (processes)",
            f"learning rate {self.learning_rate:.3g}, warm-up {self.warmup_steps:,} steps, then cosine · EMA {ema}",
        ]


def adamw(model: nn.Module, betas: list[float], weight_decay: float = 0.0) -> torch.optim.AdamW:
    """AdamW; weight decay (0 in the paper) on matrices only. The learning rate is set before each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    matrices = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups = [dict(params=matrices, weight_decay=weight_decay), dict(params=others, weight_decay=0.0)]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=tuple(betas), fused=True)


def update(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """One step with this learning rate (times a group's `lr_scale`, where it has one), and no gradients after it."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_scale", 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


class ExponentialMovingAverage:
    """An fp32 average of a model's parameters: in bf16 a decay of 0.9999 would never move it.

    Attributes:
        average: by the parameters' names, on their devices, sharded as they are; it begins as a copy of them.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {name: value.detach().float().clone() for name, value in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """average += (1 - decay) · (parameters - average)."""
        values = [local(value).float() for value in model.parameters()]
        torch._foreach_lerp_([local(value) for value in self.average.values()], values, 1 - self.decay)

    @contextmanager
    def in_place_of_parameters(self, model: nn.Module) -> Iterator[None]:
        """Within it the model has the average as parameters."""
        own = {name: value.detach().clone() for name, value in model.named_parameters()}
        _copy(self.average, dict(model.named_parameters()))
        try:
            yield
        finally:
            _copy(own, dict(model.named_parameters()))

    def load(self, average: dict[str, torch.Tensor]) -> None:
        """Takes up a saved average.

        Raises:
            KeyError, RuntimeError: a parameter is missing or has another shape.
        """
        _copy(average, self.average)


@torch.no_grad()
def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> None:
    for name, value in target.items():
        copy_(value, source[name])
