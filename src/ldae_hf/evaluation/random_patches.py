"""The floor of random whitened patches, and the training crops from which floors are made."""

from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F

from ..training.data import ImageSource
from .features import centre_crops


def images_fingerprint(source: ImageSource) -> str | None:
    """Of the images of a data set; a stream has none, but nothing of it is cached either."""
    return None if source.streaming else source.dataset._fingerprint


def random_crops(
    source: ImageSource, image_size: int, generator: torch.Generator, crop_share: float = 1.0, num_images: int = 2_000
) -> torch.Tensor:
    """Up to `num_images` crops, uint8: at random, since rows may be sorted by class; of a stream the first."""
    if not source.streaming:
        chosen = torch.randperm(len(source), generator=generator)[:num_images].tolist()
        source = replace(source, dataset=source.dataset.select(chosen), num_images=len(chosen))
    crops = []
    for batch in centre_crops(source, image_size, 100, crop_share=crop_share):
        crops.append(batch["pixel_values"])
        if len(crops) * 100 >= num_images:
            break
    return torch.cat(crops)


class RandomPatches:
    """Random whitened patches as convolution filters -> ReLU -> mean over the image (Coates and Ng, 2011).

    Patches of 6x6 pixels are drawn at random from random training crops, contrast-normalised and ZCA-whitened. The
    first D of them, brought to unit length, are the filters: the response of an image patch is its product with one of
    them in the whitened space, up to the patch's own mean and contrast. Images larger than 64 pixels are convolved with
    a stride (128 pixels: 2, 256: 4), so that the cost stays that of about 64x64 places.

    Args:
        source: training images. image_size: of their centre crops. crop_share: as in [`extract_features`].
        num_features: D. seed: of images and patches.

    Raises:
        ValueError: the images are smaller than a patch, or D exceeds the patches that are drawn.
    """

    patch_size = 6
    num_images, num_patches = 2_000, 20_000  # that the whitening is estimated from
    contrast_epsilon = 10.0  # added to a patch's variance, in squared grey levels
    whitening_epsilon = 0.1  # added to each eigenvalue of patches of unit variance
    responses = 2**22  # held at once: 16 MB; more no longer fit in a CPU's cache and take twice as long

    def __init__(self, source: ImageSource, image_size: int, num_features: int, seed: int = 0, crop_share: float = 1.0):
        if image_size < self.patch_size or num_features > self.num_patches:
            raise ValueError(
                f"Random {self.patch_size}x{self.patch_size} patches do not exist in images of {image_size} pixels, "
                f"or are fewer than {num_features}; leave the floor random_patches out."
            )
        self.source, self.image_size, self.num_features, self.seed = source, image_size, num_features, seed
        self.crop_share = crop_share
        self.stride = max(1, image_size // 64)
        self.name = "random whitened patches" + (f", stride {self.stride}" if self.stride > 1 else "")
        images = images_fingerprint(source)
        self.fingerprint = f"random_patches images={images} features={num_features} seed={seed} stride={self.stride}"

    @cached_property
    def filters(self) -> torch.Tensor:
        """(D,C,6,6) float32, made when they are first needed: cached features do not need them."""
        generator = torch.Generator().manual_seed(self.seed)
        patches = self._draw_patches(generator)
        centred = patches - patches.mean(dim=1, keepdim=True)
        normalised = centred / (centred.var(dim=1, keepdim=True) + self.contrast_epsilon).sqrt()
        variances, directions = torch.linalg.eigh(torch.cov(normalised.T))
        whitening = directions * (variances + self.whitening_epsilon).rsqrt() @ directions.T
        whitened = (normalised[: self.num_features] - normalised.mean(dim=0)) @ whitening
        # The whitening once more, because it is the image's patches that have to be whitened too.
        filters = F.normalize(whitened) @ whitening
        return filters.float().unflatten(1, (-1, self.patch_size, self.patch_size))

    def _draw_patches(self, generator: torch.Generator) -> torch.Tensor:
        """(num_patches, C·36) float64, in units of grey levels."""
        crops = random_crops(self.source, self.image_size, generator, self.crop_share, self.num_images)
        size = self.patch_size
        places = self.image_size - size + 1
        which, rows, columns = (
            torch.randint(high, (self.num_patches,), generator=generator).tolist()
            for high in (len(crops), places, places)
        )
        corners = zip(which, rows, columns, strict=True)
        return torch.stack([crops[i, :, y : y + size, x : x + size].flatten() for i, y, x in corners]).double()

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        # channels_last is twice as fast on a CPU for so few channels.
        filters = self.filters.to(pixels.device).contiguous(memory_format=torch.channels_last)
        places = (self.image_size // self.stride) ** 2
        pieces = pixels.split(max(1, self.responses // (len(filters) * places)))
        responses = (
            F.conv2d(piece.float().contiguous(memory_format=torch.channels_last), filters, stride=self.stride)
            for piece in pieces
        )
        return torch.cat([response.relu_().mean(dim=(2, 3)) for response in responses])
