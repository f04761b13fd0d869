"""`ldae reproduce`: the paper's tables, run: paper, ours, verdict."""

import math
from pathlib import Path
from typing import Annotated

import typer

from .figure_options import is_stem
from .options import CheckpointEvery, NumWorkers, PerceptualWeights, PerDeviceBatchSize, can_be_written


TIERS = ("cpu", "desk", "full")


def is_time(hours: float | None) -> float | None:
    """The hours of an option, if they are some.

    Raises:
        ValueError: they are none, or have no end.
    """
    if hours is not None and not 0 < hours < math.inf:
        raise ValueError(f"--max-hours {hours:g} is no time; give a number above 0.")
    return hours


def reproduce(
    name: Annotated[
        str | None, typer.Argument(help="A table or figure; default: list all of them and how far they are.")
    ] = None,
    tier: Annotated[
        str,
        typer.Option(
            help=f"{', '.join(TIERS)}; full is the paper's size, on ImageNet-1k; or the path of your own .yaml file."
        ),
    ] = "cpu",
    seeds: Annotated[
        list[int] | None, typer.Option("--seed", help="Of the trainings; may be repeated; default 0, 1, 2.")
    ] = None,
    rows: Annotated[
        list[str] | None,
        typer.Option("--row", help="Run only this row and what it is compared with; may be repeated."),
    ] = None,
    runs: Annotated[Path, typer.Option(help="The folder of all runs, which are gone on with.")] = Path("runs"),
    ledger: Annotated[Path, typer.Option(help="Results: read, and appended to.")] = Path(
        "benchmarks/results/ledger.jsonl"
    ),
    output: Annotated[
        Path | None,
        typer.Option(
            help="The table's and the figure's path without ending: .md, .png and .svg.",
            callback=lambda path: path and is_stem(path),
        ),
    ] = None,
    table_only: Annotated[bool, typer.Option("--table-only", help="Train and measure nothing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be run, and how long it should take here.")
    ] = False,
    max_hours: Annotated[
        float | None, typer.Option(help="Stop after this time; run again, it goes on.", callback=is_time)
    ] = None,
    extractor: Annotated[
        Path | None, typer.Option(help="Of the Fréchet distance in table1; see ldae extractor --help.")
    ] = None,
    perceptual_weights: PerceptualWeights = None,
    processes: Annotated[int, typer.Option(min=1, help="GPUs that share a training.")] = 1,
    num_workers: NumWorkers = 2,
    per_device_batch_size: PerDeviceBatchSize = None,
    checkpoint_every: CheckpointEvery = None,
    compile: Annotated[bool, typer.Option(help="torch.compile the models.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="The table in markdown.")] = False,
):
    """Run a table or figure of the paper, and say of each claim whether it holds here.

    What is in the ledger is not run again, what was stopped goes on, and the table and its figure come from the ledger.
    The rule of the verdicts stands below each table; it was written before the runs.

    \b
    ldae reproduce                                           all names, and their states
    ldae reproduce single-level --tier cpu --dry-run         what is missing, and how long it takes
    ldae reproduce single-level --tier cpu --max-hours 2
    ldae reproduce table3 --tier cpu --table-only --output table3
    """
    given = dict(locals())  # each option is the argument of the same name
    from dataclasses import fields

    from ldae_hf.evaluation.ledger import read_ledger
    from ldae_hf.reproduction.numbers import numbers
    from ldae_hf.reproduction.table import experiment_text, overview
    from ldae_hf.reproduction.tables import EXPERIMENTS, experiment

    running = {"--seed": seeds, "--row": rows, "--max-hours": max_hours, "--dry-run": dry_run}
    chosen = None if tier == "full" else tier
    if name is None:
        _check_unused(running | {"--table-only": table_only, "--output": output}, "without a name")
        tiers = TIERS if tier in TIERS else (*TIERS, tier)
        typer.echo(overview([experiment(one) for one in EXPERIMENTS], read_ledger(ledger), tiers, markdown))
        return
    if table_only:
        _check_unused(running, "with --table-only")
        if not ledger.exists():
            raise ValueError(f"There is no ledger {ledger}, of which --table-only could make a table.")
    what = experiment(name, chosen)
    found, end = numbers(what, read_ledger(ledger), chosen), "finished"
    if not table_only:
        from ldae_hf.reproduction.jobs import Options, missing_jobs

        if absent := [file for file in (extractor, perceptual_weights) if file is not None and not file.exists()]:
            raise ValueError(f"{absent[0]} does not exist.")
        options = Options(**{field.name: given[field.name] for field in fields(Options)})
        jobs, skipped = missing_jobs(what, found, chosen, seeds or (0, 1, 2), options, rows or ())
        for sentence in skipped:
            typer.echo(sentence, err=True)
        if dry_run:
            from ldae_hf.reproduction.estimate import dry_run_text

            typer.echo(dry_run_text(jobs, chosen, options))
            return
        if jobs:
            from ldae_hf.reproduction.run import run_jobs

            can_be_written(ledger)
            end = run_jobs(jobs, options, max_hours, typer.echo)
            found = numbers(what, read_ledger(ledger), chosen)
            typer.echo("" if end == "finished" else "\nso far:\n")
    typer.echo(experiment_text(what, found, chosen, markdown))
    if output is not None:
        from ldae_hf.evaluation.figures import save_both
        from ldae_hf.reproduction.figure import experiment_figure

        file = output.with_name(output.name + ".md")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(experiment_text(what, found, chosen, markdown=True) + "\n", encoding="utf-8")
        for written in [file, *save_both(experiment_figure(what, found, chosen), output)]:
            typer.echo(written)
    if end == "signal":
        from ldae_hf.training import EXIT_CODE

        raise typer.Exit(EXIT_CODE)


def _check_unused(options: dict, where: str) -> None:
    """Raises ValueError for an option that was given and means nothing."""
    if given := [option for option, value in options.items() if value]:
        raise ValueError(f"{given[0]} means nothing {where}; leave it out.")
