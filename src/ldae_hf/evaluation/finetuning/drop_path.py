"""Drop path, or stochastic depth (arXiv 1603.09382), in any Vision Transformer, without a change to its code."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import nn

from ...training.sampling import random_generator


class DropPath:
    """Leaves out residual branches of a model in training, each for some of the images, and scales the others up.

    Hooks at the ends of the branches do it, so that the model keeps its class and the names of its weights. What is
    dropped is a function of seed, step and the image's place in the global batch.

    Args:
        blocks: for each block of the model, in order, the last module of each of its branches, whose output
            (B,N,D) is added to the stream. rate: of the last block, from 0 on; it rises linearly from 0 in the first.

    Raises:
        ValueError: the rate is not in 0...1.
    """

    def __init__(self, blocks: Sequence[Sequence[nn.Module]], rate: float, seed: int = 0):
        if not 0 <= rate < 1:
            raise ValueError(f"The drop path rate is {rate}, but must be in 0...1, without 1.")
        rates = torch.linspace(0, rate, len(blocks), dtype=torch.float64).tolist()
        rates = [each for each, ends in zip(rates, blocks, strict=True) for _ in ends]
        self.rates = torch.tensor(rates, dtype=torch.float64)  # (branches,)
        self.seed, self.factors = seed, None
        for number, end in enumerate(end for ends in blocks for end in ends):
            end.register_forward_hook(partial(self._drop, number))

    def draw(self, step: int, places: range, global_batch_size: int, device: torch.device) -> None:
        """Decides for the next forward pass, of the images at these places of a step's global batch."""
        shape = (global_batch_size, len(self.rates))
        chances = torch.from_numpy(random_generator(self.seed, "drop_path", step).random(shape))
        kept = chances[places.start : places.stop] >= self.rates
        self.factors = (kept / (1 - self.rates)).T.to(device, torch.get_default_dtype())  # (branches, B)

    def _drop(self, number: int, end: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if not end.training or self.factors is None:
            return output
        return output * self.factors[number][:, None, None]
