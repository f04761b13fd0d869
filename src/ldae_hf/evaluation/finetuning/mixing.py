"""MixUp (arXiv 1710.09412) and CutMix (arXiv 1905.04899) of a batch, with soft targets."""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from ...training.sampling import random_generator


class Draw(NamedTuple):
    """How the images of one step are mixed: each keeps the share `kept` of itself, in a blend, or where `box` = (top,
    bottom, left, right) is given everywhere but in this rectangle."""

    kept: float
    box: tuple[int, int, int, int] | None = None


@dataclass(frozen=True)
class Mixing:
    """Mixes each image of a batch with its neighbour, 0 with 1, 2 with 3, …, which in a shuffled order is any other.

    One draw holds for all images of a step, as in MAE's code for all of a device: blend or rectangle, and how much.
    With neighbours the mixture does not depend on how a global batch is split, as long as its parts are even.

    Args:
        num_classes: C. mixup, cutmix: of the Beta distributions of the kept share; 0 for none of it.
        switch: share of the steps in which it is CutMix, where there are both.
        smoothing: share of each target that is spread over all classes.
    """

    num_classes: int
    mixup: float = 0.8
    cutmix: float = 1.0
    switch: float = 0.5
    smoothing: float = 0.1
    seed: int = 0

    @property
    def mixes(self) -> bool:
        return self.mixup > 0 or self.cutmix > 0

    def draw(self, step: int, image_size: int) -> Draw:
        """The same for the same (seed, step)."""
        generator = random_generator(self.seed, "mixing", step)
        chance, row, column = generator.random(3)
        if not self.mixes:
            return Draw(1.0)
        cuts = chance < self.switch if self.mixup > 0 and self.cutmix > 0 else self.cutmix > 0
        alpha = self.cutmix if cuts else self.mixup
        kept = float(generator.beta(alpha, alpha))
        if not cuts:
            return Draw(kept)
        side = int(image_size * math.sqrt(1 - kept))
        centres = (int(row * image_size), int(column * image_size))
        (top, bottom), (left, right) = (
            (max(0, centre - side // 2), min(image_size, centre + (side + 1) // 2)) for centre in centres
        )
        # The rectangle may stand over the border: the share is what it really leaves.
        return Draw(1 - (bottom - top) * (right - left) / image_size**2, (top, bottom, left, right))

    def __call__(self, pixels: torch.Tensor, labels: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (B,C,H,H) and labels (B,) -> mixed images, and targets (B,num_classes) that sum to one."""
        targets = F.one_hot(labels, self.num_classes).to(pixels.dtype)
        targets = (1 - self.smoothing) * targets + self.smoothing / self.num_classes
        if not self.mixes:
            return pixels, targets
        kept, box = self.draw(step, pixels.shape[-1])
        others = pixels.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
        if box is None:
            pixels = kept * pixels + (1 - kept) * others
        else:
            top, bottom, left, right = box
            pixels = pixels.clone()
            pixels[:, :, top:bottom, left:right] = others[:, :, top:bottom, left:right]
        return pixels, kept * targets + (1 - kept) * targets.unflatten(0, (-1, 2)).flip(1).flatten(0, 1)
