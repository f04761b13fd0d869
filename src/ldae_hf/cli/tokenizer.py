"""`ldae tokenizer …`: learned tokenizers."""

from pathlib import Path
from typing import Annotated

import typer

from .options import (
    PLAIN,
    CheckpointEvery,
    ImageColumn,
    KeepCheckpoints,
    LabelColumn,
    Ledger,
    LogEvery,
    MaxMinutes,
    MaxSteps,
    MixedPrecision,
    NumWorkers,
    Output,
    Overrides,
    PerceptualWeights,
    PerDeviceBatchSize,
    Processor,
    Quarantine,
    RecipeName,
    ReportTo,
    RunFolder,
    Tier,
    TrainingData,
)


app = typer.Typer(**PLAIN)


@app.callback()
def tokenizer():
    """Learned tokenizers: train one, measure what it keeps of an image, look at its filters.

    `ldae pretrain` trains the tokenizer of its recipe first, if it has one to learn; training it apart lets several
    recipes share it (ldae pretrain … --tokenizer FOLDER).
    """


@app.command("train")
def train(
    output_dir: RunFolder,
    recipe: RecipeName = "patch_ae",
    tier: Tier = None,
    overrides: Overrides = None,
    dataset: TrainingData = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    processor: Processor = None,
    perceptual_weights: PerceptualWeights = None,
    quarantine: Quarantine = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, order, crops and noise.")] = 0,
    per_device_batch_size: PerDeviceBatchSize = None,
    num_workers: NumWorkers = 2,
    mixed_precision: MixedPrecision = "bf16",
    checkpoint_every: CheckpointEvery = None,
    keep_checkpoints: KeepCheckpoints = 2,
    log_every: LogEvery = 20,
    report_to: ReportTo = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
):
    """Train the learned tokenizer of a recipe; running the same command again resumes.

    \b
    ldae tokenizer train patch_vae --tier cpu --output-dir runs/patch-vae
    ldae tokenizer train replace_noise_schedule --tier cpu --output-dir runs/conv-vae
    ldae pretrain patch_vae --tier cpu --tokenizer runs/patch-vae --output-dir runs/mine
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training import train_tokenizer

    train_tokenizer(**options | {"overrides": overrides or (), "report_to": report_to or ()})


@app.command("evaluate")
def evaluate(
    tokenizer: Annotated[Path, typer.Argument(help="A folder that `ldae tokenizer train` wrote.")],
    dataset: Annotated[str, typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA.")],
    train_split: Annotated[str, typer.Option(help="Split that the probe learns from.")] = "train",
    test_split: Annotated[str, typer.Option(help="Split to test on.")] = "test",
    probe: Annotated[bool, typer.Option(help="Fit a linear probe on the latents too.")] = False,
    seed: Annotated[int, typer.Option(help="Of the probe.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Images of one pass.")] = 64,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Reconstruction error of a tokenizer, beside PCA at the same K.

    \b
    ldae tokenizer evaluate runs/patch-vae --dataset cifar10 --probe
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.reconstruction import reconstruction_table, run_reconstruction

    typer.echo(reconstruction_table(run_reconstruction(**options)))


@app.command("table")
def table(
    ledger: Annotated[Path, typer.Option(help="JSON lines that `evaluate --ledger` wrote.")] = Path(
        "benchmarks/results/ledger.jsonl"
    ),
):
    """Print the reconstruction errors in a ledger as a markdown table.

    \b
    ldae tokenizer table --ledger benchmarks/results/ledger.jsonl
    """
    from ldae_hf.evaluation.reconstruction import reconstruction_markdown

    typer.echo(reconstruction_markdown(ledger))


@app.command("filters")
def filters(
    tokenizers: Annotated[list[Path], typer.Argument(help="Folders of patch-wise tokenizers.")],
    output: Annotated[Path, typer.Option(help="The picture, .png or .svg.")] = Path("filters.png"),
    count: Annotated[int, typer.Option(help="Filters of each.")] = 8,
):
    """Paint the first filters of patch-wise tokenizers below those of their PCA (Figure 4).

    \b
    ldae tokenizer filters runs/patch-ae runs/patch-vae --output filters.png
    """
    from ldae_hf.evaluation.figures import filters_figure, save_figure

    typer.echo(save_figure(filters_figure(tokenizers, count), output))
