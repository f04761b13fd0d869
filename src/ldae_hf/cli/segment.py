"""`ldae segment`."""

from typing import Annotated

import typer

from .evaluation_options import (
    BatchSize,
    Dtype,
    Encoders,
    ImageSize,
    Ledger,
    Noise,
    NumWorkers,
    Output,
    Processor,
    Seed,
    TestSplit,
    Timestep,
    TrainSplit,
    evaluation_options,
)
from .options import ImageColumn


def segment(
    encoders: Encoders,
    dataset: Annotated[
        str, typer.Option(help="A segmentation set: a Hub name, or a folder, as given, else inside $LDAE_DATA.")
    ],
    train_split: TrainSplit = "train",
    test_split: TestSplit = "test",
    config: Annotated[str | None, typer.Option(help="Configuration of the data set, where it has several.")] = None,
    image_column: ImageColumn = None,
    mask_column: Annotated[str | None, typer.Option(help="The column of masks; detected if not given.")] = None,
    ignore_index: Annotated[int, typer.Option(help="Number in the masks of pixels that do not count.")] = 255,
    reduce_labels: Annotated[
        bool, typer.Option("--reduce-labels", help="0 does not count either, and 1 is the first class (ADE20K).")
    ] = False,
    processor: Processor = None,
    layer: Annotated[str, typer.Option(help="Take the tokens after this block: 1, 2, ... or last.")] = "last",
    timestep: Timestep = None,
    noise: Noise = "clean",
    image_size: ImageSize = None,
    learning_rates: Annotated[
        list[float] | None, typer.Option("--learning-rate", help="The best on held-out images counts; may be repeated.")
    ] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the tokens.")] = 30,
    floors: Annotated[
        list[str] | None,
        typer.Option("--floor", help="pixels, latents, untrained, majority, or none; may be repeated; default all."),
    ] = None,
    dtype: Dtype = "float32",
    seed: Seed = 0,
    batch_size: BatchSize = 64,
    num_workers: NumWorkers = 2,
    memory: Annotated[
        float, typer.Option(help="GB of tokens to hold in memory; more goes to a temporary file ($TMPDIR).")
    ] = 4.0,
    output: Output = None,
    ledger: Ledger = None,
):
    """Linear segmentation probe on the frozen patch tokens of encoders, beside floors.

    A linear classifier for every patch, whose scores are resized to the label map (DINOv2's "linear" protocol, on fixed
    centre crops). The floors: the patch's pixels, its latents, the encoder untrained, and the most frequent class.
    A mask is a picture of class numbers (one channel or a palette) or an array. Of an image with an EXIF orientation it
    may belong to what is stored or to what is shown: its size tells, or an orientation of its own; where neither does,
    as in a square or after half a turn, the row is left out.

    \b
    ldae segment runs/desk/encoder --dataset OWNER/voc --test-split validation
    ldae segment runs/desk/encoder --dataset OWNER/ade20k --test-split validation --reduce-labels
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.evaluation.dense import run_segmentation
    from ldae_hf.evaluation.ledger import result_table

    layers = evaluation_options({"layers": [options.pop("layer")]})["layers"]
    options = evaluation_options(options) | {"layer": layers[0]}
    if not learning_rates:
        options.pop("learning_rates")
    columns = {"mean_iou": "mean IoU", "pixel_accuracy": "pixels"}
    typer.echo(result_table(run_segmentation(**options), columns))
