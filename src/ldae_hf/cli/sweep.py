"""`ldae sweep …`: one trained model at many points, without training it again."""

from pathlib import Path
from typing import Annotated

import typer

from .evaluation_options import (
    BatchSize,
    Dataset,
    Dtype,
    Encoder,
    Ledger,
    Noise,
    NumWorkers,
    Output,
    Processor,
    Seed,
    TestSplit,
    Timestep,
    TrainSplit,
)
from .options import PLAIN, is_figure


app = typer.Typer(**PLAIN)

Source = Annotated[str, typer.Argument(help="A run's folder, a checkpoint of it, or an l-DAE encoder's folder.")]
LearningRates = Annotated[
    list[float] | None,
    typer.Option("--learning-rate", help="Of the probe; the best on held-out samples counts; may be repeated."),
]
Epochs = Annotated[int, typer.Option(help="Passes over the cached features.")]
Figure = Annotated[
    Path | None, typer.Option(help="Draw it too, the paper's numbers beside: .png or .svg.", callback=is_figure)
]


@app.callback()
def sweep():
    """Linear probes on one trained model: after each block, at each timestep, for each layer and pool.

    Nothing is trained but the probes; features are extracted once and cached. A learning rate is selected for each
    point on held-out training samples, and so is the best point.
    """


@app.command("depth")
def depth(
    source: Source,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    blocks: Annotated[
        list[int] | None, typer.Option("--block", help="Number of a block; may be repeated; default see above.")
    ] = None,
    learning_rates: LearningRates = None,
    epochs: Epochs = 90,
    timestep: Timestep = None,
    noise: Noise = "clean",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
    figure: Figure = None,
):
    """Where would the encoder end best? A probe after blocks of the encoder and of the decoder.

    The decoder's blocks are in a run's checkpoints; a published encoder ends with its own. By default the blocks are
    those around the encoder's end, an eighth of all to each side (9 ... 15 of 24, 4 ... 8 of 12), or all if there are
    at most 8.

    \b
    ldae sweep depth runs/cifar10 --dataset cifar10
    ldae sweep depth runs/l_dae --block 6 --block 12 --block 18 --figure depth.svg
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.sweeps import run_depth_sweep

    _show(run_depth_sweep, options)


@app.command("timesteps")
def timesteps(
    source: Source,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    timesteps: Annotated[
        list[int] | None,
        typer.Option("--timestep", help="May be repeated; default 0, 10, 20, 40, 80 of 1000 levels, or such shares."),
    ] = None,
    noises: Annotated[
        list[str] | None, typer.Option("--noise", help="clean or frozen; may be repeated; default both.")
    ] = None,
    learning_rates: LearningRates = None,
    epochs: Epochs = 90,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
    figure: Figure = None,
):
    """At which timestep are features best, of clean and of noisy input?

    Each image has one noise for all epochs, so that features can be cached; fresh noise belongs to ldae full-probe.

    \b
    ldae sweep timesteps runs/cifar10/encoder --dataset cifar10 --figure timesteps.svg
    """
    options = dict(locals())
    from ldae_hf.evaluation.sweeps import run_timestep_sweep

    if not noises:
        options.pop("noises")
    _show(run_timestep_sweep, options)


@app.command("layers")
def layers(
    encoder: Encoder,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    layers: Annotated[
        list[int] | None, typer.Option("--layer", help="Number of a block; may be repeated; default all.")
    ] = None,
    pools: Annotated[
        list[str] | None,
        typer.Option("--pool", help="mean, raw_mean, class or class_mean; may be repeated; default all there are."),
    ] = None,
    learning_rates: LearningRates = None,
    epochs: Epochs = 90,
    processor: Processor = None,
    timestep: Timestep = None,
    noise: Noise = "clean",
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
    figure: Figure = None,
):
    """Which layer and which pool of an encoder, of any library, are best?

    \b
    ldae sweep layers runs/cifar10/encoder --dataset cifar10
    ldae sweep layers timm:vit_small_patch16_224 --dataset imagenette --layer 6 --layer 12 --pool mean --pool class
    """
    options = dict(locals())
    from ldae_hf.evaluation.sweeps import run_layer_sweep

    options["source"] = options.pop("encoder")
    _show(run_layer_sweep, options)


def _show(run, options: dict) -> None:
    from ldae_hf.evaluation.sweep_text import sweep_table

    figure = options.pop("figure")
    options = {name: value for name, value in options.items() if value is not None}
    row = run(**options)
    typer.echo(sweep_table(row))
    if figure is not None:
        from ldae_hf.evaluation.sweep_figure import sweep_figure

        typer.echo(f"\nfigure: {sweep_figure(row, figure)}")
