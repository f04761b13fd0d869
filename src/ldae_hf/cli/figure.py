"""`ldae figure …`: the paper's figures, of your own runs and results."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN, Tier


app = typer.Typer(**PLAIN)

Model = Annotated[str, typer.Argument(help="A run, a checkpoint, a pipeline's folder, or its name on the Hub.")]
WithProcessor = "a run, a checkpoint, an encoder, a processor's folder, or a name on the Hub"
Images = Annotated[list[Path] | None, typer.Argument(help="Image files; or give --dataset.")]
Dataset = Annotated[str | None, typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA.")]
Split = Annotated[str, typer.Option(help="Of the data set.")]
NumImages = Annotated[int, typer.Option(min=1, help="Of the data set, spread over it; a row each.")]
Seed = Annotated[int, typer.Option(help="Of the noise.")]
Weights = Annotated[str | None, typer.Option(help="ema or raw, of a run or checkpoint; default ema if it is there.")]
Stem = Annotated[Path, typer.Option(help="The files' path without ending: .png and .svg are both written.")]
Ledger = Annotated[Path | None, typer.Option(help="Results of ldae probe.")]
PaperOnly = Annotated[bool, typer.Option("--paper-only", help="Leave our own results out; no ledger is read.")]

USUAL = Path("benchmarks/results/ledger.jsonl")


@app.callback()
def figure():
    """Figures for a paper: each command writes a PNG and an SVG, 3.3 or 6.9 inches wide, with words of 7.5 points.

    \b
    ldae figure pipeline runs/mine cat.jpg        an image on its way through the model (Figure 1)
    ldae figure schedules                         signal over timesteps (Figure 3)
    ldae figure filters runs/mine                 filters of PCA, AE and VAE (Figure 4)
    ldae figure curve --tier cpu                  accuracy over K (Figure 5)
    ldae figure path --tier cpu                   accuracy along the path (Figure 6)
    ldae figure noise runs/mine cat.jpg           noise on pixels and on latents (Figure 7)
    ldae figure denoising runs/mine cat.jpg       clean, noisy, denoised (Figure 8)
    ldae figure features runs/mine cat.jpg        feature maps in colour
    ldae figure spectrum runs/mine                the PCA's variances
    """


@app.command("pipeline")
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
    _write(pipeline_figure(model, processor, pixels, timestep, seed), output)


@app.command("schedules")
def schedules(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[SCHEDULE]...", help="Names; default those along the path.")
    ] = None,
    timesteps: Annotated[int, typer.Option(min=1, help="T, how many levels of noise there are.")] = 1000,
    output: Stem = Path("schedules"),
):
    """Draw how much of the signal the noise schedules leave, gamma² / (gamma² + sigma²), over the timesteps (Figure 3).

    \b
    ldae figure schedules
    ldae figure schedules linear_sigma snr_matched_sigma
    """
    from ldae_hf.evaluation.figures import schedules_figure

    options = {"names": names} if names else {}
    _write(schedules_figure(**options, num_train_timesteps=timesteps), output)


@app.command("filters")
def filters(
    sources: Annotated[list[str], typer.Argument(help=f"Runs of tokenizers; or {WithProcessor}, for PCA alone.")],
    count: Annotated[int, typer.Option(min=1, help="Filters of each, at most K.")] = 8,
    output: Stem = Path("filters"),
):
    """Draw the first filters of PCA, and below them those of patch-wise tokenizers, by falling variance (Figure 4).

    \b
    ldae figure filters runs/patch-ae runs/patch-vae
    ldae figure filters runs/mine --count 16
    """
    from ldae_hf.evaluation.figures import filters_figure

    _write(filters_figure(sources, count), output)


@app.command("curve")
def curve(
    ledger: Ledger = USUAL,
    tier: Tier = None,
    paper_only: PaperOnly = False,
    output: Stem = Path("curve"),
):
    """Draw accuracy over K for every tokenizer: the paper's points, and ours where there are any (Figure 5).

    Ours are means over seeds with standard deviations, of the recipes of the sweeps (ldae recipes tree) at one tier.

    \b
    ldae figure curve --tier cpu
    ldae figure curve --paper-only
    """
    from ldae_hf.evaluation.figures import curve_figure, curve_panels

    _write(curve_figure(curve_panels(None if paper_only else ledger, tier)), output)


@app.command("path")
def path(
    ledger: Ledger = USUAL,
    tier: Tier = None,
    paper_only: PaperOnly = False,
    output: Stem = Path("path"),
):
    """Draw the linear probe of every step of the path as bars, the paper's and ours with their floors (Figure 6).

    ldae results path --figure draws it beside the distance of generated images.

    \b
    ldae figure path --tier cpu
    """
    from ldae_hf.evaluation.figures import path_bars, path_steps

    steps, dataset = path_steps(None if paper_only else ledger, tier)
    _write(path_bars(steps, f"ours, {dataset}"), output)


@app.command("noise")
def noise(
    source: Annotated[str, typer.Argument(help=f"Whose PCA: {WithProcessor}.")],
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
    _write(noise_figure(processor, pixels, **options, seed=seed), output)


@app.command("denoising")
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
    _write(denoising_figure(model, processor, pixels, _timesteps(model, levels) if levels else None, seed), output)


@app.command("features")
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
    _write(features_figure(encoder, pixels, layers), output)


@app.command("spectrum")
def spectrum(
    sources: Annotated[list[str], typer.Argument(help=f"Each {WithProcessor}.")],
    names: Annotated[
        list[str] | None, typer.Option("--name", help="In the legend, one for each; default the ends of their paths.")
    ] = None,
    output: Stem = Path("spectrum"),
):
    """Draw the variance of patches along each principal direction, and what share the first ones hold; K is marked.

    \b
    ldae figure spectrum runs/cifar10 runs/imagenette --name CIFAR-10 --name imagenette
    """
    from ldae_hf.evaluation.figures import spectrum_figure
    from ldae_hf.evaluation.figures.sources import find_processor, short_names

    names = names or short_names(sources)
    if len(set(names)) != len(sources):
        raise ValueError(f"{len(sources)} processors need as many different names, not {', '.join(names)}.")
    _write(spectrum_figure(dict(zip(names, map(find_processor, sources), strict=True))), output)


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


def _write(figure, output: Path) -> None:
    from ldae_hf.evaluation.figures import save_both

    for file in save_both(figure, output):
        typer.echo(file)
