"""What a model generates and restores, to look at: grids of images, ways from noise to image, denoised images."""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..images import centre_box, read_image, resize_crop
from ..noise_schedules import NoiseSchedule
from ..pipeline_ldae import LDAEPipeline
from ..training import load_images
from ..training.pictures import SMALLEST, mosaic, watched_images
from .generators import load_generator
from .sample_noise import noise_generators


STRIP_LEVELS = 8  # columns of a strip, before the image


def sample_images(
    pipeline: LDAEPipeline,
    numbers: Sequence[int],
    class_labels: Sequence[int] | None = None,
    *,
    seed: int = 0,
    batch_size: int = 64,
    **options,
) -> list:
    """Generates the images of these numbers, as a list of what the pipeline's `output_type` says, by default PIL.

    An image depends on the seed and on its number, not on the batch or on which others there are (up to rounding).

    Args:
        class_labels: classes that the numbers take in turn, number 0 the first; None for "no class".
        batch_size: images that are generated together.
        options: further ones of the pipeline: `num_inference_steps`, `eta`, `guidance_scale`, …

    Raises:
        ValueError: what the pipeline raises.
    """
    images = []
    for start in range(0, len(numbers), batch_size):
        batch = numbers[start : start + batch_size]
        labels = None if class_labels is None else [class_labels[number % len(class_labels)] for number in batch]
        generators = noise_generators(seed, batch)
        images += pipeline(len(batch), class_labels=labels, generator=generators, **options).images
    return images


def image_grid(images: Sequence[Image.Image], num_classes: int | None = None) -> Image.Image:
    """Images of one size in rows, on white with a pixel between; small ones are enlarged, each pixel to a square.

    Args:
        num_classes: how many classes the images take in turn: each gets a column, if that is not far from a square.
    """
    columns = math.ceil(math.sqrt(len(images)))
    if num_classes is not None and columns / 2 <= num_classes <= columns * 2:
        columns = num_classes
    columns = min(columns, len(images))
    side = images[0].width * max(1, SMALLEST // images[0].width)
    rows = math.ceil(len(images) / columns)
    picture = Image.new("RGB", (columns * (side + 1) + 1, rows * (side + 1) + 1), "white")
    for number, image in enumerate(images):
        row, column = divmod(number, columns)
        enlarged = image.resize((side, side), Image.Resampling.NEAREST)
        picture.paste(enlarged, (1 + column * (side + 1), 1 + row * (side + 1)))
    return picture


def strip_picture(
    pipeline: LDAEPipeline, numbers: Sequence[int], class_labels: Sequence[int] | None = None, **options
) -> Image.Image:
    """The way of a few images from noise to what they are: above what the network is shown, below the image that it
    takes to be behind the noise. The number over a column is the noise relative to the signal, sigma_t / gamma_t.

    Args:
        numbers, class_labels, options: as in [`sample_images`], whose images of these numbers these are.
    """
    titles, columns = [], []

    def keep(pipeline, step, timestep, tensors):
        steps = len(pipeline.scheduler.timesteps)
        shown = min(STRIP_LEVELS, steps)
        if step in {round(column * (steps - 1) / max(1, shown - 1)) for column in range(shown)}:
            ratio = noise_to_signal(pipeline.model.ldae.schedule, timestep)
            titles.append(f"noise {ratio:.2f}" if ratio < 10 else f"noise {ratio:.0f}")
            pair = (tensors["noisy_latents"], tensors["clean_latents"])
            columns.append(torch.stack([pipeline.decode(latents, "pt").cpu() for latents in pair]))

    options |= {"output_type": "pt", "callback_on_step_end": keep, "batch_size": len(numbers)}
    images = torch.stack(sample_images(pipeline, numbers, class_labels, **options)).cpu()
    ways = torch.stack([*columns, images.expand(2, *images.shape)], dim=2)  # 2, images, columns, C, H, W
    rows = []
    for number, noisy, clean in zip(numbers, *ways, strict=True):
        rows += [(f"{number} shown", noisy), ("restored", clean)]
    return mosaic(rows, columns=[*titles, "image"])


def rows_of_models(
    sources: Sequence[str | Path], count: int = 16, *, weights: str | None = None, **options
) -> Image.Image:
    """Images of the same numbers by several models, a row each, titled by recipe.

    Where latents have the same shape, those in a column began with the same noise. Of a model with classes the images
    take all of them in turn.

    Args:
        sources, weights: as [`load_generator`] takes them. count: images of each.
        options: as in [`sample_images`].

    Raises:
        ValueError: the models' images are of different sizes, or what `load_generator` raises.
    """
    rows = []
    for source in sources:
        pipeline, facts, _ = load_generator(source, weights=weights)
        pipeline.set_progress_bar_config(disable=True)
        num_classes = pipeline.model.config.num_classes
        labels = None if num_classes is None else range(num_classes)
        images = torch.stack(sample_images(pipeline, range(count), labels, output_type="pt", **options)).cpu()
        rows.append((facts["recipe"] or Path(source).name, images))
    if len(sizes := {images.shape[-1] for _, images in rows}) > 1:
        raise ValueError(
            f"These models make images of {' and '.join(map(str, sorted(sizes)))} pixels; show them apart."
        )
    return mosaic(rows)


def noise_to_signal(schedule: NoiseSchedule, timestep: int) -> float:
    """sigma_t / gamma_t."""
    return (schedule.sigmas[timestep] / schedule.gammas[timestep]).item()


def check_choice(files: Sequence[str | Path] | None, dataset: str | None) -> None:
    """Raises ValueError if a command is given neither image files nor a data set, or both."""
    if bool(files) == (dataset is not None):
        raise ValueError("Give either image files or --dataset, and not both.")


def chosen_images(
    files: Sequence[str | Path] | None, dataset: str | None, split: str, count: int, image_size: int
) -> torch.Tensor:
    """Centre crops (n,C,image_size,image_size) uint8 of image files, else of `count` images spread over a data set.

    Raises:
        ValueError: an image, or all of a data set, cannot be read.
    """
    if files:
        return read_images(files, image_size)
    return watched_images(load_images(dataset, split), image_size, count)


def read_images(files: Sequence[str | Path], image_size: int) -> torch.Tensor:
    """Centre crops (n,C,image_size,image_size) uint8 of image files.

    Raises:
        ValueError: a file is not there or is no image; the message names it.
    """
    crops = []
    for file in map(Path, files):
        try:
            image = read_image(file.read_bytes())
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise ValueError(f"{file} cannot be used as an image: {reason}") from error
        crops.append(torch.from_numpy(resize_crop(image, image_size, centre_box(*image.size))))
    return torch.stack(crops)


def check_picture_file(file: Path) -> None:
    """Raises ValueError for an ending that Pillow writes no pictures of, before work is put into one."""
    if Image.registered_extensions().get(file.suffix.lower()) not in Image.SAVE:
        raise ValueError(f"{str(file)!r} has the ending of no picture that can be written; call it samples.png.")


def save_picture(picture: Image.Image, file: Path) -> Path:
    """Writes a picture, and the folders above it that are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    picture.save(file)
    return file
