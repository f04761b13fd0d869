"""`ldae data …`: what is wrong with a data set, before a run."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN, ImageColumn, NumWorkers


app = typer.Typer(**PLAIN)


@app.callback()
def data():
    """Data sets: look at every image before a run does."""


@app.command("check")
def check(
    dataset: Annotated[str, typer.Argument(help="A Hub name, or a folder or file: as given, else inside $LDAE_DATA.")],
    split: Annotated[str, typer.Option(help="The split to check.")] = "train",
    config: Annotated[str | None, typer.Option(help="Configuration of a data set that has several.")] = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read it as a stream, as a training with --streaming does.")
    ] = False,
    image_column: ImageColumn = None,
    num_workers: NumWorkers = 2,
    output: Annotated[Path, typer.Option(help="The quarantine file.")] = Path("quarantine.jsonl"),
    min_side: Annotated[int, typer.Option(help="Pixels; an image with a shorter side is tiny.")] = 32,
    max_aspect: Annotated[float, typer.Option(help="Ratio of the longer to the shorter side.")] = 8.0,
    max_pixels: Annotated[int, typer.Option(help="An image with more is oversized.")] = 89_478_485,
    keep: Annotated[list[str] | None, typer.Option(metavar="KIND", help="Do not leave out; may be repeated.")] = None,
    drop: Annotated[list[str] | None, typer.Option(metavar="KIND", help="Leave out too; may be repeated.")] = None,
):
    """Decode every image as training does, list what is wrong, and write a quarantine file for the training.

    \b
    Left out, since a training would replace them by other images (unusable):
      missing empty unreadable truncated corrupt oversized values
    Left out, though a training would use them (warnings):
      damaged    decodes, but a PNG's checksum is wrong, or a JPEG's data does not fit together
      tiny       a side is shorter than --min-side
      duplicate  the same file or pixels as an earlier image, which stays
    Listed in the file, but not left out (warnings):
      mode       CMYK, 16 bits, floats, transparency
      aspect     a ratio of the sides above --max-aspect
      animated   several frames, of which the first is used

    \b
    ldae data check cifar10 --output cifar10.jsonl
    ldae data check path/to/images --keep duplicate --drop animated
    ldae pretrain l_dae --dataset path/to/images --quarantine quarantine.jsonl --output-dir runs/mine

    Exit code 0: nothing found. 1: something found. 2: the data set or an option is wrong. 130: interrupted, and no file
    was written. JPEG has no checksum: a changed byte that leaves the data well-formed cannot be found.
    """
    from ldae_hf.training.data import load_images
    from ldae_hf.training.data_check import check_images

    source = load_images(
        dataset, split, config=config, streaming=streaming, image_column=image_column, max_pixels=max_pixels
    )
    limits = dict(min_side=min_side, max_aspect=max_aspect, keep=keep or (), drop=drop or ())
    try:
        report = check_images(source, output, num_workers=num_workers, **limits)
    except KeyboardInterrupt:
        typer.echo("Interrupted; no file was written.", err=True)
        raise typer.Exit(130) from None
    typer.echo(report.table())
    raise typer.Exit(1 if report.findings else 0)
