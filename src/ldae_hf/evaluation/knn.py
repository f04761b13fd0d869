"""Weighted k-nearest-neighbour classification, exact, as in DINO and instance discrimination (arXiv 1805.01978); of the
features as they are, standardised, and whitened.
"""

import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .metrics import accuracy, check_features
from .whitening import WHITENING_EPSILON, mean_and_std, whitening


SIMILARITIES = 2**24  # how many are held at once: 64 MB
VARIANTS = {
    "pooled": "cosine",
    "standardised": "cosine of features standardised by the training set",
    "whitened": "cosine of features whitened by the training set's covariance in float64, without directions of less "
    f"than {WHITENING_EPSILON:g} of the mean variance",
}


def knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    variants: Sequence[str] = tuple(VARIANTS),
    device: str | torch.device = "cpu",
) -> dict:
    """Classifies each test sample by its `k` training samples of highest cosine, which vote exp(cosine / temperature).

    Args:
        train_features, test_features: (n,D). train_labels, test_labels: (n,) classes from 0 on.
        k: neighbours that vote; several numbers cost no more than the largest. temperature: of their weights.
        variants: of the features: `"pooled"`, as they are; `"standardised"`, each dimension to mean 0 and variance 1
            over the training set; `"whitened"`, decorrelated too. Each costs one pass.
        device: where to compute; both sets of features are moved there.

    Returns:
        `top1` (and from 10 classes on `top5`) of the first variant and the first k, in percent; `variants`, a list of
        all pairs, each with its `variant`, `k`, `similarity` and accuracies; the `protocol` of `top1`; the `seconds` it
        took.

    Raises:
        ValueError: features and labels do not fit, a k is not in 1 ... n, the temperature is not positive, or there is
            no such variant.
    """
    began = time.monotonic()
    num_classes = check_features(train_features, train_labels, test_features, test_labels)
    ks = [k] if isinstance(k, int) else list(k)
    if not ks or not 1 <= min(ks) <= max(ks) <= len(train_labels) or not temperature > 0:
        raise ValueError(
            f"k={k} must lie in 1 ... {len(train_labels)}, the training samples, and temperature={temperature} above 0."
        )
    if unknown := [variant for variant in variants if variant not in VARIANTS]:
        raise ValueError(f"There is no variant {unknown[0]!r} of features; there are {', '.join(VARIANTS)}.")
    if not variants:
        raise ValueError(f"k-NN needs at least one variant of features, out of {', '.join(VARIANTS)}.")
    train, test, labels = (x.to(device) for x in (train_features.float(), test_features.float(), train_labels))
    found = []
    for variant in variants:
        votes = knn_votes(*_of_variant(variant, train, test), labels, num_classes, ks, temperature)
        stated = {"variant": variant, "similarity": VARIANTS[variant]}
        found += [stated | {"k": each} | accuracy(one, test_labels) for each, one in zip(ks, votes, strict=True)]
    return {key: found[0][key] for key in ("top1", "top5") if key in found[0]} | {
        "variants": found,
        "protocol": {
            "similarity": VARIANTS[variants[0]],
            "k": ks[0],
            "temperature": temperature,
            "weights": "exp(cosine/temperature)",
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def _of_variant(variant: str, train: torch.Tensor, test: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if variant == "standardised":
        mean, std = mean_and_std(train)
        return (train - mean) / std, (test - mean) / std
    if variant == "whitened":
        mean, matrix = whitening(train)
        return (train - mean) @ matrix, (test - mean) @ matrix
    return train, test


def knn_votes(train, queries, labels, num_classes: int, ks: Sequence[int], temperature: float) -> list[torch.Tensor]:
    """For each k (m,C): the votes for each class on queries (m,D), up to a factor per query, of the training features
    (n,D) with labels (n,)."""
    train, queries = F.normalize(train), F.normalize(queries)
    votes = queries.new_zeros(len(ks), len(queries), num_classes)
    chunk_size = max(1, SIMILARITIES // len(train))
    for chunk, chunk_votes in zip(queries.split(chunk_size), votes.split(chunk_size, dim=1), strict=True):
        similarities, neighbours = (chunk @ train.T).topk(max(ks), dim=1)
        # Less the largest, so that no temperature makes the exponential overflow.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        for k, k_votes in zip(ks, chunk_votes, strict=True):
            k_votes.scatter_add_(1, labels[neighbours[:, :k]], weights[:, :k])
    return list(votes)
