"""`ldae figure …`: the paper's figures, of your own runs and results."""

from pathlib import Path
from typing import Annotated

import typer

from .figure_options import WITH_PROCESSOR, Stem, write_figure
from .image_figures import denoising, features, noise, pipeline
from .options import PLAIN, Tier


app = typer.Typer(**PLAIN)

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
    write_figure(schedules_figure(**options, num_train_timesteps=timesteps), output)


@app.command("filters")
def filters(
    sources: Annotated[list[str], typer.Argument(help=f"Runs of tokenizers; or {WITH_PROCESSOR}, for PCA alone.")],
    count: Annotated[int, typer.Option(min=1, help="Filters of each, at most K.")] = 8,
    output: Stem = Path("filters"),
):
    """Draw the first filters of PCA, and below them those of patch-wise tokenizers, by falling variance (Figure 4).

    \b
    ldae figure filters runs/patch-ae runs/patch-vae
    ldae figure filters runs/mine --count 16
    """
    from ldae_hf.evaluation.figures import filters_figure

    write_figure(filters_figure(sources, count), output)


@app.command("curve")
def curve(
    ledger: Ledger = USUAL,
    tier: Tier = None,
    paper_only: PaperOnly = False,
    output: Stem = Path("curve"),
):
    """Draw accuracy over K for every tokenizer: the paper's points, and ours where there are any (Figure 5).

    Ours are means over seeds with 95 % t-intervals, of the recipes of the sweeps (ldae recipes tree) at one tier.

    \b
    ldae figure curve --tier cpu
    ldae figure curve --paper-only
    """
    from ldae_hf.evaluation.figures import curve_figure, curve_panels

    write_figure(curve_figure(curve_panels(None if paper_only else ledger, tier)), output)


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
    write_figure(path_bars(steps, f"ours, {dataset}"), output)


@app.command("spectrum")
def spectrum(
    sources: Annotated[list[str], typer.Argument(help=f"Each {WITH_PROCESSOR}.")],
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
    write_figure(spectrum_figure(dict(zip(names, map(find_processor, sources), strict=True))), output)


app.command("noise")(noise)
app.command("denoising")(denoising)
app.command("features")(features)
app.command("pipeline")(pipeline)
