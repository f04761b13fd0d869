"""Feature maps in colour: the tokens of patches along the three directions in which they differ most."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ..encoders import Encoder
from .images import image_figure


OUTLIERS = 0.01  # share of the values at each end that may be clipped


def features_figure(encoder: Encoder, pixels: torch.Tensor, layers: Sequence[int] | None = None) -> Figure:
    """Images, and beside each its patches in the colours of their features, a column for each layer.

    Of the tokens after a layer and the final norm, those of all images together, the first three principal components
    are red, green and blue. So colours may be compared between images, but not between layers; which colour stands for
    which means nothing.

    Args:
        pixels: (n,3,S,S) uint8 of the encoder's `image_size`, a row each.
        layers: numbers of blocks, from 1; default the last.

    Raises:
        ValueError: there is no such block.
    """
    layers = list(layers or [encoder.num_layers])
    side = encoder.image_size // encoder.patch_size
    found = encoder.tokens(pixels.to(encoder.device), torch.arange(len(pixels)), layers)
    columns = [pixels / 255]
    for tokens in found:
        colours = principal_colours(tokens[:, encoder.num_prefix_tokens :].flatten(0, 1).cpu().double())
        columns.append(colours.unflatten(0, (len(pixels), side, side)).permute(0, 3, 1, 2))
    names = [f"block {layer}" for layer in layers] if len(layers) > 1 else ["features"]
    return image_figure(list(zip(*columns, strict=True)), ["image", *names])


def principal_colours(tokens: torch.Tensor) -> torch.Tensor:
    """(N,D) -> (N,3) in 0...1: the first three principal components, each stretched over the range, few values out.

    Signs are fixed: the component's values lean to the brighter side.
    """
    centred = tokens - tokens.mean(dim=0)
    directions = torch.linalg.eigh(centred.T @ centred).eigenvectors[:, -3:].flip(1)
    components = centred @ directions
    components = components * torch.where((components**3).sum(dim=0) < 0, -1.0, 1.0)
    low, high = (components.quantile(share, dim=0) for share in (OUTLIERS, 1 - OUTLIERS))
    return ((components - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
