"""The PCA basis of a run: fitted once to patches of its training crops, by all processes together.

A signal breaks it off with what has been summed up so far, from which the same command goes on: the sums are exact
integers, so that neither the break nor another number of processes changes a bit of the basis.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..manifest import DamagedError, check_folder, write_folder
from ..patch_covariance import PatchCovariance
from ..progress import progress_bar
from ..recipes import Recipe
from .data import ImageSource, crop_loader
from .session import Interrupted, Session


BATCH = 64  # images of a process, after which a signal is looked for


def fit_processor(
    folder: Path,
    given: str | Path | None,
    config: LDAEConfig,
    source: ImageSource,
    recipe: Recipe,
    session: Session,
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
        Interrupted: by a signal; what has been fitted so far is kept in `folder` with the ending .partial.
    """
    chosen = None if given is None else given_processor(Path(given), config)
    already_there = (folder / "preprocessor_config.json").is_file()
    session.accelerator.wait_for_everyone()  # all have looked before the first one writes
    partial = folder.with_name(f"{folder.name}.partial")
    if already_there:
        session.on_main(lambda: remove(partial))
        processor = LDAEImageProcessor.from_pretrained(folder)
        if chosen is not None and chosen.fingerprint != processor.fingerprint:
            raise ValueError(f"The run began with the processor in {folder}, not the one in {given}; leave that out.")
        return processor
    processor = chosen or fit(config, source, recipe, session, loading, partial)

    def keep() -> None:
        write_folder(folder, processor.save_pretrained)
        remove(partial)

    session.on_main(keep)
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
    config: LDAEConfig, source: ImageSource, recipe: Recipe, session: Session, loading: dict, partial: Path
) -> LDAEImageProcessor:
    """A new processor, the same in all processes.

    Args:
        partial: where an earlier fit may have left its sums.
    """
    processor = LDAEImageProcessor(
        image_size=config.image_size,
        patch_size=config.patch_size,
        latent_dim=config.latent_dim,
        latent_scaling=config.latent_scaling,
    )
    probability = processor.patch_probability(len(source), recipe.tokenizer["fit_patches"])
    accelerator = session.accelerator
    rank, world = accelerator.process_index, accelerator.num_processes
    covariance, start = PatchCovariance(config.patch_dim), 0
    if (partial / "sums.safetensors").is_file():
        try:
            check_folder(partial)
        except DamagedError as error:
            raise DamagedError(f"{error} Delete {partial} to fit the PCA anew.") from error
        start = json.loads((partial / "position.json").read_text())["images_done"]
        if rank == 0:  # the sums of all processes are added up in the end
            covariance = PatchCovariance.from_state_dict(load_file(partial / "sums.safetensors"))

    def sums() -> dict[str, torch.Tensor]:
        found = covariance.state_dict()
        if world == 1:
            return found
        return {name: accelerator.reduce(value.to(accelerator.device)).cpu() for name, value in found.items()}

    def accumulate() -> None:
        common = 0 if source.streaming else (len(source) - start) // world // BATCH  # batches that every process has
        crops_of_all = crop_loader(source, rank=rank, world_size=world, batch_size=BATCH, start=start, **loading)
        bar = progress_bar(
            total=len(source), initial=start, desc="PCA", unit=" images", disable=not accelerator.is_main_process
        )
        with bar:
            for number, crops in enumerate(crops_of_all, start=1):
                processor.accumulate(covariance, crops, probability, loading["seed"])
                bar.update(len(crops) * world)
                if number <= common and (signal := session.agree(session.signals.number)[0]):
                    keep_partial(partial, start + number * BATCH * world, sums(), session.on_main)
                    raise Interrupted(signal)

    if source.streaming:  # nobody could say where it stands
        session.together(accumulate, at_once=True)
    else:
        accumulate()
    return processor.set_basis(PatchCovariance.from_state_dict(sums()))


def remove(partial: Path) -> None:
    """The sums, and what a killed process may have left half-written of them."""
    for path in partial.parent.glob(f"*{partial.name}*"):
        shutil.rmtree(path, ignore_errors=True)


def keep_partial(folder: Path, images_done: int, sums: dict[str, torch.Tensor], on_main: Callable) -> None:
    """Writes the sums over the first images."""

    def write(path: Path) -> None:
        save_file(sums, path / "sums.safetensors")
        (path / "position.json").write_text(json.dumps({"images_done": images_done}))

    on_main(lambda: write_folder(folder, write))
