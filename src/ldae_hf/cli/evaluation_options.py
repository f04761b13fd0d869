"""Options that mean the same in all commands that evaluate encoders."""

from pathlib import Path
from typing import Annotated

import typer

from .options import Ledger, NumWorkers, Output


__all__ = ["Ledger", "NumWorkers", "Output"]  # so that a command finds all of its options here

ENCODER_HELP = (
    "An encoder: its folder, or its name on the Hub, of l-DAE, transformers or timm; or timm:NAME, or "
    "timm:NAME@FILE.safetensors for weights of your own."
)
Encoder = Annotated[str, typer.Argument(help=ENCODER_HELP)]
Encoders = Annotated[list[str], typer.Argument(metavar="ENCODER...", help=f"{ENCODER_HELP} Several are compared.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA; default the encoder's recipe's."),
]
TrainSplit = Annotated[str | None, typer.Option(help="Split to learn from; slices such as train[:5000] work.")]
TestSplit = Annotated[str | None, typer.Option(help="Split to test on.")]
Processor = Annotated[
    Path | None, typer.Option(help="A folder with the image processor; default that of the encoder's folder.")
]
Timestep = Annotated[int | None, typer.Option(help="Timestep of l-DAE's features; default the model's.")]
Noise = Annotated[str, typer.Option(help="clean, or frozen: noisy input, one noise per image (l-DAE).")]
Layers = Annotated[
    list[str] | None,
    typer.Option("--layer", help="Features after this block: 1, 2, ... or last, the default; may be repeated."),
]
Pools = Annotated[
    list[str] | None,
    typer.Option(
        "--pool",
        help="mean over tokens (the default), class token, class_mean (both), or raw_mean (before the final norm); "
        "may be repeated.",
    ),
]
Dtype = Annotated[str, typer.Option(help="Precision of the encoder: float32 or bfloat16.")]
Floors = Annotated[
    list[str] | None,
    typer.Option(
        "--floor", help="One of pixels, latents, untrained, random_patches, or none; may be repeated; default all."
    ),
]
Seed = Annotated[int, typer.Option(help="Of the classifier, the floors and frozen noise.")]
ImageSize = Annotated[
    int | None, typer.Option(help="Pixels per side of the crops; default the encoder's; positions are interpolated.")
]
CropShare = Annotated[
    float, typer.Option(help="Share of the centre square's side that is kept; 0.875 is usual elsewhere.")
]
BatchSize = Annotated[int, typer.Option(help="Images of a forward pass.")]


def evaluation_options(options: dict) -> dict:
    """The options of a command as arguments of the function behind it: what was not given is left to its default, of
    --floor `none` is no floor, and the number of a --layer is a number.

    Raises:
        ValueError: a layer that is neither a number nor `last`.
    """
    options = dict(options)
    for name in ("layers", "pools", "floors"):
        if name in options and not options[name]:
            options.pop(name)
    if "floors" in options:
        options["floors"] = tuple(name for name in options["floors"] if name != "none")
    if "layers" in options:
        options["layers"] = tuple(map(_layer, options["layers"]))
    return options


def _layer(given: str) -> int | str:
    if given != "last" and not given.isdigit():
        raise ValueError(f"--layer {given} is neither the number of a block nor last.")
    return given if given == "last" else int(given)
