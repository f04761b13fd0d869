"""`ldae finetune`."""

from typing import Annotated

import typer

from .evaluation_options import Encoder
from .options import (
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
    PerDeviceBatchSize,
    ReportTo,
    RunFolder,
)


def parse_scale(text: str) -> tuple[float, float]:
    """The two numbers of "0.08,1"."""
    try:
        smallest, largest = map(float, text.split(","))
    except ValueError:
        raise typer.BadParameter(f"{text!r} must be two numbers with a comma between, like 0.08,1.") from None
    return smallest, largest


def finetune(
    encoder: Encoder,
    output_dir: RunFolder,
    dataset: Annotated[
        str | None,
        typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA; default the encoder's recipe's."),
    ] = None,
    train_split: Annotated[
        str | None, typer.Option(help="Split to learn from; slices such as train[:5000] work.")
    ] = None,
    test_split: Annotated[str | None, typer.Option(help="Split to test on.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="The floor: the same network from new weights.")
    ] = False,
    keep_projection: Annotated[
        bool, typer.Option("--keep-projection", help="Ablation: l-DAE's input stays in the subspace of its latents.")
    ] = False,
    timestep: Annotated[int | None, typer.Option(help="Timestep at which l-DAE is folded; default its own.")] = None,
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    global_batch_size: Annotated[
        int, typer.Option("--global-batch-size", "--batch-size", help="Images of a step.")
    ] = 1024,
    learning_rate: Annotated[float, typer.Option(help="The peak, of the head.")] = 4e-3,
    warmup_epochs: Annotated[float, typer.Option(help="Of linear warm-up, before half a cosine.")] = 5.0,
    min_learning_rate: Annotated[float, typer.Option(help="Where the cosine ends.")] = 1e-6,
    weight_decay: Annotated[float, typer.Option(help="Of matrices.")] = 0.05,
    layer_decay: Annotated[
        float | None, typer.Option(help="Learning rate of a layer by that of the next; default 0.85, 0.65 for L.")
    ] = None,
    drop_path: Annotated[float, typer.Option(help="Rate of the last block, rising from 0.")] = 0.1,
    mixup: Annotated[float, typer.Option(help="Of its Beta distribution; 0 for none.")] = 0.8,
    cutmix: Annotated[float, typer.Option(help="Of its Beta distribution; 0 for none.")] = 1.0,
    cutmix_share: Annotated[float, typer.Option(help="Of the steps, where there is MixUp, too.")] = 0.5,
    label_smoothing: Annotated[float, typer.Option(help="Share of a target that is spread over all classes.")] = 0.1,
    rand_augment: Annotated[float, typer.Option(help="RandAugment's magnitude, of 10; 0 for none.")] = 9.0,
    random_erasing: Annotated[float, typer.Option(help="Share of the images; 0 for none.")] = 0.25,
    crop_scale: Annotated[
        tuple, typer.Option(parser=parse_scale, metavar="A,B", help="Share of the area that a random crop keeps.")
    ] = "0.08,1",
    no_flip: Annotated[bool, typer.Option("--no-flip", help="Mirror no images.")] = False,
    ema_decay: Annotated[
        float, typer.Option(help="Per step, of the average of the weights that is measured; 0 for none.")
    ] = 0.9999,
    seed: Annotated[int, typer.Option(help="Of head, order, crops, augmentation, mixing and dropped paths.")] = 0,
    per_device_batch_size: PerDeviceBatchSize = None,
    num_workers: NumWorkers = 2,
    decoded_gigabytes: Annotated[float, typer.Option(help="Memory for decoded images, in each process.")] = 1.0,
    mixed_precision: MixedPrecision = "bf16",
    checkpoint_every: CheckpointEvery = None,
    evaluate_every: Annotated[int | None, typer.Option(help="Steps between tests; default one epoch.")] = None,
    keep_checkpoints: KeepCheckpoints = 2,
    log_every: LogEvery = 20,
    report_to: ReportTo = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    output: Output = None,
    ledger: Ledger = None,
):
    """Fine-tune all weights of an encoder for a data set's classes; running the same command again resumes.

    The defaults are the paper's for ImageNet (appendix B), or MAE's where it is silent. An l-DAE starts as the same
    function of an image, folded into a plain ViT, and then learns from all values of a patch. The result is that of the
    last epoch, with the average of the weights; the folder model/ that is left behind loads with transformers alone.

    Small data sets want shorter runs, smaller batches and an average that moves:

    \b
    ldae finetune runs/cifar10/encoder --dataset cifar10 --output-dir runs/finetuned --epochs 10 --warmup-epochs 1 \\
        --batch-size 128 --learning-rate 1e-3 --ema-decay 0.999
    ldae finetune runs/cifar10/encoder --dataset cifar10 --output-dir runs/scratch --from-scratch --layer-decay 1 …

    \b
    accelerate launch -m ldae_hf.cli finetune …    (several GPUs)
    """
    options = dict(locals())  # each option is the argument of the same name
    from dataclasses import fields

    from ldae_hf.evaluation.finetuning import FineTuningRecipe, finetune

    options |= {"flip": not options.pop("no_flip"), "report_to": report_to or ()}
    recipe = FineTuningRecipe(**{field.name: options.pop(field.name) for field in fields(FineTuningRecipe)})
    row = finetune(recipe=recipe, **options)
    if row is not None:
        typer.echo(f"{row['name']}: top-1 {row['top1']:.2f} % of {row['protocol']['test']['images']} test images")
