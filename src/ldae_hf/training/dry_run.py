"""How fast this machine trains a recipe, and reads its images: measured with the code of a training."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from transformers import AutoModelForPreTraining

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..recipes import Recipe
from .costs import untrained_autoencoder
from .data import ImageSource, loading_options, train_loader
from .memory import attention_of
from .optimization import ExponentialMovingAverage, Plan, adamw, update


WARM_UP = 3  # micro-batches, and one update: kernels are chosen, memory is taken
PARTS = 4  # micro-batches between two updates, where a step has more


@dataclass(frozen=True)
class Measured:
    """What a dry run found.

    Attributes:
        device: its name. images_per_second: of one device, in steps as the plan has them.
        micro_batches, updates: how many were timed. peak_memory: bytes on an accelerator, None on a CPU.
        worker_images_per_second: read, cropped and collated by one worker; None if no data set was there.
    """

    device: str
    images_per_second: float
    micro_batches: int
    updates: int
    peak_memory: int | None
    worker_images_per_second: float | None = None


def measure_training(
    recipe: Recipe,
    plan: Plan,
    *,
    mixed_precision: str,
    gradient_checkpointing: bool,
    seconds: float,
) -> Measured:
    """Takes real steps of the recipe's model on this device, on images made in memory, for `seconds` after a warm-up.

    Micro-batches and updates are timed apart, so that a step of many parts need not end in the time.

    Raises:
        ValueError: the micro-batch does not fit into the device's memory, or takes longer than the time.
    """
    accelerator = Accelerator(mixed_precision=mixed_precision)
    device, config = accelerator.device, recipe.model_config()
    torch.manual_seed(0)
    attention = attention_of(device.type, mixed_precision)
    model = AutoModelForPreTraining.from_config(config, attn_implementation=attention)
    if config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        model.ldae.tokenizer.attach(untrained_autoencoder(config, recipe.tokenizer))
    model.to(device, torch.get_default_dtype()).train()
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = adamw(model, recipe.train["betas"], recipe.train["weight_decay"])
    ema = None if plan.ema_decay is None else ExponentialMovingAverage(model, plan.ema_decay)
    processor = LDAEImageProcessor(
        image_size=config.image_size, patch_size=config.patch_size, latent_dim=config.latent_dim
    )
    wrapped = accelerator.prepare(model)
    batch = {name: value.pin_memory() if device.type == "cuda" else value for name, value in made_batch(config, plan)}

    def micro_batch(images: int | None = None) -> None:
        inputs = {name: value[:images].to(device, non_blocking=True) for name, value in batch.items()}
        inputs["pixel_values"] = processor.normalize_pixels(inputs["pixel_values"])
        accelerator.backward(wrapped(**inputs).loss / plan.accumulation)

    def step() -> None:
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        if recipe.train["max_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.train["max_grad_norm"], norm)
        update(optimizer, plan.learning_rate)
        if ema is not None:
            ema.update(model)

    def timed(work: Callable[[], None]) -> float:
        began = time.monotonic()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.monotonic() - began

    try:
        if device.type == "cpu":
            micro_batch(1)
            expected = plan.per_device_batch_size * timed(lambda: micro_batch(1))
            if expected > 2 * seconds:  # a batch is quicker than its images one by one
                raise ValueError(
                    f"One forward and backward pass of {plan.per_device_batch_size} images would take about "
                    f"{expected:.0f} seconds here; give a smaller --per-device-batch-size."
                )
        for _ in range(WARM_UP if device.type == "cuda" else 1):
            micro_batch()
        timed(step)
        parts, steps, until = [], [], time.monotonic() + seconds
        while time.monotonic() < until:
            parts += [timed(micro_batch) for _ in range(min(PARTS, plan.accumulation))]
            steps.append(timed(step))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"{plan.per_device_batch_size} images do not fit into this device's memory; give a smaller "
            "--per-device-batch-size, or --gradient-checkpointing."
        ) from error
    of_a_step = plan.accumulation * sum(parts) / len(parts) + sum(steps) / len(steps)
    on_cuda = device.type == "cuda"
    return Measured(
        device=torch.cuda.get_device_name(device) if on_cuda else f"CPU, {torch.get_num_threads()} threads",
        images_per_second=plan.accumulation * plan.per_device_batch_size / of_a_step,
        micro_batches=len(parts),
        updates=len(steps),
        peak_memory=torch.cuda.max_memory_allocated(device) if on_cuda else None,
    )


def made_batch(config: LDAEConfig, plan: Plan) -> list[tuple[str, torch.Tensor]]:
    """A micro-batch by name, as `train_loader` gives it, of random numbers."""
    size, pixels = plan.per_device_batch_size, (config.num_channels, config.image_size, config.image_size)
    batch = {
        "pixel_values": torch.randint(256, (size, *pixels), dtype=torch.uint8),
        "timesteps": torch.randint(config.num_noise_levels, (size, *config.timesteps_shape)),
        "noise": torch.randn(size, config.num_patches, config.latent_dim),
    }
    if config.num_classes is not None:
        batch["labels"] = torch.randint(config.num_classes, (size,))
        batch["dropped_labels"] = torch.rand(size) < config.class_dropout_prob
    return list(batch.items())


def measure_loading(source: ImageSource, recipe: Recipe, seconds: float) -> float:
    """Images per second that one worker of the training's loader reads, crops and collates, for `seconds`."""
    config, batch = recipe.model_config(), min(64, len(source))
    loader = train_loader(
        source,
        num_timesteps=config.num_noise_levels,
        tokens_shape=(config.num_patches, config.latent_dim),
        timestep_block=config.timestep_block,
        global_batch_size=batch,
        micro_batch_size=batch,
        num_steps=10**9,
        **loading_options(recipe, seed=0, num_workers=1),
    )
    batches = iter(loader)
    for _ in range(3):  # what the worker reads ahead at its start
        next(batches)
    images, began = 0, time.monotonic()
    while time.monotonic() - began < seconds:
        images += len(next(batches)["sample_ids"])
    return images / (time.monotonic() - began)
