"""Features brought to a common scale by the statistics of a training set."""

import torch


VARIANCE_EPSILON = 1e-6  # added to the variance, as the BatchNorm of LDAEForImageClassification does
WHITENING_EPSILON = 1e-6  # of the mean variance: directions with less are left out
CHUNK = 4096  # samples that are held in float64 at once


def mean_and_std(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(D,) and (D,) of features (n,D): what BatchNorm without affine subtracts and divides by."""
    return features.mean(dim=0), (features.var(dim=0, unbiased=False) + VARIANCE_EPSILON).sqrt()


def whitening(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean (D,) and a matrix (D,D') that make of features (n,D) (x - mean) W, whose covariance is the identity.

    Covariance and eigenvectors are taken in float64. Directions with less than 1e-6 of the mean variance are left out,
    since whitening would make noise of them as large as all else: D' is D less their number. W turns to the principal
    components; ZCA turns back, which no cosine sees.

    Raises:
        ValueError: all features are the same.
    """
    mean = features.mean(dim=0, dtype=torch.float64)
    covariance = torch.zeros(2 * mean.shape, dtype=torch.float64, device=features.device)
    for chunk in features.split(CHUNK):
        centred = chunk.double() - mean
        covariance.addmm_(centred.T, centred, alpha=1 / len(features))
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > WHITENING_EPSILON * variances.mean()
    if not kept.any():
        raise ValueError("All images have the same features; look at the encoder that made them.")
    return mean.to(features.dtype), (directions[:, kept] / variances[kept].sqrt()).to(features.dtype)
