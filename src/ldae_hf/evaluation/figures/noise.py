"""Figure 7: the same noise on pixels and in the latent space."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ...image_processing_ldae import LDAEImageProcessor
from ...training.pictures import to_unit_range
from .images import image_figure


SIGMA = 3**-0.5  # of the paper's Figure 7


def noise_figure(
    processor: LDAEImageProcessor, pixels: torch.Tensor, sigmas: Sequence[float] = (SIGMA,), seed: int = 0
) -> Figure:
    """Images clean, with Gaussian noise on their normalised pixels, and with noise on their scaled latents.

    Below each column stands sigma, and how many of 255 grey levels the noise comes to, as the root of its mean square
    on these images before anything is clipped: the same sigma is not the same strength, since the latents' scale is
    that of `latent_scaling`. What is shown of the latents is decoded, so that it lacks what lies outside of the K
    directions.

    Args:
        processor: fitted; its PCA makes the latents. pixels: (n,C,H,W) uint8 of its `image_size`, a row each.
        sigmas: standard deviations of the noise, two columns each. seed: of the noise.

    Raises:
        ValueError: a sigma is not above 0.
    """
    if not all(0 < sigma < float("inf") for sigma in sigmas):
        raise ValueError(f"sigma must be a number above 0, not {', '.join(map(str, sigmas))}.")
    images, latents = processor.normalize_pixels(pixels), processor.encode(pixels)
    projected, generator = processor.decode(latents), torch.Generator().manual_seed(seed)
    columns, titles = [images], ["clean"]
    for sigma in sigmas:
        on_pixels = images + sigma * torch.randn(images.shape, generator=generator)
        in_latents = processor.decode(latents + sigma * torch.randn(latents.shape, generator=generator))
        for name, noisy, without in (("on pixels", on_pixels, images), ("on latents", in_latents, projected)):
            columns.append(noisy)
            titles.append(f"noise {name}\nσ = {sigma:.2f}\n{_grey_levels(noisy - without, processor):.0f} grey levels")
    rows = zip(*(to_unit_range(column, processor) for column in columns), strict=True)
    return image_figure(list(rows), titles)


def _grey_levels(noise: torch.Tensor, processor: LDAEImageProcessor) -> float:
    std = torch.tensor(processor.image_std)[:, None, None]
    return 255 * (noise * std).square().mean().sqrt().item()
