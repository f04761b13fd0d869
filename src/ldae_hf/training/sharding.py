"""Tensors that FSDP2 has spread over the processes, and ordinary ones, under the same verbs."""

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor with all its parts; where it is sharded, all processes call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: torch.Tensor, parameter: torch.Tensor) -> torch.Tensor:
    """A whole tensor, the same in all processes, spread as a parameter of the same shape is.

    Raises:
        RuntimeError: the shapes differ.
    """
    if tensor.shape != parameter.shape:
        raise RuntimeError(f"a tensor has the shape {tuple(tensor.shape)} in place of {tuple(parameter.shape)}")
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


@torch.no_grad()
def copy_(target: torch.Tensor, source: torch.Tensor) -> None:
    """Writes a whole tensor, the same in all processes, into one that may be sharded.

    Raises:
        RuntimeError: the shapes differ.
    """
    local(target).copy_(local(shard_like(source, target)))
