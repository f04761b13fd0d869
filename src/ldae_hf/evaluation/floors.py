"""Features that need no training. A probe is worth its distance from them: on small images they are high,
and a report that leaves them out flatters itself. Each is a feature map.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
import torch.nn.functional as F

from ..image_processing_ldae import LDAEImageProcessor
from ..patch_covariance import PatchCovariance
from ..patch_tokenizers import TOKENIZERS, Tokenizer
from ..training.data import ImageSource
from .encoders import Encoder, PooledFeatures
from .encoders.ldae import LDAEEncoder
from .feature_maps import FeatureMap
from .random_patches import RandomPatches, images_fingerprint, random_crops


FLOORS = ("pixels", "latents", "untrained", "random_patches")
LATENT_DIM = 32  # K of the paper's l-DAE, for an encoder that has no latents of its own


def build_floors(
    names: Sequence[str],
    encoder: Encoder,
    train_source: ImageSource,
    *,
    latent_dim: int | None = None,
    layer: int | str = "last",
    pool: str = "mean",
    crop_share: float = 1.0,
    seed: int = 0,
) -> list[FeatureMap]:
    """The floors of these names, out of `FLOORS`, for an encoder.

    Args:
        train_source: the images from which random patches are drawn, and a PCA of patches is fitted for an encoder that
            is no l-DAE. crop_share: of their crops.
        latent_dim: K of that PCA; default 32, or all that a patch has.
        layer, pool: of the untrained encoder's features.
        seed: of the untrained encoder's weights, and of the images and patches that are drawn.

    Raises:
        ValueError: there is no floor of this name.
    """
    crops = dict(image_size=encoder.image_size, crop_share=crop_share, seed=seed)
    builders = {
        "pixels": lambda: RawPixels(encoder.image_size),
        "latents": lambda: latents_of(encoder, train_source, latent_dim, crops),
        "untrained": lambda: PooledFeatures(encoder.untrained(seed), layer, pool, name="untrained encoder"),
        "random_patches": lambda: RandomPatches(train_source, num_features=encoder.dim, **crops),
    }
    if unknown := [name for name in names if name not in builders]:
        raise ValueError(f"There is no floor {unknown[0]!r}; the floors are {', '.join(FLOORS)}.")
    return [builders[name]() for name in names]


def latents_of(encoder: Encoder, train_source: ImageSource, latent_dim: int | None, crops: dict) -> FeatureMap:
    """The latents that an l-DAE starts from; for any other encoder those of a PCA of its patches."""
    if isinstance(encoder, LDAEEncoder):
        config = encoder.model.config
        tokenizer = (encoder.model.tokenizer, encoder.processor)
        return TokenizerLatents(*tokenizer, config.tokenizer, config.tokenizer_fingerprint)
    return PatchPCALatents(train_source, encoder.patch_size, latent_dim or LATENT_DIM, **crops)


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


class PatchPCALatents:
    """The latents of a patch-wise PCA, flattened: N·K values. It is fitted to up to 2,000 random training crops when it
    is first needed.

    Args:
        latent_dim: K, at most the values of a patch. The others as for [`RandomPatches`].
    """

    def __init__(
        self,
        source: ImageSource,
        patch_size: int,
        latent_dim: int,
        image_size: int,
        seed: int = 0,
        crop_share: float = 1.0,
    ):
        self.source, self.image_size, self.seed, self.crop_share = source, image_size, seed, crop_share
        self.patch_size, self.latent_dim = patch_size, min(latent_dim, 3 * patch_size**2)
        self.name = f"PCA latents, K = {self.latent_dim}"
        self.fingerprint = (
            f"fitted_pca_latents images={images_fingerprint(source)} patch_size={patch_size} "
            f"latent_dim={self.latent_dim} seed={seed}"
        )

    @cached_property
    def latents(self) -> TokenizerLatents:
        """The same for a fitted processor."""
        generator = torch.Generator().manual_seed(self.seed)
        crops = random_crops(self.source, self.image_size, generator, self.crop_share)
        processor = LDAEImageProcessor(self.image_size, self.patch_size, self.latent_dim)
        processor.set_basis(processor.accumulate(PatchCovariance(processor.patch_dim), crops))
        tokenizer = TOKENIZERS["patch_pca"](self.patch_size, 3, self.latent_dim, processor.latent_scaling)
        tokenizer.load_state_dict(tokenizer.fitted(*processor.basis))
        return TokenizerLatents(tokenizer, processor, "patch_pca", None)

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        self.latents.tokenizer.to(pixels.device)
        return self.latents(pixels, sample_ids)
