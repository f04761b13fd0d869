"""The Fréchet distance between two sets of images: that of two Gaussians, fitted to their features (arXiv 1706.08500).

With Inception's features it is FID. It depends on the extractor, and on the number of images: fewer give a larger one.
"""

import torch


ROWS = 1024  # that are held in float64 at once


class FeatureStatistics:
    """Count, mean and scatter of features, in float64 on the CPU: all that the distance needs of a set of images.

    The scatter is the sum of (x - mean)(x - mean)ᵀ. Unlike a sum of x xᵀ it loses nothing to features whose mean is far
    from zero, as those that come out of a ReLU are. Memory: two D×D matrices, however many features there are.

    Args:
        extractor: the fingerprint of what makes the features; statistics of different ones never meet.
        dim: D.
    """

    def __init__(self, extractor: str, dim: int):
        self.extractor, self.dim = extractor, dim
        self.count = 0
        self.mean = torch.zeros(dim, dtype=torch.float64)
        self.scatter = torch.zeros(dim, dim, dtype=torch.float64)

    def update(self, features: torch.Tensor) -> "FeatureStatistics":
        """Adds features (B,D) of any floating-point type, on any device.

        Raises:
            ValueError: the shape is not (B,D), or a feature is NaN or infinite.
        """
        if features.ndim != 2 or features.shape[1] != self.dim or not features.is_floating_point():
            raise ValueError(
                f"Features must be floating-point numbers of the shape (B, {self.dim}), not {features.dtype} of "
                f"{tuple(features.shape)}."
            )
        if not (finite := features.isfinite().all(dim=1)).all():
            row = int((~finite).nonzero()[0])
            raise ValueError(
                f"The features of image {self.count + row} are not finite; look at that image, and at the extractor."
            )
        for part in features.detach().split(ROWS):
            rows = part.cpu().double()
            if len(rows):
                mean = rows.mean(dim=0)
                centred = rows - mean
                self._add(len(rows), mean, centred.T @ centred)
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Adds all that `other` has seen; `other` stays as it is.

        Raises:
            ValueError: they are of different extractors or dimensions.
        """
        check_comparable(self, other)
        if other.count:
            self._add(other.count, other.mean, other.scatter)
        return self

    def _add(self, count: int, mean: torch.Tensor, scatter: torch.Tensor) -> None:
        """The pairwise update of Chan, Golub and LeVeque (1979)."""
        total = self.count + count
        difference = mean - self.mean
        self.scatter += scatter + torch.outer(difference, difference) * (self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total

    @property
    def covariance(self) -> torch.Tensor:
        """(D,D) float64, divisor N - 1.

        Raises:
            ValueError: there are fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs the features of at least 2 images, but there are {self.count}.")
        return self.scatter / (self.count - 1)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """`count` () int64, `mean` (D,) and `scatter` (D,D) float64, copies that share no memory.

        Not to be summed over processes: gather them, and merge the [`from_state_dict`] of each in the order of ranks.
        """
        return {"count": torch.tensor(self.count), "mean": self.mean.clone(), "scatter": self.scatter.clone()}

    @classmethod
    def from_state_dict(cls, state: dict[str, torch.Tensor], extractor: str) -> "FeatureStatistics":
        """The inverse of `state_dict`.

        Raises:
            ValueError: tensors are missing or superfluous, their shapes do not fit, or a value is not finite.
        """
        if state.keys() != {"count", "mean", "scatter"}:
            raise ValueError(f"Feature statistics hold count, mean and scatter, not {', '.join(sorted(state))}.")
        dim = state["mean"].numel()
        for name, shape in {"count": (), "mean": (dim,), "scatter": (dim, dim)}.items():
            if tuple(state[name].shape) != shape or not state[name].isfinite().all() or state["count"].min() < 0:
                raise ValueError(
                    f"The {name} of feature statistics must be finite and have the shape {shape}, and no count is "
                    f"negative; this one has the shape {tuple(state[name].shape)}."
                )
        statistics = cls(extractor, dim)
        statistics.count = int(state["count"])
        statistics.mean += state["mean"].cpu()
        statistics.scatter += state["scatter"].cpu()
        return statistics


def check_comparable(first: FeatureStatistics, second: FeatureStatistics) -> None:
    """Raises ValueError if two statistics are of different extractors or dimensions."""
    if first.extractor != second.extractor or first.dim != second.dim:
        raise ValueError(
            f"Features of different extractors cannot be compared: {first.extractor} ({first.dim} values) and "
            f"{second.extractor} ({second.dim} values); extract both with the same one."
        )


def frechet_distance(first: FeatureStatistics, second: FeatureStatistics) -> float:
    """|μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½), not negative, in squared units of the features.

    The trace of (Σ₁Σ₂)^½ is the sum of the singular values of L₁ᵀL₂, for any L with Σ = LLᵀ. So nothing is complex, and
    no square root is taken of what rounding made of a zero: covariances may be singular, as those of fewer images than
    dimensions are.

    Raises:
        ValueError: they are of different extractors or dimensions, or one has fewer than two samples.
    """
    check_comparable(first, second)
    covariances = first.covariance, second.covariance
    left, right = (covariance_root(covariance) for covariance in covariances)
    fidelity = torch.linalg.svdvals(left.T @ right).sum()
    distance = (first.mean - second.mean).square().sum() + sum(map(torch.trace, covariances)) - 2 * fidelity
    return max(0.0, distance.item())  # of equal sets rounding may leave less than nothing


def covariance_root(covariance: torch.Tensor) -> torch.Tensor:
    """(D,D) -> L (D,r) with covariance = LLᵀ, r its rank: without the directions whose variance is only rounding."""
    variances, directions = torch.linalg.eigh(covariance)
    kept = variances > variances.max() * len(variances) * torch.finfo(variances.dtype).eps
    return directions[:, kept] * variances[kept].sqrt()
