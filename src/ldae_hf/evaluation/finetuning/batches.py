"""The training images of a run, cropped and augmented."""

from types import SimpleNamespace

from accelerate import Accelerator
from torch.utils.data import DataLoader

from ...training.data import ImageSource, labelled_loader
from .augmentation import Augmentations, RandAugment, RandomErasing
from .recipe import FineTuningPlan, FineTuningRecipe


def training_batches(
    source: ImageSource,
    image_size: int,
    recipe: FineTuningRecipe,
    plan: FineTuningPlan,
    start_step: int,
    options: SimpleNamespace,
    accelerator: Accelerator,
) -> DataLoader:
    """This process's part of the steps from `start_step` on, as [`labelled_loader`] gives them."""
    steps = [RandAugment(recipe.rand_augment)] if recipe.rand_augment else []
    steps += [RandomErasing(recipe.random_erasing)] if recipe.random_erasing else []
    return labelled_loader(
        source,
        image_size=image_size,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.per_device_batch_size,
        num_steps=plan.total_steps,
        start_step=start_step,
        crop_scale=recipe.crop_scale,
        flip=recipe.flip,
        augment=Augmentations(tuple(steps)) if steps else None,
        seed=options.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=options.num_workers,
        decoded_bytes=round(1e9 * options.decoded_gigabytes),
        progress=accelerator.is_main_process,
    )
