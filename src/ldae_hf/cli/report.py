"""`ldae report`."""

from pathlib import Path
from typing import Annotated

import typer


def report(
    run: Annotated[Path, typer.Argument(help="The --output-dir of a training, which may be going on.")],
    output: Annotated[
        Path | None, typer.Option(help="The page's file; default report.html in the run's folder.")
    ] = None,
    open_it: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
):
    """Write one page about a run: how it is, its curves, pictures, failures, recipe and machines.

    The page is one file that needs nothing else; it can be sent, printed and read on a phone.

    \b
    ldae report runs/cifar10
    ldae report runs/cifar10 --output ~/report.html --open
    """
    from ldae_hf.evaluation.report import write_report

    page = write_report(run, output)
    typer.echo(page)
    if open_it:
        typer.launch(str(page))
