"""A linear segmentation probe on frozen patch tokens, several learning rates in one pass.

Tokens -> standardised by the training set's statistics (BatchNorm without affine, in the limit of a batch that is the
whole set) -> one linear classifier for every patch -> logits resized bilinearly to the label map -> cross-entropy over
its pixels. This is DINOv2's "linear" protocol (arXiv 2304.07193, section 7.4) but for fixed centre crops instead of
scaled and flipped ones, and a test on the centre crop instead of a window that slides over the image.
"""

import time
from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import nn

from ..progress import progress_bar
from .label_maps import IGNORED


LEARNING_RATES = (0.0003, 0.001, 0.003, 0.01)
WEIGHT_DECAY = 1e-4  # DINOv2's, as are AdamW, the linear decay and the batch of 16
EPSILON = 1e-6  # added to the variance
CHUNK = 64  # images of which statistics or predictions are held at once


def segmentation_probe(
    train_tokens: torch.Tensor,
    train_maps: torch.Tensor,
    test_tokens: torch.Tensor,
    test_maps: torch.Tensor,
    *,
    num_classes: int,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 30,
    batch_size: int = 16,
    held_out: float = 0.1,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> dict:
    """Trains a linear classifier of patches with every learning rate at once, and tests the selected one.

    The learning rate is selected without the test set: by mean IoU on a random part of the training images, which the
    others are trained without. With it a classifier is then trained on all of them.

    Args:
        train_tokens, test_tokens: (n,N,D), N a square: the patches row by row. train_maps, test_maps: (n,S,S) classes
            0 ... num_classes - 1, -1 for pixels that do not count.
        learning_rates: of AdamW with weight decay 1e-4, each on a line to 0.
        epochs: passes over the training images, for each of the two trainings.
        batch_size: images of a step; an eighth of the training images if that is less.
        held_out: the share of the images on which the learning rate is selected.
        seed: of the order and of the held-out part; weights begin at zero.
        device: where to train; tokens are moved there batch by batch.

    Returns:
        `mean_iou`, `pixel_accuracy` and `class_iou` of [`segmentation_scores`]; the `learning_rate` selected;
        `learning_rates`, a list with `held_out_mean_iou` of each; the `protocol`; the `seconds` it took.

    Raises:
        ValueError: tokens and maps do not fit, nothing is labelled, or an argument is out of range.
    """
    began = time.monotonic()
    _check(train_tokens, train_maps, "training")
    _check(test_tokens, test_maps, "test")
    if not learning_rates or min(learning_rates) <= 0 or epochs < 1 or batch_size < 1:
        raise ValueError("A segmentation probe needs positive learning rates, at least one epoch and one image a step.")
    num_held_out = round(held_out * len(train_maps))
    if not 1 <= num_held_out <= len(train_maps) / 2:
        raise ValueError(f"held_out={held_out} of {len(train_maps)} images must be at least one and at most half.")
    batch_size = min(batch_size, -(-len(train_maps) // 8))
    training = dict(num_classes=num_classes, epochs=epochs, batch_size=batch_size, seed=seed, device=device)
    training["progress"] = progress

    order = torch.randperm(len(train_maps), generator=torch.Generator().manual_seed(seed))
    held, rest = order[:num_held_out], order[num_held_out:]
    probes = _train(train_tokens, train_maps, rest, learning_rates=learning_rates, **training)
    selection = [_test(probe, train_tokens, train_maps, held, num_classes, device)["mean_iou"] for probe in probes]
    selected = max(range(len(probes)), key=selection.__getitem__)
    rate = learning_rates[selected]
    [probe] = _train(train_tokens, train_maps, order, learning_rates=[rate], **training)
    scores = _test(probe, test_tokens, test_maps, torch.arange(len(test_maps)), num_classes, device)
    return scores | {
        "learning_rate": rate,
        "learning_rates": [
            {"learning_rate": rate, "held_out_mean_iou": mean_iou}
            for rate, mean_iou in zip(learning_rates, selection, strict=True)
        ],
        "protocol": {
            "head": "standardisation by the training set, linear per patch, logits resized bilinearly",
            "loss": "cross-entropy over the labelled pixels of the centre crop",
            "optimizer": f"AdamW, weight decay {WEIGHT_DECAY}, linear to 0, weights begin at 0",
            "learning_rates": list(learning_rates),
            "selection": f"mean IoU: best of {len(learning_rates)} learning rates on {num_held_out} held-out training "
            "images, then trained on all",
            "epochs": epochs,
            "batch_size": batch_size,
            "seed": seed,
            "classes": num_classes,
            "mean_iou": "over classes that occur in the label maps or the predictions; from one confusion matrix",
        },
        "seconds": round(time.monotonic() - began, 1),
    }


class PatchClassifier(nn.Module):
    """Tokens (B,N,D) and a size S -> class scores (B,C,S,S). `mean` and `std` (D,) are those of training tokens."""

    def __init__(self, mean: torch.Tensor, std: torch.Tensor, num_classes: int):
        super().__init__()
        self.register_buffer("mean", mean)
        self.register_buffer("std", std)
        self.linear = nn.Linear(len(mean), num_classes)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, tokens: torch.Tensor, size: int) -> torch.Tensor:
        logits = self.linear((tokens.float() - self.mean) / self.std)  # (B, N, C)
        side = round(logits.shape[1] ** 0.5)
        weights = bilinear_weights(side, size).to(logits)
        return weights @ logits.transpose(1, 2).unflatten(2, (side, side)) @ weights.T


@cache
def bilinear_weights(side: int, size: int) -> torch.Tensor:
    """(size,side): a row of pixels from a row of patches, as `interpolate` without aligned corners resizes it. As a
    product of matrices it takes a fifth of the time on a CPU."""
    with torch.inference_mode(False):
        return F.interpolate(torch.eye(side)[None], size=size, mode="linear", align_corners=False)[0].T.contiguous()


def _train(tokens, maps, images, *, num_classes, learning_rates, epochs, batch_size, seed, device, progress):
    """One classifier for each learning rate, trained on the images of these numbers."""
    mean, std = token_statistics(tokens, images)
    probes = [PatchClassifier(mean, std, num_classes).to(device) for _ in learning_rates]
    groups = [{"params": probe.parameters(), "lr": rate} for probe, rate in zip(probes, learning_rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=WEIGHT_DECAY)
    steps_per_epoch = len(images) // batch_size
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=epochs * steps_per_epoch)
    generator = torch.Generator().manual_seed(seed)
    bar = progress_bar(range(epochs), desc="segmentation probe", unit=" epochs", leave=False, disable=not progress)
    for _ in bar:
        order = images[torch.randperm(len(images), generator=generator)]
        for step in range(steps_per_epoch):
            batch = order[step * batch_size : (step + 1) * batch_size]
            inputs, targets = tokens[batch].to(device), maps[batch].to(device).long()
            labelled = (targets != IGNORED).sum().clamp(min=1)
            optimizer.zero_grad()
            for probe in probes:  # one after the other: their score maps would not fit together
                scores = probe(inputs, targets.shape[-1])
                (F.cross_entropy(scores, targets, ignore_index=IGNORED, reduction="sum") / labelled).backward()
            optimizer.step()
            decay.step()
    return probes


def token_statistics(tokens: torch.Tensor, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation (D,) over all tokens of the images of these numbers; sums in float64."""
    total = squares = 0.0
    for chunk in images.split(CHUNK):
        values = tokens[chunk].double().flatten(0, 1)
        total, squares = total + values.sum(dim=0), squares + values.square().sum(dim=0)
    count = len(images) * tokens.shape[1]
    mean = total / count
    return mean.float(), ((squares / count - mean.square()).clamp(min=0) + EPSILON).sqrt().float()


@torch.no_grad()
def _test(probe, tokens, maps, images, num_classes, device) -> dict:
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    for chunk in images.split(CHUNK):
        for batch in chunk.split(max(1, CHUNK // num_classes)):
            predicted = probe(tokens[batch].to(device), maps.shape[-1]).argmax(dim=1)
            confusion += confusion_matrix(maps[batch], predicted.cpu(), num_classes)
    return segmentation_scores(confusion)


def confusion_matrix(targets: torch.Tensor, predicted: torch.Tensor, num_classes: int) -> torch.Tensor:
    """(C,C) int64: how many labelled pixels of class i were taken for class j."""
    labelled = targets != IGNORED
    pairs = targets[labelled].long() * num_classes + predicted[labelled].long()
    return pairs.bincount(minlength=num_classes**2).reshape(num_classes, num_classes)


def segmentation_scores(confusion: torch.Tensor) -> dict:
    """In percent: `mean_iou`, over the classes that occur in the targets or the predictions; `pixel_accuracy`;
    `class_iou`, a list, None for a class that does not occur.

    Args:
        confusion: as [`confusion_matrix`] counts it, over the whole set.
    """
    hits = confusion.diag().double()
    union = confusion.sum(dim=0) + confusion.sum(dim=1) - hits
    ious = 100 * hits / union  # NaN where the union is empty
    return {
        "mean_iou": ious[union > 0].mean().item(),
        "pixel_accuracy": 100 * (hits.sum() / confusion.sum()).item(),
        "class_iou": [None if empty else iou for empty, iou in zip((union == 0).tolist(), ious.tolist(), strict=True)],
    }


def majority_scores(train_maps: torch.Tensor, test_maps: torch.Tensor, num_classes: int) -> dict:
    """[`segmentation_scores`] of taking every pixel for the training maps' most frequent class."""
    counts, labelled = (
        maps[maps != IGNORED].long().bincount(minlength=num_classes) for maps in (train_maps, test_maps)
    )
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    confusion[:, counts.argmax()] = labelled
    return segmentation_scores(confusion)


def _check(tokens: torch.Tensor, maps: torch.Tensor, name: str) -> None:
    square = tokens.ndim == 3 and round(tokens.shape[1] ** 0.5) ** 2 == tokens.shape[1]
    if not square or maps.ndim != 3 or len(maps) != len(tokens) or maps.shape[1] != maps.shape[2]:
        raise ValueError(
            f"The {name} tokens {tuple(tokens.shape)} and label maps {tuple(maps.shape)} must be (n,N,D), N a square, "
            "and (n,S,S)."
        )
    if not len(maps) or not (maps != IGNORED).any():
        raise ValueError(f"No pixel of the {name} set is labelled; name its mask column, or another split.")
