"""`ldae results …`: what a ledger says."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN, Tier


app = typer.Typer(**PLAIN)


@app.callback()
def results():
    """Results that were measured, as tables and figures."""


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
