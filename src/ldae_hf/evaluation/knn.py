"""Weighted k-nearest-neighbour classification, exact, as in DINO and instance discrimination (arXiv 1805.01978)."""

import time

import torch
import torch.nn.functional as F

from .metrics import accuracy, check_features


SIMILARITIES = 2**24  # how many are held at once: 64 MB


def knn(
    train_features: torch.Tensor,
    train_labels: torch.Tensor,
    test_features: torch.Tensor,
    test_labels: torch.Tensor,
    *,
    k: int = 20,
    temperature: float = 0.07,
    device: str | torch.device = "cpu",
) -> dict:
    """Classifies each test sample by its `k` training samples of highest cosine, which vote exp(cosine / temperature).

    Args:
        train_features, test_features: (n,D). train_labels, test_labels: (n,) classes from 0 on.
        k: neighbours that vote. temperature: of their weights.
        device: where to compute; both sets of features are moved there.

    Returns:
        `top1` (and from 10 classes on `top5`), in percent; the `protocol`; the `seconds` it took.

    Raises:
        ValueError: features and labels do not fit, k is not in 1 ... n, or the temperature is not positive.
    """
    began = time.monotonic()
    num_classes = check_features(train_features, train_labels, test_features, test_labels)
    if not 1 <= k <= len(train_labels) or not temperature > 0:
        raise ValueError(
            f"k={k} must lie in 1 ... {len(train_labels)}, the training samples, and temperature={temperature} above 0."
        )
    votes = knn_votes(
        train_features.to(device), train_labels.to(device), test_features.to(device), num_classes, k, temperature
    )
    return accuracy(votes, test_labels) | {
        "protocol": {"similarity": "cosine", "k": k, "temperature": temperature, "weights": "exp(cosine/temperature)"},
        "seconds": round(time.monotonic() - began, 1),
    }


def knn_votes(train_features, train_labels, queries, num_classes: int, k: int, temperature: float) -> torch.Tensor:
    """(m,C) the votes for each class on queries (m,D), up to a factor per query."""
    train_features, queries = F.normalize(train_features.float()), F.normalize(queries.float())
    votes = queries.new_zeros(len(queries), num_classes)
    chunk_size = max(1, SIMILARITIES // len(train_features))
    for chunk, chunk_votes in zip(queries.split(chunk_size), votes.split(chunk_size), strict=True):
        similarities, neighbours = (chunk @ train_features.T).topk(k, dim=1)
        # Less the largest, so that no temperature makes the exponential overflow.
        weights = ((similarities - similarities[:, :1]) / temperature).exp()
        chunk_votes.scatter_add_(1, train_labels[neighbours], weights)
    return votes
