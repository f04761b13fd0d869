"""The PCA basis of a run: fitted once to patches of its training crops, by all processes together."""

from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..patch_covariance import PatchCovariance
from ..recipes import Recipe
from .checkpointing import write_folder
from .data import ImageSource, crop_loader


def fit_processor(
    folder: Path,
    given: str | Path | None,
    config: LDAEConfig,
    source: ImageSource,
    recipe: Recipe,
    accelerator: Accelerator,
    loading: dict,
) -> LDAEImageProcessor:
    """The run's processor: the one in `folder`, else the `given` one, else a new one fitted to `source`.

    Each process takes its share of the images; the exact integer sums add up to the same basis on every layout.

    Args:
        folder: where the run keeps its processor. given: a folder with a fitted processor.
        loading: image size, crop and seed, as for `train_loader`.
    """
    already_there = (folder / "preprocessor_config.json").is_file()
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if already_there:
        return LDAEImageProcessor.from_pretrained(folder)
    if given is not None:
        processor = LDAEImageProcessor.from_pretrained(given)
    else:
        processor = LDAEImageProcessor(
            image_size=config.image_size,
            patch_size=config.patch_size,
            latent_dim=config.latent_dim,
            latent_scaling=config.latent_scaling,
        )
        probability = processor.patch_probability(len(source), recipe.tokenizer["fit_patches"])
        covariance = PatchCovariance(config.patch_dim)
        rank, world = accelerator.process_index, accelerator.num_processes
        with tqdm(total=len(source), desc="PCA", unit=" images", disable=not accelerator.is_main_process) as bar:
            for crops in crop_loader(source, rank=rank, world_size=world, **loading):
                processor.accumulate(covariance, crops, probability, loading["seed"])
                bar.update(len(crops) * world)
        sums = covariance.state_dict()
        if world > 1:
            sums = {name: accelerator.reduce(value.to(accelerator.device)).cpu() for name, value in sums.items()}
        processor.set_basis(PatchCovariance.from_state_dict(sums))
    if accelerator.is_main_process:
        write_folder(folder, processor.save_pretrained)
    accelerator.wait_for_everyone()
    return LDAEImageProcessor.from_pretrained(folder)
