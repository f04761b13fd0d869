"""A linear probe on cached features: many learning rates in one pass.

Average-pooled features -> standardisation by the training set (BatchNorm without affine, at the limit of a batch that
is the whole set) -> linear layer -> cross-entropy (PAPER section 5, on features of the centre crop).
"""

import math
import time

import torch
import torch.nn.functional as F
from tqdm import tqdm

from .metrics import top_accuracy


LEARNING_RATES = (0.01, 0.03, 0.1, 0.3, 1.0)


def linear_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    learning_rates: tuple[float, ...] = LEARNING_RATES,
    epochs: int = 90,
    batch_size: int = 1024,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    held_out: float = 0.1,
    seed: int = 0,
    opt="sgd", lrscale=1.0,
    progress: bool = True,
) -> dict:
    pass


def train(x, y, num_classes, lrs, epochs, bs, momentum, wd, seed, opt, nesterov=False):
    R, C, (n, D) = len(lrs), num_classes, x.shape
    g = torch.Generator().manual_seed(seed)
    w = torch.zeros(D + 1, R * C); v = torch.zeros_like(w); s = torch.zeros_like(w)
    lr = torch.tensor(lrs).repeat_interleave(C)
    steps = max(1, n // bs); total = epochs * steps; k = 0
    x = torch.cat([x, torch.ones(n, 1)], 1)
    onehot = F.one_hot(y, C).float()
    for e in range(epochs):
        order = torch.randperm(n, generator=g)
        for i in range(steps):
            idx = order[i * bs:(i + 1) * bs]
            xb = x[idx]
            p = (xb @ w).view(-1, R, C).softmax(-1) - onehot[idx][:, None]
            grad = xb.T @ p.flatten(1) / len(idx)
            f = 0.5 * (1 + math.cos(math.pi * k / total)); k += 1
            if opt == "sgd":
                v.mul_(momentum).add_(grad)
                w -= lr * f * v
            elif opt == "adam":
                v.mul_(.9).add_(grad, alpha=.1); s.mul_(.999).addcmul_(grad, grad, value=.001)
                w -= lr * f * (v / (1 - .9**k)) / ((s / (1 - .999**k)).sqrt() + 1e-8)
    return w
