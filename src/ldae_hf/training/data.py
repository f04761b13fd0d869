"""Data loaders: training samples in global batches, with noise or with labels only, training crops for the PCA, centre
crops for evaluation.

Batches hold uint8 pixels, to be normalised on the device, and list the images that could not be read.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..recipes import Recipe
from .decoded_images import DecodedImages
from .sampling import (
    Augmentation,
    Corruption,
    Crop,
    GlobalBatchSampler,
    LabelDropout,
    SampleMaker,
    collate,
    micro_batches_per_step,
)
from .sources import BadImageError, ImageSource, load_images
from .streaming import OrderedStream, StreamingLoader
from .workers import shield_from_signals


__all__ = [
    "BadImageError",
    "ImageSource",
    "crop_loader",
    "eval_loader",
    "labelled_loader",
    "load_images",
    "train_loader",
]


class _Samples(Dataset):
    """Samples by (epoch, index). An unreadable image is replaced by the next one that is not; crop, timestep and noise
    stay those of the position."""

    def __init__(self, source: ImageSource | DecodedImages, make: SampleMaker):
        self.source, self.make = source, make

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        image, label, bad_images = self.source.read_or_replace(index)
        return self.make(image, label, epoch, index) | {"bad_images": bad_images}


class _CachedSamples(Dataset):
    """As `_Samples`, with `tokens` (N,K) out of a [`TokenCache`] in place of pixels."""

    def __init__(self, cache: Dataset, make: SampleMaker):
        self.cache, self.make = cache, make

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        tokens, label = self.cache[index]
        return {"tokens": tokens} | self.make.draws(label, epoch, index) | {"bad_images": []}


class _InOrder(Sampler[tuple[int, int]]):
    """Every `world_size`-th image from `start` on once, as (epoch 0, index)."""

    def __init__(self, num_images: int, rank: int = 0, world_size: int = 1, start: int = 0):
        self.indices = range(start + rank, num_images, world_size)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return ((0, index) for index in self.indices)


def loading_options(recipe: Recipe, seed: int, num_workers: int) -> dict:
    """What every loader of a run is told of a recipe's images and crops."""
    crops = {key: recipe.data[key] for key in ("crop", "crop_scale", "flip")}
    return crops | dict(image_size=recipe.model["image_size"], seed=seed, num_workers=num_workers)


def train_loader(
    source: ImageSource,
    *,
    image_size: int,
    num_timesteps: int,
    tokens_shape: tuple[int, int],
    global_batch_size: int,
    micro_batch_size: int,
    num_steps: int,
    start_step: int = 0,
    crop: str = "centre",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    shuffle_buffer: int = 1000,
    state: dict | None = None,
    label_dropout: float | None = None,
    cached_tokens: Dataset | None = None,
    timestep_block: int | None = None,
) -> DataLoader | StreamingLoader:
    """Micro-batches of one process for the global steps `start_step` ... `num_steps` - 1, across epochs.

    A batch holds `pixel_values` (B,C,image_size,image_size) uint8, `labels`, `sample_ids` and `timesteps` (B,…) int64,
    `noise` (B,N,K) float32 and `bad_images`, a list of {index, path, reason}. Whatever the workers, processes and
    micro-batches, a global step sees the same samples, in the same order, with the same crops, timesteps and noise.

    A stream cannot promise this: there it holds for one layout, and `state_dict()` of the loader, given as `state`, is
    needed to begin at another step than 0.

    Args:
        num_timesteps: t is uniform in 0...num_timesteps - 1. tokens_shape: (N,K) of the noise.
        global_batch_size: images of a step. micro_batch_size: images of a batch, in one process.
        crop, crop_scale, flip: as in [`Crop`].
        seed: of order, crops, timesteps and noise.
        num_workers: processes that decode images; 0 decodes in this one, but a stream always has a worker.
        shuffle_buffer: rows that a stream shuffles together.
        label_dropout: share of the labels to drop; batches then hold `dropped_labels` (B,) bool.
        cached_tokens: a [`TokenCache`] of these images; batches then hold `tokens` (B,N,K) in place of pixels.
        timestep_block: None for one timestep a sample; else one a token, shared in squares of so many a side.

    Raises:
        ValueError: an argument is out of range, the data set is smaller than a global batch, the global batch does not
            divide evenly, or the state does not fit.
    """
    make = SampleMaker(
        Crop(image_size, crop, tuple(crop_scale), flip, seed),
        Corruption(num_timesteps, tuple(tokens_shape), seed, timestep_block),
        None if label_dropout is None else LabelDropout(label_dropout, seed),
    )
    if not source.streaming:
        samples = _Samples(source, make) if cached_tokens is None else _CachedSamples(cached_tokens, make)
        sizes = (len(source), global_batch_size, micro_batch_size, num_steps)
        layout = dict(seed=seed, start_step=start_step, rank=rank, world_size=world_size)
        return _loader(samples, num_workers, batch_sampler=GlobalBatchSampler(*sizes, **layout))
    accumulation = micro_batches_per_step(global_batch_size, micro_batch_size, world_size)
    loader = StreamingLoader(
        source,
        make,
        micro_batch_size,
        num_steps * accumulation,
        seed=seed,
        rank=rank,
        world_size=world_size,
        num_workers=num_workers,
        shuffle_buffer=shuffle_buffer,
        pin_memory=torch.cuda.is_available(),
    )
    if state is not None:
        loader.load_state_dict(state)
    if loader.batches_done != start_step * accumulation:
        raise ValueError(
            f"The training begins at step {start_step}, but the stream stands at step "
            f"{loader.batches_done / accumulation:g}; give the state that was saved with that step."
        )
    return loader


def labelled_loader(
    source: ImageSource,
    *,
    image_size: int,
    global_batch_size: int,
    micro_batch_size: int,
    num_steps: int,
    start_step: int = 0,
    crop: str = "random_resized",
    crop_scale: tuple[float, float] = (0.08, 1.0),
    flip: bool = True,
    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    decoded_bytes: int = 0,
    progress: bool = True,
) -> DataLoader:
    """As [`train_loader`] for training with labels: batches of `pixel_values` (B,C,image_size,image_size) uint8,
    `labels` and `sample_ids` (B,) int64, and `bad_images`.

    Args:
        augment: called with each crop, uint8 (C,H,W), and the generator of all that it draws, which is a function of
            seed, epoch and sample; returns the crop's successor, uint8. With workers it must be picklable where
            processes are not forked.
        decoded_bytes: memory in which decoded images are kept, as many as fit, so that small ones are decoded once and
            not in every epoch; they are all read now, with a bar if `progress`.

    Raises:
        ValueError: as in [`train_loader`], or the data set is a stream or has no labels.
    """
    if source.streaming:
        raise ValueError(f"{source.name} is a stream, whose images cannot be taken in any order; download it first.")
    if source.label_column is None:
        raise ValueError(f"{source.name} has no labels; name its label column, or another data set.")
    crops = Crop(image_size, crop, tuple(crop_scale), flip, seed)
    make = SampleMaker(crops, augmentation=None if augment is None else Augmentation(augment, seed))
    sizes = (len(source), global_batch_size, micro_batch_size, num_steps)
    layout = dict(seed=seed, start_step=start_step, rank=rank, world_size=world_size)
    samples = _Samples(DecodedImages(source, decoded_bytes, progress), make)
    return _loader(samples, num_workers, batch_sampler=GlobalBatchSampler(*sizes, **layout))


def crop_loader(
    source: ImageSource,
    *,
    image_size: int,
    crop: str = "centre",
    crop_scale: tuple[float, float] = (0.2, 1.0),
    flip: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    batch_size: int = 64,
    start: int = 0,
) -> Iterator[torch.Tensor]:
    """The training crops of epoch 0, each image once over all processes: uint8 (B,C,image_size,image_size).

    Args:
        start: number of the first image; a stream begins with its first.
    """
    make = SampleMaker(Crop(image_size, crop, tuple(crop_scale), flip, seed))
    for batch in _one_pass(source, make, batch_size, num_workers, rank, world_size, start):
        yield batch["pixel_values"]


def eval_loader(source: ImageSource, image_size: int, batch_size: int, num_workers: int = 0) -> DataLoader:
    """Centre crops in order, every image once: batches of `pixel_values` (B,C,image_size,image_size) uint8, `labels`
    and `sample_ids` (B,) int64, and `bad_images`.

    The row of an unreadable image, whose number is the `index` in `bad_images`, holds the next readable one with its
    label; a stream leaves the row out. A stream is read by one worker, to keep its order.
    """
    return _one_pass(source, SampleMaker(Crop(image_size)), batch_size, 1 if source.streaming else num_workers)


def _one_pass(source, make, batch_size, num_workers, rank=0, world_size=1, start=0) -> DataLoader:
    if source.streaming:
        samples, order, num_workers = OrderedStream(source, make, rank, world_size), None, max(1, num_workers)
    else:
        samples, order = _Samples(source, make), _InOrder(len(source), rank, world_size, start)
    return _loader(samples, num_workers, sampler=order, batch_size=batch_size)


def _loader(samples: Dataset, num_workers: int, **order) -> DataLoader:
    return DataLoader(
        samples,
        **order,
        num_workers=num_workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=shield_from_signals,
        generator=torch.Generator(),  # else each start draws a seed from the generator that a run saves and resumes
    )
