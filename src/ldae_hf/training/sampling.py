"""What a training sample is made of: order, crop, timestep and noise as pure functions of seed, epoch and sample.

Nothing here depends on the number of workers, of processes or of micro-batches.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image
from torch.utils.data import Sampler, default_collate

from ..images import centre_box, resize_crop


_PURPOSES = ("order", "crop", "timestep", "noise", "shards", "buffer", "label", "label_dropout", "augmentation")
_PURPOSES += ("mixing", "drop_path")  # of fine-tuning's steps
_ASPECT_RATIOS = (3 / 4, 4 / 3)


def random_generator(seed: int, purpose: str, epoch: int = 0, sample_id: int = 0) -> np.random.Generator:
    """The generator of one purpose for one sample in one epoch.

    Philox encrypts a counter: seed and purpose are its key, epoch and sample the upper words of the counter, so that no
    two of these streams ever meet, which a hash could only make likely.

    Raises:
        ValueError: the seed does not fit in 64 bits.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"The seed is {seed}, but must be in 0...2**64 - 1.")
    key = np.array([seed, _PURPOSES.index(purpose)], dtype=np.uint64)
    counter = np.array([0, 0, sample_id, epoch], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """(num_images,) int64, the permutation of the images in one epoch."""
    return random_generator(seed, "order", epoch).permutation(num_images)


def random_resized_box(
    width: int, height: int, scale: tuple[float, float], generator: np.random.Generator
) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) in pixels of a random crop, drawn as torchvision's `RandomResizedCrop` draws it.

    Args:
        scale: the smallest and largest share of the image's area; the aspect ratio is log-uniform in 3/4...4/3.
    """
    for _ in range(10):
        area = width * height * generator.uniform(*scale)
        ratio = math.exp(generator.uniform(*map(math.log, _ASPECT_RATIOS)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left = int(generator.integers(width - box_width + 1))
            upper = int(generator.integers(height - box_height + 1))
            return left, upper, left + box_width, upper + box_height
    # A very long image: the largest centred box of an allowed ratio.
    ratio = min(max(width / height, _ASPECT_RATIOS[0]), _ASPECT_RATIOS[1])
    box_width, box_height = min(width, round(height * ratio)), min(height, round(width / ratio))
    left, upper = (width - box_width) // 2, (height - box_height) // 2
    return left, upper, left + box_width, upper + box_height


@dataclass(frozen=True)
class Crop:
    """Cuts a square out of an image, the same one for the same (seed, epoch, sample).

    Args:
        image_size: side of the result in pixels.
        mode: `"centre"`, the largest centred square, or `"random_resized"`.
        scale: the smallest and largest share of the area that a random crop keeps.
        flip: mirror every other image, at random.

    Raises:
        ValueError: an argument is out of range.
    """

    image_size: int
    mode: str = "centre"
    scale: tuple[float, float] = (0.2, 1.0)
    flip: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.mode not in ("centre", "random_resized"):
            raise ValueError(f"The crop is {self.mode!r}, but must be 'centre' or 'random_resized'.")
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"The crop scale is {tuple(self.scale)}, but must be 0 < smallest <= largest <= 1.")
        if self.image_size < 1:
            raise ValueError(f"image_size is {self.image_size}, but must be at least 1 pixel.")

    def __call__(self, image: Image.Image, epoch: int, sample_id: int) -> np.ndarray:
        """RGB image of any size -> uint8 (C,image_size,image_size)."""
        generator = random_generator(self.seed, "crop", epoch, sample_id)
        # Drawn first and always, so that switching flips on moves no box.
        mirrored = generator.random() < 0.5 and self.flip
        if self.mode == "centre":
            box = centre_box(*image.size)
        else:
            box = random_resized_box(*image.size, self.scale, generator)
        pixels = resize_crop(image, self.image_size, box)
        return np.ascontiguousarray(pixels[:, :, ::-1]) if mirrored else pixels


@dataclass(frozen=True)
class Corruption:
    """Draws timesteps and noise, the same ones for the same (seed, epoch, sample).

    Args:
        num_timesteps: t is uniform in 0...num_timesteps - 1.
        tokens_shape: (N,K), tokens and latent dimensions of the noise.
        timestep_block: None for one t for the image; else t are (N,), and squares of so many patches a side share one.
    """

    num_timesteps: int
    tokens_shape: tuple[int, int]
    seed: int = 0
    timestep_block: int | None = None

    def __call__(self, epoch: int, sample_id: int) -> tuple[np.ndarray, np.ndarray]:
        """t, int64 () or (N,), and standard normal noise as float32 (N,K)."""
        generator = random_generator(self.seed, "timestep", epoch, sample_id)
        noise = random_generator(self.seed, "noise", epoch, sample_id)
        if self.timestep_block is None:
            timesteps = generator.integers(self.num_timesteps, size=())
        else:
            side = math.isqrt(self.tokens_shape[0]) // self.timestep_block
            drawn = generator.integers(self.num_timesteps, size=(side, side))
            timesteps = drawn.repeat(self.timestep_block, axis=0).repeat(self.timestep_block, axis=1).ravel()
        return timesteps, noise.standard_normal(self.tokens_shape, dtype=np.float32)


@dataclass(frozen=True)
class LabelDropout:
    """Draws whether a label is dropped, the same for the same (seed, epoch, sample).

    Args:
        probability: share of the labels, 0...1.
    """

    probability: float
    seed: int = 0

    def __call__(self, epoch: int, sample_id: int) -> bool:
        return bool(random_generator(self.seed, "label_dropout", epoch, sample_id).random() < self.probability)


@dataclass(frozen=True)
class Augmentation:
    """Changes a crop, always in the same way for the same (seed, epoch, sample).

    Args:
        augment: uint8 (C,H,W) and the generator of all that it draws -> uint8 (C,H,W).
    """

    augment: Callable[[np.ndarray, np.random.Generator], np.ndarray]
    seed: int = 0

    def __call__(self, pixels: np.ndarray, epoch: int, sample_id: int) -> np.ndarray:
        return self.augment(pixels, random_generator(self.seed, "augmentation", epoch, sample_id))


@dataclass(frozen=True)
class SampleMaker:
    """From an image to the dictionary that a data loader stacks; without a `corruption`, pixels and label only."""

    crop: Crop
    corruption: Corruption | None = None
    label_dropout: LabelDropout | None = None
    augmentation: Augmentation | None = None

    def __call__(self, image: Image.Image, label: int, epoch: int, sample_id: int) -> dict:
        pixels = self.crop(image, epoch, sample_id)
        if self.augmentation is not None:
            pixels = self.augmentation(pixels, epoch, sample_id)
        return {"pixel_values": pixels} | self.draws(label, epoch, sample_id)

    def draws(self, label: int, epoch: int, sample_id: int) -> dict:
        """All of a sample but its pixels."""
        sample = {"labels": label, "sample_ids": sample_id}
        if self.corruption is not None:
            sample["timesteps"], sample["noise"] = self.corruption(epoch, sample_id)
        if self.label_dropout is not None:
            sample["dropped_labels"] = self.label_dropout(epoch, sample_id)
        return sample


def collate(samples: list[dict]) -> dict:
    """Stacks samples to tensors; `bad_images` becomes one list."""
    bad_images = [bad for sample in samples for bad in sample["bad_images"]]
    fields = [{name: value for name, value in sample.items() if name != "bad_images"} for sample in samples]
    return default_collate(fields) | {"bad_images": bad_images}


def micro_batches_per_step(global_batch_size: int, micro_batch_size: int, world_size: int) -> int:
    """How many micro-batches each process sees in a step.

    Raises:
        ValueError: the global batch does not divide evenly.
    """
    if micro_batch_size < 1 or global_batch_size % (micro_batch_size * world_size):
        raise ValueError(
            f"A global batch of {global_batch_size} images cannot be split into batches of {micro_batch_size} on "
            f"{world_size} process(es); choose a batch size that divides {global_batch_size / world_size:g}."
        )
    return global_batch_size // (micro_batch_size * world_size)


class GlobalBatchSampler(Sampler[list[tuple[int, int]]]):
    """The micro-batches of one process, as lists of (epoch, index), from a global step on.

    Step s of an epoch covers positions s·G ... (s+1)·G - 1 of the epoch's order, G the global batch; the incomplete
    batch at an epoch's end is dropped. Each process takes a contiguous part of it, each micro-batch a part of that.

    Args:
        num_images: images of the data set. global_batch_size: G.
        micro_batch_size: images of one forward pass in one process.
        num_steps: where to end. start_step: where to begin, both counted from the beginning of the training.
        seed: of the order. rank, world_size: this process, and how many there are.

    Raises:
        ValueError: the data set is smaller than G, or G does not divide evenly.
    """

    def __init__(
        self,
        num_images: int,
        global_batch_size: int,
        micro_batch_size: int,
        num_steps: int,
        *,
        seed: int = 0,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        if num_images < global_batch_size:
            raise ValueError(
                f"The data set has {num_images} images, fewer than the global batch of {global_batch_size}; "
                "choose a smaller global batch."
            )
        self.accumulation = micro_batches_per_step(global_batch_size, micro_batch_size, world_size)
        self.num_images, self.global_batch_size, self.micro_batch_size = num_images, global_batch_size, micro_batch_size
        self.steps = range(start_step, num_steps)
        self.seed, self.rank = seed, rank

    def __len__(self) -> int:
        return len(self.steps) * self.accumulation

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.num_images // self.global_batch_size
        ordered_epoch = None
        for step in self.steps:
            epoch, step_of_epoch = divmod(step, steps_per_epoch)
            if epoch != ordered_epoch:
                order, ordered_epoch = epoch_order(self.seed, epoch, self.num_images), epoch
            first = step_of_epoch * self.global_batch_size + self.rank * self.accumulation * self.micro_batch_size
            for start in range(first, first + self.accumulation * self.micro_batch_size, self.micro_batch_size):
                yield [(epoch, int(index)) for index in order[start : start + self.micro_batch_size]]
