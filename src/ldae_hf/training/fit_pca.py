"""The PCA basis of a run: fitted once to patches of its training crops, by all processes together."""

from pathlib import Path

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

    Raises:
        ValueError: the given processor is not there, not fitted, made for another model, or not the one that the run
            has begun with.
    """
    chosen = None if given is None else given_processor(Path(given), config)
    already_there = (folder / "preprocessor_config.json").is_file()
    accelerator.wait_for_everyone()  # all have looked before the first one writes
    if already_there:
        processor = LDAEImageProcessor.from_pretrained(folder)
        if chosen is not None and chosen.fingerprint != processor.fingerprint:
            raise ValueError(f"The run began with the processor in {folder}, not the one in {given}; leave that out.")
        return processor
    processor = chosen or fit(config, source, recipe, accelerator, loading)
    if accelerator.is_main_process:
        write_folder(folder, processor.save_pretrained)
    accelerator.wait_for_everyone()
    return LDAEImageProcessor.from_pretrained(folder)


def given_processor(folder: Path, config: LDAEConfig) -> LDAEImageProcessor:
    """A fitted processor from a folder, checked before the run makes it its own.

    Raises:
        ValueError: it is not there, not fitted, or made for another model.
    """
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} with a processor.")
    processor = LDAEImageProcessor.from_pretrained(folder)
    if not processor.fitted:
        raise ValueError(f"The processor in {folder} has no PCA basis yet; fit it, or leave it out.")
    for key in ("image_size", "patch_size", "latent_dim", "latent_scaling"):
        theirs, ours = getattr(processor, key), getattr(config, key)
        if theirs != ours:
            raise ValueError(f"The processor in {folder} has {key}={theirs!r}, but the model has {ours!r}.")
    return processor


def fit(
    config: LDAEConfig, source: ImageSource, recipe: Recipe, accelerator: Accelerator, loading: dict
) -> LDAEImageProcessor:
    """A new processor, the same in all processes."""
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
    return processor.set_basis(PatchCovariance.from_state_dict(sums))
