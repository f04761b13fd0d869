"""An attentive probe on frozen tokens: a learned query pools them by attention, then a linear layer (AIM's, arXiv
2401.08541; V-JEPA's, arXiv 2404.08471, has a residual MLP on top). It finds what mean pooling drowns.

A query that does not depend on the image and the keys' projection are one vector per head, and so it is learned: a head
costs 2·N·D multiplications per image instead of 2·N·D².
"""

import math
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ..progress import progress_bar
from .metrics import accuracy, check_features
from .segmentation import token_statistics


LEARNING_RATES = (0.0003, 0.001, 0.003)
NUM_HEADS = 8
CHUNK = 512  # images of which statistics or predictions are held at once


class AttentivePooling(nn.Module):
    """Tokens (B,N,D) -> class scores (R,B,C) of R probes, which begin alike.

    Each of H heads weighs the tokens by the softmax of their products with its query, and projects their weighted mean
    to D/H values; the classifier sees those of all heads. `mean` and `std` (D,) are those of training tokens.
    """

    def __init__(
        self, mean: torch.Tensor, std: torch.Tensor, num_probes: int, num_heads: int, num_classes: int, seed: int
    ):
        super().__init__()
        dim = len(mean)
        head_dim = max(1, dim // num_heads)
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        generator = torch.Generator().manual_seed(seed)
        begin = {
            "queries": torch.randn(num_heads, dim, generator=generator) * 0.02,
            "values": torch.randn(num_heads, dim, head_dim, generator=generator) * dim**-0.5,
            "weights": torch.zeros(num_heads * head_dim, num_classes),
            "biases": torch.zeros(num_classes),
        }
        # One parameter for each probe, so that each has its own learning rate.
        for name, value in begin.items():
            setattr(self, name, nn.ParameterList(value.clone() for _ in range(num_probes)))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        queries, values, weights, biases = (
            torch.stack(list(part)) for part in (self.queries, self.values, self.weights, self.biases)
        )
        tokens = (tokens.float() - self.mean) / self.std
        attention = (tokens @ queries.flatten(0, 1).T).softmax(dim=1)  # (B,N,R·H)
        pooled = (attention.transpose(1, 2) @ tokens).unflatten(1, queries.shape[:2])  # (B,R,H,D)
        heads = torch.einsum("brhd,rhdv->rbhv", pooled, values).flatten(2)
        return torch.baddbmm(biases[:, None], heads, weights)


def attentive_probe(
    train_tokens: torch.Tensor,
    train_labels: torch.Tensor,
    test_tokens: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_heads: int = NUM_HEADS,
    epochs: int = 20,
    batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict:
    """Trains an attentive probe with every learning rate at once, and tests each.

    The learning rate is selected as in [`linear_probe`]: on a random part of the training images that the probes are
    first trained without; then all are trained on all of them.

    Args:
        train_tokens, test_tokens: (n,N,D), of any floating dtype. train_labels, test_labels: (n,) classes from 0 on.
        learning_rates: of AdamW without weight decay, each on a cosine to 0.
        num_heads: queries, each with its own attention over the tokens.
        epochs: passes over the training images, for each of the two trainings.
        batch_size: images of a step; an eighth of the training images if that is less.
        held_out: the share of the training images on which the learning rate is selected.
        seed: of weights, order and the held-out part.
        device: where to train; tokens are moved there batch by batch. progress: show a progress bar.

    Returns:
        `top1` (and from 10 classes on `top5`) and `best_top1`, in percent; the `learning_rate` selected; `grid`, a list
        with `held_out_top1` and `top1` of each; the `protocol`; the `seconds` it took.

    Raises:
        ValueError: tokens and labels do not fit, or an argument is out of range.
    """
    began = time.monotonic()
    if train_tokens.ndim != 3 or train_tokens.shape[1:] != test_tokens.shape[1:]:
        shapes = f"{tuple(train_tokens.shape)} and {tuple(test_tokens.shape)}"
        raise ValueError(f"Training and test tokens {shapes} must be (n,N,D) of the same N and D.")
    num_classes = check_features(train_tokens[:, 0], train_labels, test_tokens[:, 0], test_labels)
    if not learning_rates or min(learning_rates) <= 0 or num_heads < 1 or epochs < 1 or batch_size < 1:
        raise ValueError(
            "An attentive probe needs positive learning rates, at least one head, one epoch and a batch of one image."
        )
    num_held_out = round(held_out * len(train_labels))
    if not 1 <= num_held_out <= len(train_labels) / 2:
        raise ValueError(f"held_out={held_out} of {len(train_labels)} images must be at least one and at most half.")
    batch_size = min(batch_size, math.ceil(len(train_labels) / 8))
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:num_held_out], order[num_held_out:]
    bar = progress_bar(total=2 * epochs, desc="attentive probe", unit=" epochs", leave=False, disable=not progress)

    def train(images: torch.Tensor) -> AttentivePooling:
        shape = (len(learning_rates), num_heads, num_classes, seed)
        probes = AttentivePooling(*token_statistics(train_tokens, images), *shape).to(device)
        parts = zip(learning_rates, probes.queries, probes.values, probes.weights, probes.biases, strict=True)
        optimizer = torch.optim.AdamW(({"lr": rate, "params": own} for rate, *own in parts), weight_decay=0.0)
        steps = len(images) // batch_size
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            for batch in images[torch.randperm(len(images), generator=generator)].split(batch_size)[:steps]:
                logits = probes(train_tokens[batch].to(device))
                targets = train_labels[batch].to(device).expand(len(logits), -1)
                # The sum over probes: each has the gradient that it would have alone.
                loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum") / batch_size
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
            bar.update()
        return probes

    @torch.no_grad()
    def test(probes: AttentivePooling, tokens: torch.Tensor, labels: torch.Tensor, images: torch.Tensor) -> list[dict]:
        scores = torch.cat([probes(tokens[chunk].to(device)) for chunk in images.split(CHUNK)], dim=1)
        return [accuracy(one, labels[images]) for one in scores]

    selection = [result["top1"] for result in test(train(rest), train_tokens, train_labels, held)]
    results = test(train(order.sort().values), test_tokens, test_labels, torch.arange(len(test_labels)))
    bar.close()
    selected = max(range(len(learning_rates)), key=selection.__getitem__)
    return results[selected] | {
        "best_top1": max(result["top1"] for result in results),
        "learning_rate": learning_rates[selected],
        "grid": [
            {"learning_rate": rate, "held_out_top1": held_out_top1, "top1": result["top1"]}
            for rate, held_out_top1, result in zip(learning_rates, selection, results, strict=True)
        ],
        "protocol": {
            "head": f"standardisation by the training set, {num_heads} learned queries that pool the tokens by "
            "attention, projection, linear",
            "optimizer": "AdamW, no weight decay, cosine to 0",
            "learning_rates": list(learning_rates),
            "selection": f"top1: best of {len(learning_rates)} learning rates on {num_held_out} held-out training "
            "images, then trained on all; best_top1: best on the test set",
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
        },
        "seconds": round(time.monotonic() - began, 1),
    }
