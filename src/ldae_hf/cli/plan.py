"""`ldae plan`."""

from typing import Annotated

import typer

from ldae_hf.recipes import load_recipe

from .options import MixedPrecision, Overrides, PerDeviceBatchSize, RecipeName, Tier, TrainingData


def plan(
    recipe: RecipeName,
    tier: Tier = None,
    overrides: Overrides = None,
    gpus: Annotated[int, typer.Option(help="Devices in all.")] = 1,
    nodes: Annotated[int, typer.Option(help="Machines that they are in.")] = 1,
    device: Annotated[
        str | None, typer.Option(help="For example h100, a100-40gb or l40s; default this machine's, else h100.")
    ] = None,
    dataset: TrainingData = None,
    num_images: Annotated[int | None, typer.Option(help="Of an epoch, if nobody can count them here.")] = None,
    per_device_batch_size: PerDeviceBatchSize = None,
    mixed_precision: MixedPrecision = "bf16",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations, for memory.")] = False,
    workers: Annotated[int, typer.Option(help="Processes that decode images, of each device.")] = 2,
    mfu: Annotated[float | None, typer.Option(help="Share of the device's peak that is reached; default 0.4.")] = None,
    bandwidth: Annotated[
        float | None, typer.Option(help="GB/s that a device sends to others; default 80% of its link or network.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Measure on this machine, instead of an MFU.")] = False,
    dry_run_seconds: Annotated[float, typer.Option(help="Of a dry run.")] = 60,
):
    """Say what a training needs: parameters, FLOPs, memory, steps, days, and what limits it. Downloads nothing.

    \b
    ldae plan size_l_epochs_1600 --gpus 8 --device h100
    ldae plan l_dae --gpus 16 --nodes 2 --device a100 --gradient-checkpointing
    ldae plan l_dae --tier cpu --dry-run
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training.planning import make_plan

    options["recipe"] = load_recipe(options["recipe"], options.pop("tier"), options.pop("overrides") or ())
    typer.echo("\n".join(make_plan(**options).lines()))
