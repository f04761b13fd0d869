"""`ldae compare`: runs side by side."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Figure, Tier


def compare(
    groups: Annotated[
        list[str],
        typer.Argument(
            metavar="GROUP...",
            help="A recipe, recipe+key=value, a run's folder, a quoted glob of such, or the name of an encoder.",
        ),
    ],
    ledger: Annotated[Path, typer.Option(help="Results of the commands that evaluate.")] = Path(
        "benchmarks/results/ledger.jsonl"
    ),
    tier: Tier = None,
    dataset: Annotated[str | None, typer.Option(help="Only this data set; default each that all groups share.")] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Only this task; may be repeated.")] = None,
    choose: Annotated[
        str | None,
        typer.Option(metavar="KEY", help="Take of each recipe the value of KEY that is best on held-out images."),
    ] = None,
    figure: Figure = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables in markdown.")] = False,
):
    """Show groups of runs side by side: each task's mean and 95 % interval over seeds, the gaps, and the floors.

    A group is all seeds of a recipe. The gaps are to the first group, paired by seed. Numbers that were not measured
    under one protocol are refused, with the option in which they differ; budgets stand above the table.

    \b
    ldae compare l_dae mae --tier cpu
    ldae compare l_dae mae mae_equal_flops --tier cpu --choose train.base_learning_rate --markdown
    ldae compare l_dae mae+train.base_learning_rate=2.0e-3 --tier cpu --task knn
    ldae compare "runs/l_dae-seed-*" "runs/mae-seed-*" --figure comparison.png
    """
    from ldae_hf.evaluation.comparison import compare as side_by_side
    from ldae_hf.evaluation.comparison_text import comparison_text
    from ldae_hf.evaluation.ledger import read_ledger
    from ldae_hf.evaluation.measures import TASKS

    if not ledger.is_file():
        raise ValueError(f"There is no ledger {ledger}; the commands that evaluate write one with --ledger.")
    if len(groups) < 2:
        raise ValueError("A comparison needs two groups or more, such as `ldae compare l_dae mae --tier cpu`.")
    options = dict(tier=tier, dataset=dataset, tasks=tuple(tasks or TASKS), choose=choose)
    comparisons = side_by_side(groups, read_ledger(ledger), **options)
    typer.echo("\n\n".join(comparison_text(comparison, markdown) for comparison in comparisons))
    if figure is not None:
        from ldae_hf.evaluation.comparison_figure import comparison_figure

        if len(comparisons) > 1:
            names = ", ".join(comparison.dataset for comparison in comparisons)
            raise ValueError(f"A figure shows one data set; choose one of {names} with --dataset.")
        typer.echo(f"\nfigure: {comparison_figure(comparisons[0], figure)}")
