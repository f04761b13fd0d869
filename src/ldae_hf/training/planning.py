"""What a run will need and how long it will take, before it is started."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..recipes import Recipe
from .costs import (
    count_parameters,
    forward_flops_per_image,
    tokenizer_flops_per_image,
    training_flops_per_image,
)
from .data import ImageSource, load_images
from .dry_run import Measured, measure_loading, measure_training
from .hardware import DEVICES, Device, known_device, named_device
from .memory import LAYOUTS, Layout, checkpoint_bytes, device_memory
from .optimization import Plan
from .run_plan import Known, RunPlan


# Images of the training split, and of ImageNet what one worker reads in a second, on one core of a server.
KNOWN_IMAGES = {
    "ILSVRC/imagenet-1k": 1_281_167,
    "timm/imagenet-1k-wds": 1_281_167,
    "imagenette128": 9_469,
    "cifar10": 50_000,
}
WORKER_RATES = {"ILSVRC/imagenet-1k": 200, "timm/imagenet-1k-wds": 200}
MFU = 0.40  # the best that public trainings of ViT-L show
LINK_SHARE = 0.8  # of a link's nominal speed that an all-reduce reaches
NETWORK = 50  # GB/s of each device between machines: 400 Gbit/s


def find_images(recipe: Recipe, dataset: str | None, num_images: int | None) -> tuple[Known, ImageSource | None]:
    """How many images an epoch has, and the images themselves if they are on this machine. Nothing is downloaded.

    Args:
        dataset: images instead of the recipe's, a folder or a name. num_images: what is said instead of counting.

    Raises:
        ValueError: nobody knows how many there are.
    """
    name = recipe.data["dataset"] if dataset is None else dataset
    folders = [Path(), Path(os.environ.get("LDAE_DATA", ""))]
    is_local = any((folder / Path(name).expanduser()).exists() for folder in folders)
    source = load_images(name, recipe.data["train_split"]) if is_local else None
    if num_images is not None:
        return Known(num_images, "given"), source
    if source is not None:
        return Known(len(source), f"counted in {name}"), source
    if name in KNOWN_IMAGES:
        return Known(KNOWN_IMAGES[name], f"known of {name}"), None
    raise ValueError(f"{name} is not on this machine, so nobody knows how many images it has; give --num-images.")


def plan_run(
    recipe: Recipe,
    num_images: Known,
    *,
    device: Device | None,
    gpus: int = 1,
    nodes: int = 1,
    per_device_batch_size: int | None = None,
    mixed_precision: str = "bf16",
    gradient_checkpointing: bool = False,
    workers: int = 2,
    mfu: float | None = None,
    measured: Measured | None = None,
    bandwidth: float | None = None,
    dataset: str | None = None,
) -> RunPlan:
    """Plans the training of a recipe.

    Args:
        device: of which there are `gpus` in all, in `nodes` machines; None for one that is not in the table, which has
            to be `measured`. workers: of each device.
        mfu: share of the device's peak that its matrix products reach, counting those that are computed again.
        measured: what a dry run on such a device found. bandwidth: GB/s that a device sends to others.
        dataset: images instead of the recipe's.

    Raises:
        ValueError: a number is out of range, the device has no peak for this precision, or from `Plan.derive`.
    """
    if gpus < 1 or nodes < 1 or gpus % nodes:
        raise ValueError(f"{gpus} GPUs do not spread evenly over {nodes} machines; --gpus counts all of them.")
    if mixed_precision not in ("bf16", "no"):
        raise ValueError(f"--mixed-precision is {mixed_precision!r}, but must be 'bf16' or 'no'.")
    for name, value in {"workers": workers, "mfu": mfu, "bandwidth": bandwidth}.items():
        if value is not None and value <= 0:
            raise ValueError(f"--{name} is {value}, but must be above 0.")
    config, layout = recipe.model_config(), Layout(False, gradient_checkpointing)
    plan = Plan.derive(recipe, int(num_images.value), gpus, per_device_batch_size)
    parameters, ema = count_parameters(config), plan.ema_decay is not None
    forward, training = forward_flops_per_image(config), training_flops_per_image(config)
    tokenizer = tokenizer_flops_per_image(config, recipe.tokenizer)
    on_cpu = measured is not None and measured.peak_memory is None

    def memory(layout: Layout, batch_size: int) -> dict[str, float]:
        where = dict(mixed_precision=mixed_precision, device_type="cpu" if on_cpu else "cuda")
        return device_memory(config, parameters, layout, batch_size=batch_size, processes=gpus, ema=ema, **where)

    batch, share = plan.per_device_batch_size, plan.per_device_batch_size * plan.accumulation
    layouts = {each: memory(each, batch) for each in LAYOUTS if gpus > 1 or not each.sharded}
    room, remedies = None, {}
    if device is not None:
        room = Known(device.memory * 2**30, f"the table's, {device.name}")
        smaller = [(size, sum(memory(layout, size).values())) for size in range(batch - 1, 0, -1) if share % size == 0]
        largest = [(f"--per-device-batch-size {size}", needed) for size, needed in smaller if needed <= room.value][:1]
        others = [(each.options, sum(parts.values())) for each, parts in layouts.items() if each != layout]
        remedies = dict(largest + [(way, needed) for way, needed in others if needed <= room.value])
    flops = training + tokenizer + (forward if gradient_checkpointing else 0)
    return RunPlan(
        recipe=recipe,
        plan=plan,
        num_images=num_images,
        machine=f"{gpus} x {measured.device if device is None else device.name}, {mixed_precision}"
        + (f", in {nodes} machines" if nodes > 1 else ""),
        parameters=parameters,
        forward_flops=forward,
        training_flops=training,
        tokenizer_flops=tokenizer,
        memory=layouts,
        layout=layout,
        room=room,
        remedies=remedies,
        checkpoint=checkpoint_bytes(parameters, ema),
        images_per_second=image_rate(measured, device, mixed_precision, mfu, flops, training),
        worker_rate=worker_rate(measured, recipe.data["dataset"] if dataset is None else dataset),
        workers=workers,
        exchange=2 * (gpus - 1) / gpus * 4 * parameters.total,  # a ring: sums go round, then go round again
        bandwidth=link_speed(bandwidth, nodes, device),
        measured=measured,
    )


def image_rate(
    measured: Measured | None,
    device: Device | None,
    mixed_precision: str,
    mfu: float | None,
    flops: float,
    useful: float,
) -> Known:
    """Images per second that a device computes, at `flops` each, of which MFU proper counts the `useful` ones."""
    if measured is not None:
        source = f"measured here, {measured.device}, {measured.micro_batches} forward and backward passes"
        return Known(measured.images_per_second, source)
    peak = device.peak_flops(mixed_precision)
    if peak is None:
        raise ValueError(f"The device {device.name} has no units for bf16; give --mixed-precision no.")
    reached, said = (MFU, "assumed") if mfu is None else (mfu, "given")
    source = f"MFU {reached:.2f}, {said}, of {device.name}'s {peak / 1e12:,.0f} TFLOP/s"
    if flops > useful:
        source += f"; {reached * useful / flops:.2f} without recomputation and tokenizer"
    return Known(reached * peak / flops, source)


def worker_rate(measured: Measured | None, dataset: str) -> Known | None:
    """Images per second that a worker reads, None if nobody knows."""
    if measured is not None and measured.worker_images_per_second is not None:
        return Known(measured.worker_images_per_second, "measured here")
    return Known(WORKER_RATES[dataset], "assumed, 500x375 JPEGs") if dataset in WORKER_RATES else None


def link_speed(bandwidth: float | None, nodes: int, device: Device | None) -> Known | None:
    """Bytes per second that a device sends to the others, None if nobody knows."""
    if bandwidth is not None:
        return Known(bandwidth * 1e9, "given")
    if nodes > 1:
        return Known(LINK_SHARE * NETWORK * 1e9, f"assumed, {LINK_SHARE:.0%} of 400 Gbit/s")
    if device is None:
        return None
    return Known(LINK_SHARE * device.link * 1e9, f"assumed, {LINK_SHARE:.0%} of its link")


def make_plan(
    recipe: Recipe,
    *,
    device: str | None = None,
    dataset: str | None = None,
    num_images: int | None = None,
    dry_run: bool = False,
    dry_run_seconds: float = 60,
    **options,
) -> RunPlan:
    """As [`plan_run`], with names of device and data set, and a dry run on this machine if it is asked for.

    Args:
        device: a name in the table; default the one of this machine if it is there, else an H100.
        dry_run: measures for `dry_run_seconds`, the last quarter of them the data set, if it is on this machine.

    Raises:
        ValueError: from what it calls, or a dry run together with what it replaces.
    """
    images, source = find_images(recipe, dataset, num_images)
    here = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not dry_run:
        known = named_device(device) if device is not None else known_device(here) or DEVICES["h100"]
        return plan_run(recipe, images, device=known, dataset=dataset, **options)
    for name, value in {"device": device, "mfu": options.pop("mfu", None)}.items():
        if value is not None:
            raise ValueError(f"A dry run measures this machine, so --{name} has no place beside --dry-run.")
    if dry_run_seconds <= 0:
        raise ValueError(f"--dry-run-seconds is {dry_run_seconds}, but must be above 0.")
    plan = Plan.derive(recipe, int(images.value), options.get("gpus", 1), options.get("per_device_batch_size"))
    measured = measure_training(
        recipe,
        plan,
        mixed_precision=options.get("mixed_precision", "bf16"),
        gradient_checkpointing=options.get("gradient_checkpointing", False),
        seconds=dry_run_seconds * (1 if source is None else 0.75),
    )
    if source is not None:
        rate = measure_loading(source, recipe, dry_run_seconds / 4)
        measured = replace(measured, worker_images_per_second=rate)
    return plan_run(recipe, images, device=known_device(here), dataset=dataset, measured=measured, **options)
