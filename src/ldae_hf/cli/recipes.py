"""`ldae recipes …`: what there is to train."""

from pathlib import Path
from typing import Annotated

import typer

from ldae_hf.recipes import load_recipe
from ldae_hf.recipes.display import diff_text, path_markdown, show_text, tree_text

from .options import PLAIN, Overrides, RecipeName, Tier


app = typer.Typer(**PLAIN)


@app.callback()
def recipes():
    """The paper's systems, one small recipe each, and the tiers that shrink them.

    A recipe names its parent and says what it changes. --tier shrinks any recipe to a smaller image set and machine;
    --set changes single values. The resolved recipe is saved with the weights.
    """


@app.command("tree")
def tree(
    ledger: Annotated[
        Path | None,
        typer.Option(help="Results to show beside the paper's; default benchmarks/results/ledger.jsonl, if there."),
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Only the path, as a markdown table.")] = False,
):
    """Show the path and what branches off it, the paper's number and ours, and what each step changes.

    \b
    ldae recipes tree
    ldae recipes tree --markdown --ledger results.jsonl
    """
    if ledger is None and (usual := Path("benchmarks/results/ledger.jsonl")).is_file():
        ledger = usual
    ours = None
    if ledger is not None:
        from ldae_hf.evaluation.probe_results import probe_cells

        ours = probe_cells(ledger)
    typer.echo(path_markdown(ours) if markdown else tree_text(ours, str(ledger)))


@app.command("show")
def show(name: RecipeName, tier: Tier = None, overrides: Overrides = None):
    """Print every value of a recipe as YAML; a comment says who set what the root does not.

    \b
    ldae recipes show epochs_1600
    ldae recipes show size_b --tier cpu --set train.epochs=2
    """
    typer.echo(show_text(load_recipe(name, tier, overrides or [])))


@app.command("diff")
def diff(first: RecipeName, second: RecipeName, tier: Tier = None):
    """Print the values in which two recipes differ.

    \b
    ldae recipes diff l_dae size_l_epochs_1600
    ldae recipes diff random_crop size_b --tier desk
    """
    typer.echo(diff_text(load_recipe(first, tier), load_recipe(second, tier)))
