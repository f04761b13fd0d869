"""LARS, which trains linear probes in batches of thousands."""

from collections.abc import Iterable

import torch


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman, Ginsburg, 2017) without weight decay, as in MAE's linear probe.

    Of each matrix w with gradient g: g <- g · trust_coefficient · |w| / |g|, unless either is zero; vectors (biases)
    keep their g. Then velocity <- momentum · velocity + g, and w <- w - lr · velocity.
    """

    def __init__(self, params: Iterable, lr: float = 0.0, momentum: float = 0.9, trust_coefficient: float = 0.001):
        super().__init__(params, dict(lr=lr, momentum=momentum, trust_coefficient=trust_coefficient))

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient, state = parameter.grad, self.state[parameter]
                if gradient is None:
                    continue
                if parameter.ndim > 1:
                    size, gradient_size = parameter.norm(), gradient.norm()
                    trust = group["trust_coefficient"] * size / gradient_size
                    gradient = gradient * torch.where((size > 0) & (gradient_size > 0), trust, 1.0)
                if "velocity" not in state:
                    state["velocity"] = torch.zeros_like(parameter)
                state["velocity"].mul_(group["momentum"]).add_(gradient)
                parameter.sub_(state["velocity"], alpha=group["lr"])
