"""`ldae weights …`: other people's weights."""

from pathlib import Path
from typing import Annotated

import typer

from .options import PLAIN


app = typer.Typer(**PLAIN)


@app.callback()
def weights():
    """Other people's weights: of VGG-16 and LPIPS, and of FID's Inception (ldae extractor --help says where it is).

    A PyTorch checkpoint is a pickle, and a pickle can hold code; ldae reads safetensors only.
    """


@app.command("convert")
def convert_weights(
    file: Annotated[Path, typer.Argument(help="A PyTorch checkpoint: .pth, .pt or .ckpt.")],
    output: Annotated[Path | None, typer.Option(help="Default: FILE with the ending .safetensors.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an output that is there.")] = False,
):
    """Write the tensors of a PyTorch checkpoint as safetensors, without running any code that it may hold.

    The perceptual loss LPIPS takes two: VGG-16's, from download.pytorch.org/models, and vgg.pth of LPIPS v0.1, from
    lpips/weights/v0.1 of github.com/richzhang/PerceptualSimilarity.

    \b
    ldae weights convert vgg16-397923af.pth --output lpips/vgg16.safetensors
    ldae weights convert vgg.pth --output lpips/lpips.safetensors
    ldae tokenizer train retrain_vqgan --perceptual-weights lpips --output-dir runs/vqgan
    """
    from ldae_hf.weights import convert

    typer.echo(convert(file, output, force=force))
