"""What makes a resumed DDP run the same to the last bit."""

from collections.abc import Callable

import torch
from torch.nn.parallel import DistributedDataParallel


def settle_buckets(wrapped: torch.nn.Module, loss: Callable[[], torch.Tensor]) -> None:
    """One backward pass for nothing, after which DDP sorts the gradients into the buckets that it keeps.

    The order in which the gradients of more than two processes are added up depends on their places in a bucket. DDP
    finds these in its first step, so that the first step of a resumed run would round otherwise than the same step of a
    run that has been going on.

    Args:
        loss: of a forward pass through `wrapped` with inputs of the usual shapes.
    """
    if isinstance(wrapped, DistributedDataParallel):
        loss().backward()
        wrapped.zero_grad(set_to_none=True)
