"""A fast linear probe on cached features: many learning rates, feature maps, with and without BatchNorm, in one call.

Pooled features -> standardised by the statistics of the training set (BatchNorm without affine, in the limit of a batch
that is the whole set) -> linear layer -> cross-entropy: the paper's protocol (section 5) but for fixed centre crops,
smaller batches and plain SGD.
"""

import math
import time
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from ..progress import progress_bar
from .metrics import accuracy, check_features
from .whitening import mean_and_std


LEARNING_RATES = (0.001, 0.005, 0.03, 0.2, 1.0)
MOMENTUM = 0.9
HEADS = {
    (True,): "standardisation by the training set, linear",
    (False,): "linear",
    (False, True): "linear, with and without standardisation by the training set",
}


def linear_probe(
    train_features: torch.Tensor | Mapping[str, torch.Tensor],
    train_labels: torch.Tensor,
    test_features: torch.Tensor | Mapping[str, torch.Tensor],
    test_labels: torch.Tensor,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    batch_norm: Sequence[bool] = (True,),
    epochs: int = 90,
    batch_size: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict:
    """Trains a linear classifier for every feature map, with and without BatchNorm, with every learning rate, and tests
    each.

    The combination is selected without the test set: all are first trained without a random part of the training set
    and compared there. Then all are trained on the whole training set; `top1` is the test accuracy of the selected one.
    `best_top1` is the best of them on the test set, which is what "best of n learning rates" means elsewhere, and is
    optimistic.

    Args:
        train_features, test_features: (n,D), or several feature maps of the same images by name, each with its own D.
        train_labels, test_labels: (n,) classes from 0 on.
        learning_rates: of SGD with momentum 0.9, without weight decay, each on a cosine to 0. All classifiers of a
            feature map are rows of one matrix.
        batch_norm: whether the features are standardised; `(True, False)` tries both.
        epochs: passes over the training set, for each of the two trainings.
        batch_size: samples of a step; an eighth of the training set if that is less.
        held_out: the share of the training set on which the combination is selected.
        seed: of the order and of the held-out part; weights begin at zero.
        device: where to train; the features of one map at a time are moved there.
        progress: show a progress bar.

    Returns:
        `top1` (and from 10 classes on `top5`) and `best_top1`, in percent; the `features` (name of the map), their
        `dim`, `batch_norm` and the `learning_rate` that were selected; `grid`, a list of all combinations with the
        `held_out_top1` and `top1` of each; the `protocol`; the `seconds` it took.

    Raises:
        ValueError: features and labels do not fit, or an argument is out of range.
    """
    began = time.monotonic()
    train_features, test_features = (
        maps if isinstance(maps, Mapping) else {"features": maps} for maps in (train_features, test_features)
    )
    if not train_features or train_features.keys() != test_features.keys():
        raise ValueError("A linear probe needs at least one feature map, and the same ones of both sets.")
    for name in train_features:
        num_classes = check_features(train_features[name], train_labels, test_features[name], test_labels)
    if not learning_rates or min(learning_rates) <= 0 or not batch_norm or epochs < 1 or batch_size < 1:
        raise ValueError(
            "A linear probe needs positive learning rates, features with or without BatchNorm, at least one epoch and "
            "a batch of one sample."
        )
    num_held_out = round(held_out * len(train_labels))
    if not 1 <= num_held_out <= len(train_labels) / 2:
        raise ValueError(f"held_out={held_out} of {len(train_labels)} samples must be at least one and at most half.")
    batch_size = min(batch_size, math.ceil(len(train_labels) / 8))
    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:num_held_out], order[num_held_out:]

    bar = progress_bar(
        total=2 * epochs * len(train_features) * len(batch_norm),
        desc="linear probe",
        unit=" epochs",
        leave=False,
        disable=not progress,
    )
    training = dict(learning_rates=learning_rates, epochs=epochs, num_classes=num_classes, seed=seed)
    training |= dict(batch_size=batch_size, on_epoch=bar.update)
    grid, results = [], []
    for name in train_features:
        train, test = (maps[name].to(device).float() for maps in (train_features, test_features))
        for normalised in batch_norm:
            training["batch_norm"] = normalised
            scores = train_and_score(train[rest], train_labels[rest].to(device), train[held], **training)
            held_out_top1s = [accuracy(one, train_labels[held])["top1"] for one in scores]
            scores = train_and_score(train, train_labels.to(device), test, **training)
            for learning_rate, held_out_top1, one in zip(learning_rates, held_out_top1s, scores, strict=True):
                results.append(accuracy(one, test_labels) | {"dim": train.shape[1]})
                choice = {"features": name, "batch_norm": normalised, "learning_rate": learning_rate}
                grid.append(choice | {"held_out_top1": held_out_top1, "top1": results[-1]["top1"]})
    bar.close()

    selected = max(range(len(grid)), key=lambda index: grid[index]["held_out_top1"])
    combinations = "learning rates" if len(grid) == len(learning_rates) else "combinations"
    return results[selected] | {
        "best_top1": max(result["top1"] for result in results),
        **{key: grid[selected][key] for key in ("features", "batch_norm", "learning_rate")},
        "grid": grid,
        "protocol": {
            "head": HEADS[tuple(sorted(set(batch_norm)))],
            "optimizer": f"SGD, momentum {MOMENTUM}, cosine to 0, no weight decay, weights begin at 0",
            "learning_rates": list(learning_rates),
            "selection": f"top1: best of {len(grid)} {combinations} on {num_held_out} held-out training samples, then "
            "trained on all; best_top1: best on the test set",
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def train_and_score(
    features, labels, others, *, learning_rates, batch_norm, epochs, batch_size, num_classes, seed, on_epoch
):
    """For each learning rate the class scores (m,C) of other features (m,D) under its classifier of features (n,D)."""
    if batch_norm:
        mean, std = mean_and_std(features)
        features, others = (features - mean) / std, (others - mean) / std
    # The last, constant, feature makes the last weight the bias.
    features, others = (F.pad(x, (0, 1), value=1.0) for x in (features, others))
    rates = torch.tensor(learning_rates, device=features.device).repeat_interleave(num_classes)[:, None]
    weights = features.new_zeros(len(rates), features.shape[1])  # (R·C, D+1): all classifiers are one matrix
    velocity, update = torch.zeros_like(weights), torch.empty_like(weights)
    inputs = features.new_empty(batch_size, features.shape[1])
    # (R,C,B), classes not last: a softmax over a short last axis takes ten times as long on a CPU.
    logits = features.new_empty(len(learning_rates), num_classes, batch_size)
    gradient = torch.empty_like(logits)
    columns = torch.arange(batch_size, device=features.device)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(labels) // batch_size
    total = epochs * steps_per_epoch
    for epoch in range(epochs):
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size]
            torch.index_select(features, 0, batch, out=inputs)
            torch.mm(weights, inputs.T, out=logits.view(-1, batch_size))
            torch.softmax(logits, dim=1, out=gradient)
            gradient[:, labels[batch], columns] -= 1  # softmax less one-hot
            velocity.addmm_(gradient.view(-1, batch_size), inputs, beta=MOMENTUM, alpha=1 / batch_size)
            fraction = (epoch * steps_per_epoch + step) / total
            torch.mul(rates, velocity, out=update)
            weights -= update.mul_(0.5 + 0.5 * math.cos(math.pi * fraction))
        on_epoch()
    for classifier in weights.split(num_classes):
        yield others @ classifier.T
