"""`ldae extractor …`: networks whose features a Fréchet distance compares."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN, ImageColumn, LabelColumn, NumWorkers


app = typer.Typer(**PLAIN)


def parse_widths(text: str) -> tuple[int, ...]:
    """The numbers of "48,96,192"."""
    try:
        return tuple(int(width) for width in text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be whole numbers with commas between, like 48,96,192.") from None


@app.callback()
def extractor():
    """Feature extractors, for the Fréchet distance between generated and real images (ldae fid).

    FID is the distance between features of one Inception-v3, whose weights are not ours to ship. Get them once:

    \b
    curl -LO https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth
    ldae weights convert pt_inception-2015-12-05-6726825d.pth --output inception.safetensors

    \b
    The download has 95,628,359 bytes and the sha256
    6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2
    """


@app.command("train")
def train(
    dataset: Annotated[str, typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA.")],
    output_dir: Annotated[Path, typer.Option(help="The extractor's folder, written whole when it is trained.")],
    train_split: Annotated[str, typer.Option(help="Split to learn from.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    image_size: Annotated[int, typer.Option(help="Side of the images in pixels.")] = 32,
    epochs: Annotated[int, typer.Option(help="Passes over the training split.")] = 12,
    widths: Annotated[
        tuple, typer.Option(parser=parse_widths, metavar="W,W,…", help="Channels of the stages; the last is D.")
    ] = "48,96,192",
    seed: Annotated[int, typer.Option(help="Of initialisation, order and crops.")] = 0,
    num_workers: NumWorkers = 2,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
):
    """Train a small classifier on a data set's labels; the Fréchet distance is taken between its features.

    FID's Inception-v3 was trained on ImageNet, and its weights are a download (ldae extractor --help). Train an
    extractor where they are not at hand, or where the images are nothing like ImageNet's: 32 pixels a side, X-rays,
    textures. A distance measures what its extractor sees: numbers of different extractors, two trained ones included,
    cannot be compared, neither with each other nor with a published FID.

    \b
    ldae extractor train --dataset cifar10 --output-dir extractors/cifar10
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training.extractor import train_extractor

    facts = train_extractor(**options)
    typer.echo(f"extractor: {output_dir}, test top-1 {facts['test_top1']:.2f} %")
