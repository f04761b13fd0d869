"""Layer-wise learning rates: the deeper a layer, the more it learns (BEiT, arXiv 2106.08254; MAE's fine-tuning)."""

import torch
from torch import nn


def layer_numbers(model: nn.Module, blocks: str) -> dict[str, int]:
    """The layer of each parameter: 0 for what comes before the blocks (patches, class token, positions), 1 ... L for
    the blocks, L + 1 for what comes after them (norm and head). A model has its parameters in the order of its parts.

    Args:
        blocks: dotted name of the list of blocks.
    """
    depth = len(model.get_submodule(blocks))
    numbers, reached = {}, 0
    for name, _ in model.named_parameters():
        if name.startswith(f"{blocks}."):
            reached = int(name.removeprefix(f"{blocks}.").partition(".")[0]) + 1
        elif reached:
            reached = depth + 1
        numbers[name] = reached
    return numbers


def layered_adamw(
    model: nn.Module, blocks: str, layer_decay: float, weight_decay: float, betas: tuple[float, float]
) -> torch.optim.AdamW:
    """AdamW in groups by layer, with the scale layer_decay^(L + 1 - layer) of the learning rate as `lr_scale`.

    Weight decay is on the weights of linear layers and convolutions only: not on biases, norms, tokens and positions.
    """
    numbers, groups = layer_numbers(model, blocks), {}
    head = max(numbers.values())
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decays = name.endswith(".weight") and parameter.ndim > 1
            group = dict(lr_scale=layer_decay ** (head - numbers[name]), weight_decay=weight_decay if decays else 0.0)
            groups.setdefault((numbers[name], decays), group | {"params": []})["params"].append(parameter)
    return torch.optim.AdamW(groups.values(), lr=0.0, betas=tuple(betas), fused=True)
