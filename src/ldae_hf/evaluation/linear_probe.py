"""A linear probe on cached features, several learning rates in one pass.

Average-pooled features -> standardised by the statistics of the training set (BatchNorm without affine, in the limit of
a batch that is the whole set) -> linear layer -> cross-entropy: the paper's protocol (section 5) but for fixed
centre crops, smaller batches and plain SGD.
"""

import math
import time

import torch
import torch.nn.functional as F

from ..progress import progress_bar
from .metrics import accuracy, check_features


LEARNING_RATES = (0.001, 0.005, 0.03, 0.2, 1.0)
MOMENTUM = 0.9
EPSILON = 1e-6  # added to the variance, as the BatchNorm of LDAEForImageClassification does


def linear_probe(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    learning_rates: tuple[float, ...] | list[float] = LEARNING_RATES,
    epochs: int = 90,
    batch_size: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict:
    """Trains a linear classifier on frozen features with every learning rate at once, and tests each.

    The learning rate is selected without the test set: all are first trained without a random part of the training
    set and compared there. Then all are trained on the whole training set; `top1` is the test accuracy of the selected
    one. `best_top1` is the best of them on the test set, which is what "best of n learning rates" means elsewhere, and
    is optimistic.

    Args:
        train_features, test_features: (n,D). train_labels, test_labels: (n,) classes from 0 on.
        learning_rates: of SGD with momentum 0.9, without weight decay, each on a cosine to 0.
        epochs: passes over the training set, for each of the two trainings.
        batch_size: samples of a step; an eighth of the training set if that is less.
        held_out: the share of the training set on which the learning rate is selected.
        seed: of the order and of the held-out part; weights begin at zero.
        device: where to train; both sets of features are moved there.
        progress: show a progress bar.

    Returns:
        `top1` (and from 10 classes on `top5`) and `best_top1`, in percent; the `learning_rate` selected;
        `learning_rates`, a list with `held_out_top1` and `top1` of each; the `protocol`; the `seconds` it took.

    Raises:
        ValueError: features and labels do not fit, or an argument is out of range.
    """
    began = time.monotonic()
    num_classes = check_features(train_features, train_labels, test_features, test_labels)
    if not learning_rates or min(learning_rates) <= 0 or epochs < 1 or batch_size < 1:
        raise ValueError("A linear probe needs positive learning rates, at least one epoch and a batch of one sample.")
    num_held_out = round(held_out * len(train_labels))
    if not 1 <= num_held_out <= len(train_labels) / 2:
        raise ValueError(f"held_out={held_out} of {len(train_labels)} samples must be at least one and at most half.")
    training = dict(learning_rates=learning_rates, epochs=epochs, num_classes=num_classes, seed=seed, progress=progress)
    training["batch_size"] = batch_size = min(batch_size, math.ceil(len(train_labels) / 8))
    train_features, train_labels, test_features, test_labels = (
        tensor.to(device) for tensor in (train_features.float(), train_labels, test_features.float(), test_labels)
    )

    order = torch.randperm(len(train_labels), generator=torch.Generator().manual_seed(seed)).to(device)
    held, rest = order[:num_held_out], order[num_held_out:]
    scores = _train_and_score(train_features[rest], train_labels[rest], train_features[held], **training)
    selection = [accuracy(one, train_labels[held])["top1"] for one in scores]
    scores = _train_and_score(train_features, train_labels, test_features, **training)
    results = [accuracy(one, test_labels) for one in scores]

    selected = max(range(len(learning_rates)), key=selection.__getitem__)
    return results[selected] | {
        "best_top1": max(result["top1"] for result in results),
        "learning_rate": learning_rates[selected],
        "learning_rates": [
            {"learning_rate": rate, "held_out_top1": held_out_top1, "top1": result["top1"]}
            for rate, held_out_top1, result in zip(learning_rates, selection, results, strict=True)
        ],
        "protocol": {
            "head": "standardisation by the training set, linear",
            "optimizer": f"SGD, momentum {MOMENTUM}, cosine to 0, no weight decay, weights begin at 0",
            "learning_rates": list(learning_rates),
            "selection": f"top1: best of {len(learning_rates)} learning rates on {num_held_out} held-out training "
            "samples, then trained on all; best_top1: best on the test set",
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def _train_and_score(features, labels, others, *, learning_rates, epochs, batch_size, num_classes, seed, progress):
    """The class scores (R,m,C) of other features (m,D) under the R classifiers trained on features (n,D)."""
    mean, std = features.mean(dim=0), (features.var(dim=0, unbiased=False) + EPSILON).sqrt()
    # The last, constant, feature makes the last weight the bias.
    features, others = (F.pad((x - mean) / std, (0, 1), value=1.0) for x in (features, others))
    rates = torch.tensor(learning_rates, device=features.device).repeat_interleave(num_classes)[:, None]
    weights = features.new_zeros(len(rates), features.shape[1])  # (R·C, D+1): all classifiers are one matrix
    velocity = torch.zeros_like(weights)
    targets = F.one_hot(labels, num_classes).to(features.dtype)
    generator = torch.Generator().manual_seed(seed)
    steps_per_epoch = len(labels) // batch_size
    total = epochs * steps_per_epoch
    bar = progress_bar(range(epochs), desc="linear probe", unit=" epochs", leave=False, disable=not progress)
    for epoch in bar:
        order = torch.randperm(len(labels), generator=generator).to(features.device)
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size]
            inputs = features[batch]
            # (R,C,B), classes not last: a softmax over a short last axis takes ten times as long on a CPU.
            logits = (weights @ inputs.T).unflatten(0, (-1, num_classes))
            gradient = (logits.softmax(dim=1) - targets[batch].T).flatten(0, 1) / batch_size
            velocity.addmm_(gradient, inputs, beta=MOMENTUM)
            fraction = (epoch * steps_per_epoch + step) / total
            weights -= rates * velocity * (0.5 + 0.5 * math.cos(math.pi * fraction))
    return (weights @ others.T).unflatten(0, (-1, num_classes)).transpose(1, 2)
