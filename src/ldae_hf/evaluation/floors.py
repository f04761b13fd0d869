"""Features that need no training. A probe is only as good as its distance from them: on small images they are high
(PAPER section 7.8), and a report that leaves them out flatters itself.

Each is a callable, uint8 crops (B,C,H,W) and sample ids (B,) -> (B,D) float32, with a `fingerprint` for the cache.
"""

import math
from hashlib import sha256

import torch
import torch.nn.functional as F

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEModel


class RawPixels:
    """The centre crop itself, flattened; a crop larger than 32 pixels is first shrunk to 32x32, so that the probe
    stays affordable (3,072 values)."""

    largest = 32

    def __init__(self, image_size: int):
        self.size = min(image_size, self.largest)
        self.name = "raw pixels" if image_size <= self.largest else f"raw pixels, shrunk to {self.size}x{self.size}"
        self.fingerprint = f"raw_pixels size={self.size}"

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        pixels = pixels.float() / 255
        if pixels.shape[-1] > self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return pixels.flatten(1)


class PCALatents:
    """The clean latents that l-DAE's network starts from, flattened: N·K values."""

    name = "PCA latents"

    def __init__(self, model: LDAEModel, processor: LDAEImageProcessor):
        model.check_processor(processor)
        self.tokenizer, self.processor = model.tokenizer, processor
        self.fingerprint = (
            f"pca_latents processor={processor.fingerprint} latent_dim={processor.latent_dim} "
            f"latent_scaling={processor.latent_scaling}"
        )

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(self.processor.normalize_pixels(pixels)).flatten(1)


class RandomPatches:
    """Random whitened patches as convolution filters -> ReLU -> mean over the image (Coates and Ng; PAPER 7.8).

    `num_features` 6x6 patches, drawn at random from training images, are contrast-normalised and ZCA-whitened. A
    whitened patch of unit length, taken back through the whitening, is one filter: its response to an image patch is
    the product of the two in the whitened space. Images larger than 64 pixels are convolved with a stride
    (128 pixels: 2, 256: 4), so that the cost stays that of about 64x64 positions.

    Args:
        images: (n,C,H,W) uint8 training crops to draw patches from.
        num_features: D, the number of filters.
        seed: draws the patches.
        num_patches: how many patches the whitening is estimated from.

    Raises:
        ValueError: the images are smaller than a patch, or more filters are asked for than patches are drawn.
    """

    patch_size = 6
    contrast_epsilon = 10.0  # added to a patch's variance, in squared grey levels (Coates and Ng)
    whitening_epsilon = 0.01  # added to every eigenvalue; the patches have unit variance

    def __init__(self, images: torch.Tensor, num_features: int, seed: int = 0, num_patches: int = 20_000):
        if images.shape[-1] < self.patch_size:
            raise ValueError(f"Images of {images.shape[-1]} pixels are smaller than the {self.patch_size}-pixel filters.")
        if num_features > num_patches:
            raise ValueError(f"{num_features} filters cannot be chosen among num_patches={num_patches} patches.")
        self.name = "random patches"
        self.stride = max(1, images.shape[-1] // 64)
        patches = self._draw(images, num_patches, torch.Generator().manual_seed(seed))
        centred = patches - patches.mean(dim=1, keepdim=True)
        normalised = centred / (centred.var(dim=1, keepdim=True) + self.contrast_epsilon).sqrt()
        variances, directions = torch.linalg.eigh(torch.cov(normalised.T))
        whitening = directions * (variances + self.whitening_epsilon).rsqrt() @ directions.T
        whitened = (normalised[:num_features] - normalised.mean(dim=0)) @ whitening
        filters = F.normalize(whitened) @ whitening
        self.filters = filters.float().unflatten(1, (images.shape[1], self.patch_size, self.patch_size))
        digest = sha256(self.filters.numpy().astype("<f4").tobytes()).hexdigest()
        self.fingerprint = f"random_patches filters={digest} stride={self.stride}"

    def _draw(self, images: torch.Tensor, num_patches: int, generator: torch.Generator) -> torch.Tensor:
        """(num_patches, C·36) float64, each from a random image at a random place."""
        count, _, height, width = images.shape
        size = self.patch_size
        places = zip(
            *(
                torch.randint(high, (num_patches,), generator=generator).tolist()
                for high in (count, height - size + 1, width - size + 1)
            )
        )
        return torch.stack([images[i, :, y : y + size, x : x + size].flatten() for i, y, x in places]).double()

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        # channels_last: twice as fast on CPUs for so few channels. Small pieces: the responses are large.
        filters = self.filters.to(pixels.device, memory_format=torch.channels_last)
        pieces = pixels.split(max(1, math.ceil(2**25 / (len(filters) * pixels.shape[-1] ** 2 / self.stride**2))))
        return torch.cat(
            [
                F.conv2d(piece.float().contiguous(memory_format=torch.channels_last), filters, stride=self.stride)
                .relu_()
                .mean(dim=(2, 3))
                for piece in pieces
            ]
        )
