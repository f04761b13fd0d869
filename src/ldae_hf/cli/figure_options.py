"""What all commands of `ldae figure` share."""

from pathlib import Path
from typing import Annotated

import typer

from .options import can_be_written


def is_stem(file: Path) -> Path:
    """The path of two files without ending, if they can be written; a folder may have that name.

    Raises:
        ValueError: they cannot.
    """
    can_be_written(Path(f"{file}.png"))
    return file


WITH_PROCESSOR = "a run, a checkpoint, an encoder, a processor's folder, or a name on the Hub"
Stem = Annotated[
    Path, typer.Option(help="The files' path without ending: .png and .svg are both written.", callback=is_stem)
]


def write_figure(figure, output: Path) -> None:
    """Writes both files of a figure and says where they are."""
    from ldae_hf.evaluation.figures import save_both

    for file in save_both(figure, output):
        typer.echo(file)
