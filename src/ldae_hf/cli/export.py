"""`ldae export`: an encoder for who does not have this package."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    encoder: Annotated[str, typer.Argument(help="The folder of an encoder or a classifier, or its name on the Hub.")],
    output: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    format: Annotated[str, typer.Option(help="transformers, timm or onnx.")] = "transformers",
    timestep: Annotated[int | None, typer.Option(help="Timestep of the features; default the model's.")] = None,
):
    """Fold an encoder at its timestep into a plain Vision Transformer, and write it for another library.

    Nothing of l-DAE is left in it but the weights: transformers loads it as IJepaModel, timm as VisionTransformer, and
    ONNX Runtime for images of any number and size. What is printed: the lines that load it, and how far its answers
    are from the model's, relative to the largest one.

    \b
    ldae export runs/mine/encoder exports/mine
    ldae export runs/mine/encoder exports/mine-onnx --format onnx
    """
    from ldae_hf.export import export_folder, parity_text

    rows, lines = export_folder(encoder, output, format, timestep)
    typer.echo(f"{lines}\n\n{parity_text(rows)}")
