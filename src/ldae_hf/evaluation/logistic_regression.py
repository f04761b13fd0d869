"""Multinomial logistic regression with an L2 penalty, to convergence: scikit-learn's objective, in some dozens of
iterations where its solvers take hundreds or thousands.

Encoders' features vary a thousand times more in some directions than in others, even standardised. Here L-BFGS works in
their principal directions, each scaled by the curvature that data and penalty have there. The minimum stays the same:
rotation does not change the penalty, and the scale is taken back.
"""

import torch
import torch.nn.functional as F


MAX_ITERATIONS = 300
TOLERANCE = 1e-6  # of the largest gradient in scaled directions, as a share of that at zero weights
NO_VARIANCE = 1e-10  # of the largest sum of squares


class LogisticRegression:
    """Classifiers on one set of features, each with its own strength and of its own part of the samples.

    Args:
        features: (n,D), best of mean 0: biases are not penalised. labels: (n,) classes in 0 ... num_classes - 1.
    """

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, num_classes: int):
        self.labels, self.num_classes = labels, num_classes
        self.directions, self.squares = principal_directions(features)
        self.coordinates = features @ self.directions

    def fit(self, strength: float, samples: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The weights (D,C) and biases (C,) of least strength · sum of cross-entropies + ½ · sum of squared weights.

        Args:
            strength: scikit-learn's C. samples: (m,) positions of the samples to learn from.
        """
        labels, emphasis = self.labels[samples], strength / self.num_classes
        curvature = emphasis * len(samples) / len(self.labels) * self.squares
        scale, bias_scale = (1 + curvature).rsqrt(), (emphasis * len(samples)) ** -0.5
        inputs = F.pad(self.coordinates[samples] * scale, (0, 1), value=bias_scale)  # the last weight is the bias
        weights = inputs.new_zeros(inputs.shape[1], self.num_classes, requires_grad=True)

        def objective() -> torch.Tensor:
            weights.grad = None
            loss = strength * F.cross_entropy(inputs @ weights, labels, reduction="sum")
            loss = loss + (weights[:-1] * scale[:, None]).square().sum() / 2
            loss.backward()
            return loss

        with torch.enable_grad():
            objective()
            optimizer = torch.optim.LBFGS(
                [weights],
                max_iter=MAX_ITERATIONS,
                history_size=20,
                line_search_fn="strong_wolfe",
                tolerance_grad=TOLERANCE * weights.grad.abs().max().item(),
                tolerance_change=0,
            )
            optimizer.step(objective)
        weights = weights.detach()
        return self.directions @ (weights[:-1] * scale[:, None]), weights[-1] * bias_scale


def principal_directions(features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthonormal directions (D,r) that features (n,D) lie in, and the sum of their squares (r,) along each, taken in
    float64 from the smaller of the two matrices of products."""
    wide, features = features.shape[1] > len(features), features.double()
    squares, vectors = torch.linalg.eigh(features @ features.T if wide else features.T @ features)
    kept = squares > NO_VARIANCE * squares.max()
    squares, vectors = squares[kept], vectors[:, kept]
    directions = features.T @ vectors / squares.sqrt() if wide else vectors
    return directions.float(), squares.float()
