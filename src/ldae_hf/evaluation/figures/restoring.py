"""Figures 1 and 8: an image on its way through the model, and what the model restores of noisy images."""

from collections.abc import Sequence

import torch
from matplotlib.figure import Figure

from ...image_processing_ldae import LDAEImageProcessor
from ...modeling_ldae import LDAEForPreTraining
from ...patch_tokenizers import unpatchify
from ...training.pictures import Restoration, restorations, to_unit_range
from .images import image_figure


def pipeline_figure(
    model: LDAEForPreTraining, processor: LDAEImageProcessor, pixels: torch.Tensor, timestep: int, seed: int = 0
) -> Figure:
    """Images on their way: as they are, as the K latent values of each patch hold them, with noise on these values, as
    the network restores them, and the images again, with which that is compared (Figure 1).

    Args:
        pixels: (n,C,H,W) uint8 of the processor's `image_size`, a row each. timestep: the level of noise.
        seed: of the noise.

    Raises:
        ValueError: the processor is not the model's, the images have another size, or there is no such level.
    """
    images, [found] = restorations(model, processor, pixels, seed, [timestep])
    tokenizer, config = model.ldae.tokenizer, model.config
    with torch.no_grad():
        patches = tokenizer.decode(tokenizer.encode(images))
        kept = unpatchify(patches, config.patch_size, model.ldae.grid)
    kind = "PCA directions" if config.tokenizer == "patch_pca" else "latent values"
    columns = ["image", f"patches in {config.latent_dim}\n{kind}", f"noise on these,\n{level_name(found)}"]
    columns += ["restored by\nthe network", "compared with\nthe image"]
    images = [images, kept, found.noisy, found.restored, images]
    return _rows(processor, images, columns, arrows=("-|>", "-|>", "-|>", "<|-|>"))


def denoising_figure(
    model: LDAEForPreTraining,
    processor: LDAEImageProcessor,
    pixels: torch.Tensor,
    timesteps: Sequence[int] | None = None,
    seed: int = 0,
) -> Figure:
    """Images, and for each level of noise what the model is shown and what it restores (Figure 8).

    Args:
        pixels: (n,C,H,W) uint8 of the processor's `image_size`, a row each. seed: of the noise.
        timesteps: the levels of noise; default [`watched_levels`].

    Raises:
        ValueError: as [`pipeline_figure`].
    """
    images, found = restorations(model, processor, pixels, seed, timesteps)
    columns, titles = [images], ["clean"]
    for level in found:
        columns += [level.noisy, level.restored]
        titles += [f"noisy\n{level_name(level)}", "denoised"]
    return _rows(processor, columns, titles)


def level_name(level: Restoration) -> str:
    """How strong the noise is, by the letters of Eq. 1: sigma where the signal is not scaled, else sigma / gamma."""
    return f"{'σ' if level.gamma == 1 else 'σ/γ'} = {level.sigma / level.gamma:.2f}"


def _rows(processor: LDAEImageProcessor, columns: Sequence[torch.Tensor], titles: Sequence[str], **options) -> Figure:
    columns = [to_unit_range(images.cpu(), processor) for images in columns]
    return image_figure(list(zip(*columns, strict=True)), titles, **options)
