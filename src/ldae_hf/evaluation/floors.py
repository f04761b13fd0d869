"""Features that need no training. A probe is worth its distance from them: on small images they are high,
and a report that leaves them out flatters itself. Each is a feature map.
"""

from copy import deepcopy
from dataclasses import replace
from functools import cached_property

import torch
import torch.nn.functional as F

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEModel
from ..patch_tokenizers import Tokenizer
from ..training.data import ImageSource, eval_loader
from .feature_maps import EncoderFeatures, FeatureMap


FLOORS = ("pixels", "latents", "untrained", "random_patches")


def build_floors(
    names: tuple[str, ...] | list[str],
    model: LDAEModel,
    processor: LDAEImageProcessor,
    train_source: ImageSource,
    *,
    seed: int = 0,
    **encoding,
) -> list[FeatureMap]:
    """The floors of these names, out of `FLOORS`, for an encoder.

    Args:
        train_source: the images from which random patches are drawn.
        seed: of the untrained encoder's weights, the random patches and frozen noise.
        encoding: timestep, noise and dtype of [`EncoderFeatures`], for the untrained encoder.

    Raises:
        ValueError: there is no floor of this name.
    """
    builders = {
        "pixels": lambda: RawPixels(processor.image_size),
        "latents": lambda: TokenizerLatents(
            model.tokenizer, processor, model.config.tokenizer, model.config.tokenizer_fingerprint
        ),
        "untrained": lambda: untrained_encoder(model, processor, seed, **encoding),
        "random_patches": lambda: RandomPatches(train_source, processor.image_size, model.config.hidden_size, seed),
    }
    if unknown := [name for name in names if name not in builders]:
        raise ValueError(f"There is no floor {unknown[0]!r}; the floors are {', '.join(FLOORS)}.")
    return [builders[name]() for name in names]


class RawPixels:
    """The crop itself, flattened, in 0...1. Crops larger than 32 pixels are first shrunk to 32x32 (3,072 values), so
    that a probe on them stays affordable."""

    largest = 32

    def __init__(self, image_size: int):
        self.size = min(image_size, self.largest)
        self.name = "raw pixels" if image_size <= self.largest else f"raw pixels at {self.size}x{self.size}"
        self.fingerprint = f"raw_pixels size={self.size}"

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        pixels = pixels.float() / 255
        if pixels.shape[-1] > self.size:
            pixels = F.interpolate(pixels, size=(self.size, self.size), mode="bilinear", antialias=True)
        return pixels.flatten(1)


class TokenizerLatents:
    """The clean latents that the network starts from, flattened: N·K values."""

    def __init__(self, tokenizer: Tokenizer, processor: LDAEImageProcessor, kind: str, fingerprint: str | None):
        self.tokenizer, self.processor = tokenizer, processor
        self.name = "PCA latents" if kind == "patch_pca" else f"{kind} latents"
        self.fingerprint = (
            f"{kind}_latents processor={processor.fingerprint} tokenizer={fingerprint} "
            f"latent_dim={tokenizer.latent_dim} latent_scaling={tokenizer.latent_scaling}"
        )

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        return self.tokenizer.encode(self.processor.normalize_pixels(pixels)).flatten(1)


def untrained_encoder(model: LDAEModel, processor: LDAEImageProcessor, seed: int = 0, **encoding) -> EncoderFeatures:
    """The encoder as pre-training begins it: same configuration and tokenizer, new weights from the seed.

    Its blocks are the identity (adaLN-Zero): it is a random linear map of each patch, with positions, normalised.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        untrained = LDAEModel(deepcopy(model.config))
    untrained.tokenizer = model.tokenizer
    return EncoderFeatures(untrained.to(model.device).eval(), processor, "untrained encoder", seed=seed, **encoding)


class RandomPatches:
    """Random whitened patches as convolution filters -> ReLU -> mean over the image (Coates and Ng, 2011).

    Patches of 6x6 pixels are drawn at random from random training crops, contrast-normalised and ZCA-whitened. The
    first D of them, brought to unit length, are the filters: the response of an image patch is its product with one of
    them in the whitened space, up to the patch's own mean and contrast. Images larger than 64 pixels are convolved with
    a stride (128 pixels: 2, 256: 4), so that the cost stays that of about 64x64 places.

    Args:
        source: training images. image_size: of their centre crops.
        num_features: D. seed: of images and patches.

    Raises:
        ValueError: the images are smaller than a patch, or D exceeds the patches that are drawn.
    """

    patch_size = 6
    num_images, num_patches = 2_000, 20_000  # that the whitening is estimated from
    contrast_epsilon = 10.0  # added to a patch's variance, in squared grey levels
    whitening_epsilon = 0.1  # added to each eigenvalue of patches of unit variance
    responses = 2**22  # held at once: 16 MB; more no longer fit in a CPU's cache and take twice as long

    def __init__(self, source: ImageSource, image_size: int, num_features: int, seed: int = 0):
        if image_size < self.patch_size or num_features > self.num_patches:
            raise ValueError(
                f"Random {self.patch_size}x{self.patch_size} patches do not exist in images of {image_size} pixels, "
                f"or are fewer than {num_features}; leave the floor random_patches out."
            )
        self.source, self.image_size, self.num_features, self.seed = source, image_size, num_features, seed
        self.stride = max(1, image_size // 64)
        self.name = "random whitened patches" + (f", stride {self.stride}" if self.stride > 1 else "")
        # A stream has no fingerprint, but nothing of it is cached either.
        images = None if source.streaming else source.dataset._fingerprint
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
        crops, size = self._random_crops(generator), self.patch_size
        places = self.image_size - size + 1
        which, rows, columns = (
            torch.randint(high, (self.num_patches,), generator=generator).tolist()
            for high in (len(crops), places, places)
        )
        corners = zip(which, rows, columns, strict=True)
        return torch.stack([crops[i, :, y : y + size, x : x + size].flatten() for i, y, x in corners]).double()

    def _random_crops(self, generator: torch.Generator) -> torch.Tensor:
        """Up to 2,000 training crops, uint8: at random, since rows may be sorted by class; of a stream the first."""
        source = self.source
        if not source.streaming:
            chosen = torch.randperm(len(source), generator=generator)[: self.num_images].tolist()
            source = replace(source, dataset=source.dataset.select(chosen), num_images=len(chosen))
        crops = []
        for batch in eval_loader(source, self.image_size, 100):
            crops.append(batch["pixel_values"])
            if len(crops) * 100 >= self.num_images:
                break
        return torch.cat(crops)

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
