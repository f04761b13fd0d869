"""`ldae results …`: what a ledger says."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN, Tier


app = typer.Typer(**PLAIN)


@app.callback()
def results():
    """Results that were measured, as tables and figures."""


@app.command("samples")
def samples(
    sources: Annotated[list[str], typer.Argument(help="Runs, checkpoints or pipelines, a row of images each.")],
    num_images: Annotated[int, typer.Option(min=1, help="Of each.")] = 16,
    steps: Annotated[int, typer.Option(help="Levels of noise that each passes through.")] = 50,
    sampler: Annotated[str, typer.Option(help="ancestral (DDPM) or deterministic (DDIM).")] = "ancestral",
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    output: Annotated[Path, typer.Option(help="The picture's file.")] = Path("samples.png"),
):
    """Paint images of several models, one below the other, each column from the same noise.

    They are the first ones that ldae fid of the same sampler, steps and seed measures.

    \b
    ldae results samples runs/dit runs/patch-pca runs/l-dae --output path.png
    """
    from ldae_hf.evaluation.sample_pictures import check_picture_file, rows_of_models, save_picture
    from ldae_hf.evaluation.samples import SAMPLERS

    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler!r} is not one of {', '.join(SAMPLERS)}.")
    check_picture_file(output)
    options = dict(num_inference_steps=steps, eta=SAMPLERS[sampler], seed=seed)
    typer.echo(save_picture(rows_of_models(sources, num_images, **options), output))


@app.command("path")
def path(
    ledger: Annotated[Path, typer.Option(help="Results of ldae probe and ldae fid.")] = Path(
        "benchmarks/results/ledger.jsonl"
    ),
    tier: Tier = None,
    group: Annotated[int | None, typer.Option(help="Only the distances of this number, in the order shown.")] = None,
    figure: Annotated[Path | None, typer.Option(help="Draw it too, .png or .svg.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in markdown.")] = False,
):
    """Show the linear probe and the Fréchet distance along the paper's path, the paper's numbers and ours.

    Distances of another extractor, reference, count or sampler cannot be compared: each kind has a table of its own.

    \b
    ldae results path --tier cpu
    ldae results path --tier cpu --group 1 --figure path.svg
    """
    from ldae_hf.evaluation.path_results import choose_group, path_groups, path_text

    groups = path_groups(ledger, tier)
    chosen = choose_group(groups, group) if group is not None or figure is not None else None
    numbered = [(number, item) for number, item in enumerate(groups, start=1) if chosen is None or item is chosen]
    typer.echo("\n\n".join(f"{number}. {path_text(item, markdown)}" for number, item in numbered))
    if figure is not None:
        from ldae_hf.evaluation.path_figure import path_figure

        typer.echo(f"\nfigure: {path_figure(chosen, figure)}")
