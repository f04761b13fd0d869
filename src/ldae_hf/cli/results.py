"""`ldae results …`: what a ledger says."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN, Figure, Tier


app = typer.Typer(**PLAIN)

USUAL = Path("benchmarks/results/ledger.jsonl")


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
    ledger: Annotated[Path, typer.Option(help="Results of ldae probe and ldae fid.")] = USUAL,
    tier: Tier = None,
    group: Annotated[int | None, typer.Option(help="Only the distances of this number, in the order shown.")] = None,
    figure: Figure = None,
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
        from ldae_hf.evaluation.figures import path_figure, save_figure

        typer.echo(f"\nfigure: {save_figure(path_figure(chosen), figure)}")


@app.command("list")
def list_rows(
    ledger: Annotated[Path, typer.Option(help="Results of the commands that evaluate.")] = USUAL,
    task: Annotated[str | None, typer.Option(help="Only of this task, such as linear_probe.")] = None,
    recipe: Annotated[str | None, typer.Option(help="Only of encoders of this recipe.")] = None,
    tier: Tier = None,
):
    """List the rows of a ledger, with the numbers that ldae results rerun takes.

    \b
    ldae results list --task linear_probe --tier cpu
    """
    from ldae_hf.evaluation.ledger_rows import numbered_rows, rows_text

    wanted = {"task": task, "recipe": recipe, "tier": tier}
    typer.echo(rows_text(numbered_rows(ledger, {key: value for key, value in wanted.items() if value is not None})))


@app.command("rerun")
def rerun(
    row: Annotated[
        int, typer.Argument(help="Its number in ldae results list; of those that match from the end after --, as -1.")
    ] = -1,
    ledger: Annotated[Path, typer.Option(help="Results of the commands that evaluate.")] = USUAL,
    task: Annotated[str | None, typer.Option(help="Count only rows of this task.")] = None,
    encoder: Annotated[str | None, typer.Option(help="Count only rows of this encoder, by name.")] = None,
    execute: Annotated[bool, typer.Option("--execute", help="Run it and compare, not only print it.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Relative, of each number; default 0 on the same machine and versions, else 0.01."),
    ] = None,
):
    """Print the command that gives a result again; with --execute run it and say what differs.

    It compares the encoder's fingerprint, the whole protocol and all numbers, and ends with exit code 1 if one differs.
    Only ldae's commands that evaluate are run, from the folder in which you are, which their paths must fit.

    \b
    ldae results rerun 17
    ldae results rerun --task knn --encoder runs/cifar10/encoder --execute
    ldae results rerun --execute -- -1
    """
    from ldae_hf.evaluation.ledger_rows import choose_row, numbered_rows
    from ldae_hf.evaluation.rerun import rerun, stored_command

    wanted = {key: value for key, value in {"task": task, "name": encoder}.items() if value is not None}
    chosen = choose_row(numbered_rows(ledger, wanted), row)
    command, is_whole = stored_command(chosen)
    typer.echo(command)
    if not is_whole:
        typer.echo("An old row without `rerun`: this is its command as it was typed.", err=True)
    if execute:
        result = rerun(chosen, tolerance)
        typer.echo("\n".join([*(f"note: {note}" for note in result.notes), *result.differs]))
        typer.echo(f"{len(result.differs)} differences" if result.differs else "The result is the same.")
        raise typer.Exit(1 if result.differs else 0)
