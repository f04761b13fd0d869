"""`ldae probe`, `ldae knn`: encoders, beside their floors."""

from typing import Annotated

import typer

from .options import Ledger, NumWorkers, Output


Encoder = Annotated[str, typer.Argument(help="An encoder's folder, or its name on the Hub.")]
Dataset = Annotated[
    str | None,
    typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA; default the encoder's recipe's."),
]
TrainSplit = Annotated[str | None, typer.Option(help="Split to learn from; slices such as train[:5000] work.")]
TestSplit = Annotated[str | None, typer.Option(help="Split to test on.")]
Timestep = Annotated[int | None, typer.Option(help="Timestep of the features; default the model's.")]
Noise = Annotated[str, typer.Option(help="clean, or frozen: noisy input, one noise per image.")]
Dtype = Annotated[str, typer.Option(help="Precision of the encoder: float32 or bfloat16.")]
Floors = Annotated[
    list[str] | None,
    typer.Option(
        "--floor", help="One of pixels, latents, untrained, random_patches, or none; may be repeated; default all."
    ),
]
EvaluationSeed = Annotated[int, typer.Option(help="Of the classifier, the floors and frozen noise.")]


def chosen_floors(options: dict) -> dict:
    """The options of a command with its --floor taken apart: none given are all of them, `none` is no floor."""
    chosen = options.pop("floors")
    return options if not chosen else options | {"floors": [name for name in chosen if name != "none"]}


def probe(
    encoder: Encoder,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    learning_rates: Annotated[list[float] | None, typer.Option("--learning-rate", help="May be repeated.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the cached features.")] = 90,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    seed: EvaluationSeed = 0,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Linear probe of an encoder on cached features, beside its floors.

    The floors: raw pixels, the tokenizer's latents, the same encoder untrained, and random whitened patches of the same
    dimension.

    \b
    ldae probe runs/cifar10/encoder --dataset cifar10
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.run import run_linear_probe

    if not learning_rates:
        options.pop("learning_rates")
    options = chosen_floors(options)
    typer.echo(result_table(run_linear_probe(**options)))


def knn(
    encoder: Encoder,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    k: Annotated[int, typer.Option(help="Neighbours that vote.")] = 20,
    temperature: Annotated[float, typer.Option(help="Of their weights, exp(cosine / temperature).")] = 0.07,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    seed: EvaluationSeed = 0,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Exact k-nearest-neighbour accuracy of an encoder, beside its floors.

    \b
    ldae knn runs/cifar10/encoder --dataset cifar10
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.run import run_knn

    typer.echo(result_table(run_knn(**chosen_floors(options))))
