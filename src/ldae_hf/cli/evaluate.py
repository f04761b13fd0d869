"""`ldae probe`, `ldae knn`, `ldae few-shot`, `ldae attentive-probe`: frozen encoders, beside their floors."""

from typing import Annotated

import typer

from .evaluation_options import (
    BatchSize,
    CropShare,
    Dataset,
    Dtype,
    Encoders,
    Floors,
    ImageSize,
    Layers,
    Ledger,
    Noise,
    NumWorkers,
    Output,
    Pools,
    Processor,
    Seed,
    TestSplit,
    Timestep,
    TrainSplit,
    evaluation_options,
)
from .options import ImageColumn, LabelColumn


LearningRates = Annotated[
    list[float] | None,
    typer.Option("--learning-rate", help="One of those that are tried; may be repeated; default a few that span all."),
]
HeldOut = Annotated[float, typer.Option(help="Share of the training images that the selection is made on.")]
ProbeBatchSize = Annotated[int, typer.Option(help="Samples of a step of the probe.")]
Layer = Annotated[str, typer.Option(help="Features after this block: 1, 2, ... or last.")]
Pool = Annotated[str, typer.Option(help="mean over tokens, class token, class_mean (both), or raw_mean.")]


def probe(
    encoders: Encoders,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    layers: Layers = None,
    pools: Pools = None,
    batch_norm: Annotated[
        list[str] | None,
        typer.Option(help="with (the default): features standardised by the training set; without; may be repeated."),
    ] = None,
    learning_rates: LearningRates = None,
    epochs: Annotated[int, typer.Option(help="Passes over the cached features.")] = 90,
    probe_batch_size: ProbeBatchSize = 512,
    held_out: HeldOut = 0.1,
    processor: Processor = None,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    crop_share: CropShare = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Fast linear probe of encoders on cached features, beside their floors.

    Every layer, every pool, features with and without BatchNorm and every learning rate are tried in one call. What is
    best on held-out training images is tested: that is top-1. "Best on test" is what looking at the test set would
    give. The floors need no training: raw pixels, the tokenizer's latents, the same encoder untrained, and random
    whitened patches of the same dimension. For the paper's own protocol, on augmented images, see ldae full-probe.

    \b
    ldae probe runs/cifar10/encoder --dataset cifar10
    ldae probe runs/l_dae/encoder runs/mae/encoder --layer 9 --layer last --batch-norm with --batch-norm without
    ldae probe timm:vit_small_patch16_224.dino --dataset imagenette --pool class
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.tasks import BATCH_NORMS, run_linear_probe

    if unknown := [choice for choice in batch_norm or () if choice not in BATCH_NORMS]:
        raise ValueError(f"--batch-norm {unknown[0]} is neither with nor without.")
    options["batch_norm"] = [BATCH_NORMS[choice] for choice in batch_norm or ["with"]]
    rows = run_linear_probe(**_given(options))
    typer.echo(result_table(rows))
    for row in rows:
        norm = "with" if row["batch_norm"] else "without"
        typer.echo(f"{row['name']}: {row['features']}, {norm} BatchNorm, learning rate {row['learning_rate']:g}")


def knn(
    encoders: Encoders,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    layer: Layer = "last",
    pool: Pool = "mean",
    k: Annotated[list[int] | None, typer.Option(help="Neighbours that vote; may be repeated; default 20.")] = None,
    temperature: Annotated[float, typer.Option(help="Of their weights, exp(cosine / temperature).")] = 0.07,
    variants: Annotated[
        list[str] | None,
        typer.Option(
            "--variant", help="pooled, standardised or whitened features; may be repeated; default all three."
        ),
    ] = None,
    processor: Processor = None,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    crop_share: CropShare = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Exact k-nearest-neighbour accuracy of encoders, beside their floors. Nothing is trained.

    By cosine of the features as they are pooled, of features standardised, and of features whitened by the training
    set, which no longer hides directions of small variance. The result of a row is that of the first variant and k.

    \b
    ldae knn runs/cifar10/encoder --dataset cifar10
    ldae knn runs/l_dae/encoder runs/mae/encoder --k 20 --k 200
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.tasks import run_knn

    def spread(entry: dict) -> dict:
        return entry | {f"{one['variant']}, k={one['k']}": one["top1"] for one in entry["variants"]}

    rows = [
        spread(row) | {"floors": {name: spread(floor) for name, floor in row["floors"].items()}}
        for row in run_knn(**_given(options))
    ]
    columns = [f"{one['variant']}, k={one['k']}" for one in rows[0]["variants"]]
    typer.echo(result_table(rows, dict(zip(columns, columns, strict=True))))


def few_shot(
    encoders: Encoders,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    layer: Layer = "last",
    pool: Pool = "mean",
    fractions: Annotated[
        list[float] | None,
        typer.Option("--fraction", help="Share of the training labels; may be repeated; default 0.01 and 0.1."),
    ] = None,
    draws: Annotated[int, typer.Option(help="Random sets of labelled images, over which accuracies are averaged.")] = 3,
    processor: Processor = None,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Floors = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    crop_share: CropShare = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
):
    """Accuracy of encoders with few labels, 1 % and 10 % of them, beside their floors.

    As many images of each class are drawn; logistic regression learns from them alone, its penalty selected by
    cross-validation among them. The result says the standard deviation over draws too.

    \b
    ldae few-shot runs/cifar10/encoder --dataset cifar10
    ldae few-shot runs/l_dae/encoder runs/mae/encoder --fraction 0.001 --draws 5
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.few_shot import percent_key
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.tasks import run_few_shot

    rows = run_few_shot(**_given(options))
    columns = {percent_key(one["fraction"]): f"{100 * one['fraction']:g} % of labels" for one in rows[0]["fractions"]}
    typer.echo(result_table(rows, columns))


def attentive_probe(
    encoders: Encoders,
    dataset: Dataset = None,
    train_split: TrainSplit = None,
    test_split: TestSplit = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    layer: Layer = "last",
    learning_rates: LearningRates = None,
    num_heads: Annotated[int, typer.Option(help="Learned queries, each with its own attention.")] = 8,
    epochs: Annotated[int, typer.Option(help="Passes over the cached tokens.")] = 20,
    probe_batch_size: ProbeBatchSize = 256,
    held_out: HeldOut = 0.1,
    processor: Processor = None,
    timestep: Timestep = None,
    noise: Noise = "clean",
    floors: Annotated[
        list[str] | None,
        typer.Option("--floor", help="One of pixels, latents, untrained, or none; may be repeated; default all."),
    ] = None,
    dtype: Dtype = "float32",
    image_size: ImageSize = None,
    crop_share: CropShare = 1.0,
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    memory: Annotated[float, typer.Option(help="GB of tokens that are kept in memory; more go to a file.")] = 4.0,
    output: Output = None,
    ledger: Ledger = None,
):
    """Attentive probe of encoders: learned queries pool the frozen tokens of the patches, then a linear layer.

    It finds what the mean over tokens hides. Tokens take 2 bytes x images x tokens x width: for 50,000 images of 64
    tokens of width 192 that is 1.2 GB.

    \b
    ldae attentive-probe runs/cifar10/encoder --dataset cifar10
    ldae attentive-probe runs/l_dae/encoder runs/mae/encoder --floor none
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.attentive_run import run_attentive_probe
    from ldae_hf.evaluation.ledger import result_table

    options = _given(options)
    [layer] = options.pop("layers")
    typer.echo(result_table(run_attentive_probe(layer=layer, **options)))


def _given(options: dict) -> dict:
    """The options as arguments of the function behind: a list that was not given is left to its default, and one layer
    or pool is a list of one."""
    options = {name: value for name, value in options.items() if value is not None}
    for name in ("layer", "pool"):
        if name in options:
            options[f"{name}s"] = [options.pop(name)]
    return evaluation_options(options)
