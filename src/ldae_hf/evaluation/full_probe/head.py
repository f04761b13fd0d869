"""What the probe trains: BatchNorm without affine, then a linear classifier, one for each learning rate."""

import torch
import torch.nn.functional as F
from torch import nn

from .lars import LARS
from .protocol import EPSILON, INITIAL_STD, MOMENTUM, Protocol


class ProbeHead(nn.Module):
    """Linear classifiers that share their BatchNorm, whose statistics no learning rate changes.

    They begin alike, with truncated normal weights from the seed and biases of 0.

    Args:
        dim: D, values of a feature. num_classes: C. count: classifiers.
    """

    def __init__(self, dim: int, num_classes: int, count: int = 1, seed: int = 0):
        super().__init__()
        self.norm = nn.BatchNorm1d(dim, eps=EPSILON, momentum=MOMENTUM, affine=False)
        self.classifiers = nn.ModuleList(nn.Linear(dim, num_classes) for _ in range(count))
        weight = torch.empty(num_classes, dim)
        nn.init.trunc_normal_(weight, std=INITIAL_STD, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            for classifier in self.classifiers:
                classifier.weight.copy_(weight)
                classifier.bias.zero_()

    def forward(self, features: torch.Tensor) -> list[torch.Tensor]:
        """Features (n,D) -> logits (n,C) of each classifier.

        In training the n images are normalised by their own statistics, so that they must be the whole batch.
        """
        normalised = self.norm(features.to(self.norm.running_mean.dtype))
        return [classifier(normalised) for classifier in self.classifiers]

    def losses(self, features: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mean cross-entropy of each classifier, (R,), and the first one's top-1 accuracy in percent."""
        logits = self(features)
        top1 = 100 * (logits[0].argmax(dim=1) == labels).float().mean()
        return torch.stack([F.cross_entropy(one, labels) for one in logits]), top1

    @torch.no_grad()
    def scores(self, features: torch.Tensor, batch_size: int = 8192) -> list[torch.Tensor]:
        """Logits (n,C) of each classifier, on the CPU, by the running statistics."""
        self.eval()
        device = self.norm.running_mean.device
        parts = [self(part.to(device)) for part in features.split(batch_size)]
        self.train()
        return [torch.cat(part).cpu() for part in zip(*parts, strict=True)]


def make_optimizer(head: ProbeHead, protocol: Protocol) -> torch.optim.Optimizer:
    """A group of parameters for each of the protocol's learning rates, which [`set_learning_rates`] sets."""
    groups = [dict(params=list(classifier.parameters())) for classifier in head.classifiers]
    if protocol.optimizer == "lars":
        return LARS(groups)
    return torch.optim.AdamW(groups, lr=0.0, weight_decay=0.0)


def set_learning_rates(optimizer: torch.optim.Optimizer, protocol: Protocol, share: float) -> None:
    """share: of each group's peak, 0...1."""
    for group, rate in zip(optimizer.param_groups, protocol.learning_rates, strict=True):
        group["lr"] = rate * share
