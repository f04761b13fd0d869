"""Accuracy as an `evaluate` metric without a network: `evaluate.load("accuracy")` would ask the Hub for its code."""

import evaluate
import numpy as np
import torch
from datasets import Features, Sequence, Value


class Top1Accuracy(evaluate.Metric):
    """Top-1 accuracy in percent, and top-5 where the predictions rank at least five classes.

    Instantiate it directly; `evaluate.combine` and `evaluate.save` work with it. `predictions` are classes (n,), or
    ranked classes (n,k), the best one first, as [`ranked_classes`] gives them; `references` are classes (n,).
    """

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="Percentage of samples whose class is the first predicted, or among the first five.",
            citation="",
            inputs_description="predictions: classes (n,) or ranked classes (n,k); references: classes (n,).",
            features=[
                Features({"predictions": Sequence(Value("int64")), "references": Value("int64")}),
                Features({"predictions": Value("int64"), "references": Value("int64")}),
            ],
        )

    def _compute(self, predictions, references) -> dict[str, float]:
        references = np.asarray(references)[:, None]
        hits = np.asarray(predictions).reshape(len(references), -1) == references
        accuracies = {"top1": 100 * int(hits[:, 0].sum()) / len(hits)}
        if hits.shape[1] >= 5:
            accuracies["top5"] = 100 * int(hits[:, :5].any(axis=1).sum()) / len(hits)
        return accuracies


def ranked_classes(scores: torch.Tensor) -> torch.Tensor:
    """Scores (n,C) -> the best class (n,1), or from 10 classes on the five best (n,5); ties go to the lower class."""
    best = 5 if scores.shape[1] >= 10 else 1
    return scores.argsort(dim=1, descending=True, stable=True)[:, :best].cpu()


def accuracy(scores: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """`top1`, and from 10 classes on `top5`, in percent, of scores (n,C) for labels (n,)."""
    metric = Top1Accuracy(keep_in_memory=True)
    return metric.compute(predictions=ranked_classes(scores).numpy(), references=labels.cpu().numpy())


def check_features(
    train_features: torch.Tensor, train_labels: torch.Tensor, test_features: torch.Tensor, test_labels: torch.Tensor
) -> int:
    """The number of classes, if two sets of features and labels fit together.

    Raises:
        ValueError: shapes that do not fit, values that are not finite, samples without labels, or a test class that
            the training set does not have.
    """
    for name, features, labels in (("training", train_features, train_labels), ("test", test_features, test_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError(
                f"The {name} features {tuple(features.shape)} and labels {tuple(labels.shape)} must be (n,D) and (n,)."
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"The {name} features hold NaN or infinite values; look at the encoder that made them.")
        if labels.min() < 0:
            raise ValueError(f"The {name} set has samples without a label; name its label column, or another split.")
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"The training features have {train_features.shape[1]} values and the test features "
            f"{test_features.shape[1]}; extract both with the same encoder."
        )
    num_classes = int(train_labels.max()) + 1
    if test_labels.max() >= num_classes:
        raise ValueError(f"The test set has the class {int(test_labels.max())}, which the training set does not have.")
    return num_classes
