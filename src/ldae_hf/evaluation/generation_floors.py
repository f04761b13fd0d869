"""What a Fréchet distance is measured against, and what it is read beside.

A distance is bounded by that of real test images (`real`), by that of test images after the tokenizer
(`reconstruction`: a model that answers in latents cannot be expected below it, one that answers in pixels can), and by
that of noise in place of the model's work (`noise`).
"""

from collections.abc import Iterable, Iterator

import torch

from ..pipeline_ldae import LDAEPipeline
from ..training.data import ImageSource
from .extractors import Extractor
from .features import Features, extract
from .floors import TokenizerLatents
from .frechet import FeatureStatistics
from .inputs import describe
from .sample_noise import noise_generators
from .samples import to_uint8


def reference_statistics(
    extractor: Extractor, source: ImageSource, pipeline: LDAEPipeline, **loading
) -> tuple[FeatureStatistics, dict]:
    """Of all images of a data set's split, and which these are, for the protocol."""
    image_size = pipeline.processor.image_size
    (features,) = extract([extractor], source, image_size, device=pipeline.device, **loading)
    return _statistics(extractor, features), _described(source, features, image_size)


def real_floors(
    extractor: Extractor, source: ImageSource, pipeline: LDAEPipeline, **loading
) -> tuple[dict[str, FeatureStatistics], dict]:
    """Of test images, and of what the tokenizer keeps of them, in one pass; and which images these are."""
    maps, image_size = [extractor, Reconstructions(extractor, pipeline)], pipeline.processor.image_size
    found = extract(maps, source, image_size, device=pipeline.device, **loading)
    floors = {name: _statistics(extractor, part) for name, part in zip(("real", "reconstruction"), found, strict=True)}
    return floors, _described(source, found[0], image_size)


def _described(source: ImageSource, features: Features, image_size: int) -> dict:
    return describe(source, features) | {"image_size": image_size, "preprocessing": "centre crop, bicubic"}


class Reconstructions:
    """What an extractor sees of images that went through a pipeline's tokenizer and back."""

    def __init__(self, extractor: Extractor, pipeline: LDAEPipeline):
        model = pipeline.model
        kind, fingerprint = model.config.tokenizer, model.config.tokenizer_fingerprint
        self.latents = TokenizerLatents(model.ldae.tokenizer, pipeline.processor, kind, fingerprint)
        self.extractor, self.pipeline, self.name = extractor, pipeline, "reconstruction"
        self.fingerprint = f"{extractor.fingerprint} of reconstructions from {self.latents.fingerprint}"

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        latents = self.latents(pixels, sample_ids).unflatten(1, (-1, self.pipeline.model.config.latent_dim))
        return self.extractor(to_uint8(self.pipeline.decode(latents, "pt")), sample_ids)


def noise_floor(
    extractor: Extractor, pipeline: LDAEPipeline, seed: int, count: int, batch_size: int
) -> FeatureStatistics:
    """Of the latents that the first images begin with, decoded as they are."""
    config, scale = pipeline.model.config, pipeline.scheduler.init_noise_sigma
    shape = (config.num_patches, config.latent_dim)

    def batches() -> Iterator[torch.Tensor]:
        for start in range(0, count, batch_size):
            generators = noise_generators(seed, range(start, min(start + batch_size, count)))
            latents = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
            yield to_uint8(pipeline.decode(latents.to(pipeline.device) * scale, "pt"))

    return statistics_of(extractor, batches(), pipeline.device)


@torch.no_grad()
def statistics_of(
    extractor: Extractor, batches: Iterable[torch.Tensor], device: torch.device | str
) -> FeatureStatistics:
    """Of uint8 images that have no number."""
    statistics = FeatureStatistics(extractor.fingerprint, extractor.dim)
    for batch in batches:
        statistics.update(extractor(batch.to(device), torch.arange(len(batch))))
    return statistics


def _statistics(extractor: Extractor, features: Features) -> FeatureStatistics:
    return FeatureStatistics(extractor.fingerprint, extractor.dim).update(features.features)
