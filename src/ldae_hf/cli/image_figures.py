"""`ldae figure pipeline`, `noise`, `denoising`, `features`: those that are drawn of images."""

from pathlib import Path
from typing import Annotated

import typer

from .figure_options import WITH_PROCESSOR, Stem, write_figure


Model = Annotated[str, typer.Argument(help="A run, a checkpoint, a pipeline's folder, or its name on the Hub.")]
Images = Annotated[list[Path] | None, typer.Argument(help="Image files; or give --dataset.")]
Dataset = Annotated[str | None, typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA.")]
Split = Annotated[str, typer.Option(help="Of the data set.")]
NumImages = Annotated[int, typer.Option(min=1, help="Of the data set, spread over it; a row each.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Weights = Annotated[str | None, typer.Option(help="ema or raw, of a run or checkpoint; default ema if it is there.")]


def pipeline(
    source: Model,
    images: Images = None,
    dataset: Dataset = None,
    split: Split = "test",
    num_images: NumImages = 2,
    level: Annotated[float, typer.Option(help="Noise relative to the signal, sigma/gamma.")] = 1.0,
    seed: Seed = 0,
    weights: Weights = None,
    output: Stem = Path("pipeline"),
):
    """Draw images on their way: as latents hold them, with noise upon the latents, restored (Figure 1).

    Of the model's levels of noise the nearest is taken.

    \b
    ldae figure pipeline runs/mine cat.jpg dog.jpg --level 0.5
    """
    from ldae_hf.evaluation.figures import pipeline_figure

    model, processor, pixels = _model_and_images(source, images, dataset, split, num_images, weights)
    [timestep] = _timesteps(model, [level])
    write_figure(pipeline_figure(model, processor, pixels, timestep, seed), output)


def noise(
    source: Annotated[str, typer.Argument(help=f"Whose PCA: {WITH_PROCESSOR}.")],
    images: Images = None,
    dataset: Dataset = None,
    split: Split = "test",
    num_images: NumImages = 2,
    sigmas: Annotated[
        list[float] | None, typer.Option("--sigma", help="Of the noise; may be repeated; default the root of 1/3.")
    ] = None,
    seed: Seed = 0,
    output: Stem = Path("noise"),
):
    """Draw images clean, with noise on their pixels, and with noise of the same sigma on their latents (Figure 7).

    \b
    ldae figure noise runs/mine cat.jpg
    ldae figure noise runs/mine/processor --dataset cifar10 --sigma 0.3 --sigma 1
    """
    from ldae_hf.evaluation.figures import noise_figure
    from ldae_hf.evaluation.figures.sources import find_processor
    from ldae_hf.evaluation.sample_pictures import check_choice, chosen_images

    check_choice(images, dataset)
    processor = find_processor(source)
    pixels = chosen_images(images, dataset, split, num_images, processor.image_size)
    options = {"sigmas": sigmas} if sigmas else {}
    write_figure(noise_figure(processor, pixels, **options, seed=seed), output)


def denoising(
    source: Model,
    images: Images = None,
    dataset: Dataset = None,
    split: Split = "test",
    num_images: NumImages = 4,
    levels: Annotated[
        list[float] | None,
        typer.Option("--level", help="Noise relative to the signal, sigma/gamma; may be repeated; default four."),
    ] = None,
    seed: Seed = 0,
    weights: Weights = None,
    output: Stem = Path("denoising"),
):
    """Draw images, noise on them, and what the model makes of it, at several levels (Figure 8).

    ldae denoise paints the same as one picture of pixels, for a quick look.

    \b
    ldae figure denoising runs/mine cat.jpg dog.jpg --level 0.5 --level 1
    """
    from ldae_hf.evaluation.figures import denoising_figure

    model, processor, pixels = _model_and_images(source, images, dataset, split, num_images, weights)
    write_figure(
        denoising_figure(model, processor, pixels, _timesteps(model, levels) if levels else None, seed), output
    )


def features(
    source: Annotated[str, typer.Argument(help="A run; or an encoder of l-DAE, transformers or timm, as ldae probe.")],
    images: Images = None,
    dataset: Dataset = None,
    split: Split = "test",
    num_images: NumImages = 4,
    layers: Annotated[
        list[int] | None, typer.Option("--layer", help="After this block, from 1; may be repeated; default the last.")
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Pixels per side; default the encoder's; positions are interpolated."),
    ] = None,
    output: Stem = Path("features"),
):
    """Draw the features of patches in colour: their first three principal components as red, green and blue.

    One PCA for all images: patches of one colour are alike to the encoder. Colours of two layers cannot be compared.

    \b
    ldae figure features runs/mine cat.jpg dog.jpg --image-size 512
    ldae figure features facebook/dinov2-small cat.jpg --layer 4 --layer 8 --layer 12
    """
    from ldae_hf.evaluation.figures import features_figure
    from ldae_hf.evaluation.figures.sources import find_encoder
    from ldae_hf.evaluation.sample_pictures import check_choice, chosen_images

    check_choice(images, dataset)
    encoder = find_encoder(source, image_size=image_size)
    pixels = chosen_images(images, dataset, split, num_images, encoder.image_size)
    write_figure(features_figure(encoder, pixels, layers), output)


def _model_and_images(source: str, files, dataset: str | None, split: str, count: int, weights: str | None):
    from ldae_hf.evaluation.generators import load_generator
    from ldae_hf.evaluation.sample_pictures import check_choice, chosen_images

    check_choice(files, dataset)
    loaded = load_generator(source, weights=weights).pipeline
    return loaded.model, loaded.processor, chosen_images(files, dataset, split, count, loaded.processor.image_size)


def _timesteps(model, levels: list[float]) -> list[int]:
    from ldae_hf.training.pictures import watched_levels

    if not all(0 < level < float("inf") for level in levels):
        raise ValueError("--level is sigma/gamma, the noise relative to the signal: a number above 0.")
    return watched_levels(model.ldae.schedule, levels)
