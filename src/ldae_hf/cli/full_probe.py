"""`ldae full-probe`."""

from typing import Annotated

import typer

from .evaluation_options import (
    Dataset,
    Dtype,
    Encoder,
    Ledger,
    NumWorkers,
    Output,
    Processor,
    Seed,
    TestSplit,
    Timestep,
    TrainSplit,
    evaluation_options,
)
from .options import (
    CheckpointEvery,
    ImageColumn,
    KeepCheckpoints,
    LabelColumn,
    MaxMinutes,
    MaxSteps,
    PerDeviceBatchSize,
    RunFolder,
)


def full_probe(
    encoder: Encoder,
    output_dir: RunFolder,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    optimizer: Annotated[str, typer.Option(help="lars, or adamw; the paper does not say which it was.")] = "lars",
    learning_rates: Annotated[
        list[float] | None,
        typer.Option(
            "--learning-rate",
            help="Peak; default 0.1 (lars) or 1e-4 (adamw) x batch / 256. If repeated, the first is the result, and "
            "the others stand beside it.",
        ),
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 90,
    warmup_epochs: Annotated[
        float | None, typer.Option(help="Of linear warm-up; default a ninth of the epochs: 10 of 90.")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Images of a step; default 16,384, or of a smaller data set all but a rest of under 256."),
    ] = None,
    layer: Annotated[str, typer.Option(help="Take the features after this block: 1, 2, ... or last.")] = "last",
    pool: Annotated[str, typer.Option(help="mean over tokens, class, class_mean, or raw_mean.")] = "mean",
    timestep: Timestep = None,
    noise: Annotated[
        str,
        typer.Option(help="clean; fresh: noise on the training images, new in every epoch; frozen: one per image."),
    ] = "clean",
    floor: Annotated[
        str | None,
        typer.Option(help="Probe this floor of the encoder in its place: pixels, latents, untrained, random_patches."),
    ] = None,
    processor: Processor = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    per_device_batch_size: PerDeviceBatchSize = None,
    num_workers: NumWorkers = 2,
    decoded_gigabytes: Annotated[
        float, typer.Option(help="Memory for decoded training images, in each process; 0 decodes them in every epoch.")
    ] = 1.0,
    checkpoint_every: CheckpointEvery = None,
    keep_checkpoints: KeepCheckpoints = 2,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    output: Output = None,
    ledger: Ledger = None,
):
    """The paper's linear probe: augmented images, batches of 16,384, 90 epochs; the same command again resumes.

    Average-pooled tokens -> BatchNorm without affine -> linear. All images go through the frozen encoder in every
    epoch; in `ldae probe`, which is quick, they do so once.

    \b
    ldae full-probe runs/cifar10/encoder --output-dir runs/full-probe
    ldae full-probe you/your-encoder --dataset path/to/images --noise fresh --output-dir runs/noisy
    accelerate launch -m ldae_hf.cli full-probe runs/large/encoder --output-dir runs/large-probe    (several GPUs)
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.full_probe import run_full_probe
    from ldae_hf.evaluation.ledger import result_table

    options["layer"] = evaluation_options({"layers": [layer]})["layers"][0]
    row = run_full_probe(**options)
    if row is not None:
        typer.echo(result_table(row))
