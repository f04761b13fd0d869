"""`ldae retrieve`."""

from pathlib import Path
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
    Ledger,
    Noise,
    NumWorkers,
    Output,
    Processor,
    Seed,
    Timestep,
    evaluation_options,
)
from .options import ImageColumn, LabelColumn, can_be_written


def retrieve(
    encoders: Encoders,
    dataset: Dataset = None,
    train_split: Annotated[str | None, typer.Option(help="Split of the database; slices work.")] = None,
    test_split: Annotated[
        str | None, typer.Option(help="Split of the queries; that of the database finds each image among the others.")
    ] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    processor: Processor = None,
    ranks: Annotated[list[int] | None, typer.Option("--rank", help="k of recall@k; may be repeated; 1, 5, 10.")] = None,
    layers: Annotated[
        str, typer.Option("--layer", help="Take the features after this block: 1, 2, ... last.")
    ] = "last",
    pools: Annotated[str, typer.Option("--pool", help="mean, class, class_mean or raw_mean.")] = "mean",
    timestep: Timestep = None,
    noise: Noise = "clean",
    image_size: ImageSize = None,
    crop_share: CropShare = 1.0,
    floors: Floors = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 256,
    num_workers: NumWorkers = 2,
    output: Output = None,
    ledger: Ledger = None,
    picture: Annotated[
        Path | None, typer.Option(help="Paint queries and their nearest images to this file.", callback=can_be_written)
    ] = None,
):
    """Nearest-neighbour retrieval with encoders, beside their floors: exact, by cosine.

    The test images are queries, the training images the database; images of the query's class are what is looked for.
    Shown are the mean average precision (mAP) of the whole ranking and recall@k, the share of queries with such an
    image among the k nearest.

    \b
    ldae retrieve runs/cifar10/encoder --dataset cifar10 --picture found.png
    ldae retrieve runs/cifar10/encoder --dataset cifar10 --train-split test --test-split test
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.ledger import result_table
    from ldae_hf.evaluation.retrieval import RANKS, run_retrieval
    from ldae_hf.evaluation.sample_pictures import check_picture_file

    if picture is not None:
        check_picture_file(picture)
    options["ranks"] = ranks = tuple(ranks or RANKS)
    options = evaluation_options(options | {"layers": [layers], "pools": [pools]})
    columns = {"mean_average_precision": "mAP"} | {f"recall_at_{k}": f"recall@{k}" for k in ranks}
    columns |= {f"precision_at_{k}": f"precision@{k}" for k in ranks if k > 1}
    typer.echo(result_table(run_retrieval(**options), columns))
