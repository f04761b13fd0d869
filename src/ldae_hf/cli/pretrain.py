"""`ldae pretrain`."""

from pathlib import Path
from typing import Annotated

import typer

from ldae_hf.recipes import load_recipe

from .options import (
    CheckpointEvery,
    ImageColumn,
    KeepCheckpoints,
    LabelColumn,
    LogEvery,
    MaxMinutes,
    MaxSteps,
    MixedPrecision,
    NumWorkers,
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


def pretrain(
    output_dir: RunFolder,
    recipe: RecipeName = "l_dae",
    tier: Tier = None,
    overrides: Overrides = None,
    dataset: TrainingData = None,
    streaming: Annotated[bool, typer.Option(help="Read the data set from the Hub while training.")] = False,
    num_images: Annotated[int | None, typer.Option(help="Of an epoch, for a stream that does not say it.")] = None,
    image_column: ImageColumn = None,
    label_column: LabelColumn = None,
    processor: Processor = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="A folder of `ldae tokenizer train`, instead of training one first.")
    ] = None,
    start_from: Annotated[
        str | None,
        typer.Option(help="Begin with another training's weights: a run, a checkpoint, or a repository on the Hub."),
    ] = None,
    perceptual_weights: PerceptualWeights = None,
    cache_latents: Annotated[
        bool, typer.Option(help="Encode every image once; for latent targets and centre crops.")
    ] = False,
    quarantine: Quarantine = None,
    seed: Annotated[int, typer.Option(help="Of initialisation, order, crops, timesteps and noise.")] = 0,
    per_device_batch_size: PerDeviceBatchSize = None,
    num_workers: NumWorkers = 2,
    mixed_precision: MixedPrecision = "bf16",
    deterministic: Annotated[bool, typer.Option(help="The same bits in every run on one kind of GPU.")] = False,
    attn_implementation: Annotated[
        str | None, typer.Option(help="sdpa, eager or flash_attention_2; by default what suits the device.")
    ] = None,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations, for memory.")] = False,
    compile: Annotated[bool, typer.Option(help="torch.compile the model.")] = False,
    checkpoint_every: CheckpointEvery = None,
    keep_checkpoints: KeepCheckpoints = 2,
    log_every: LogEvery = 20,
    probe_every: Annotated[
        int | None,
        typer.Option(help="Steps between online probes, on up to 10,000 images of each split; default none."),
    ] = None,
    watched: Annotated[int, typer.Option(help="Images to paint as the model restores them; 0 for none.")] = 8,
    report_to: ReportTo = None,
    max_steps: MaxSteps = None,
    max_minutes: MaxMinutes = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            "--push-to-hub",
            "--push_to_hub",
            metavar="OWNER/NAME",
            help="Push the run to this repository after each checkpoint, behind the training's back.",
        ),
    ] = None,
    hub_private: Annotated[bool, typer.Option(help="A repository that is made for it is private.")] = False,
    hub_pictures: Annotated[
        bool,
        typer.Option(
            "--pictures/--no-pictures", help="Push the run's newest picture too, which shows training images."
        ),
    ] = True,
):
    """Pre-train l-DAE; running the same command again resumes.

    \b
    ldae pretrain l_dae --tier cifar10 --output-dir runs/cifar10
    ldae pretrain random_crop --dataset path/to/images --output-dir runs/mine
    accelerate launch examples/pretrain.py size_l --output-dir runs/large    (several GPUs)
    ldae pretrain l_dae --tier cifar10 --start-from you/your-encoder --push-to-hub you/another --output-dir runs/on
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training import pretrain

    options |= {"overrides": overrides or (), "report_to": report_to or ()}
    if options.pop("probe_every"):
        from ldae_hf.evaluation.online import online_evaluation
        from ldae_hf.training import load_images

        data = load_recipe(recipe, tier, overrides or ()).data
        columns = dict(image_column=image_column, label_column=label_column)
        images = [
            load_images(dataset or data["dataset"], f"{data[split]}[:10000]", **columns)
            for split in ("train_split", "test_split")
        ]
        options |= {"evaluations": [online_evaluation(*images, num_workers=num_workers)], "evaluate_every": probe_every}
    pretrain(**options)
