"""Pictures that show how a run is getting on: the same few images, corrupted in the same way, as restored so far."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

from ..image_processing_ldae import LDAEImageProcessor
from ..images import centre_box, resize_crop
from ..modeling_ldae import LDAEForPreTraining
from ..noise_schedules import NoiseSchedule
from .data import eval_loader
from .sources import ImageSource


NOISE_TO_SIGNAL = (0.25, 0.5, 1, 2)  # sigma_t / gamma_t: what makes the levels of different schedules comparable
SMALLEST, LARGEST = 64, 128  # pixels per side, between which images are brought by a whole number, if one does
MARGIN = 64  # pixels at the left at least, for the titles of the rows
HEADER = 16  # pixels at the top, for those of columns


def watched_images(source: ImageSource, image_size: int, count: int = 8) -> torch.Tensor:
    """Centre crops (n,C,image_size,image_size) uint8 to look at, the same ones whenever it is asked.

    They are spread evenly over the data set, whose rows may be sorted by class; a stream gives its first ones. An
    unreadable image is replaced by the next one that is not. `n` is `count`, or less where there are fewer images.

    Raises:
        ValueError: no image can be read.
    """
    if source.streaming:
        with torch.random.fork_rng(devices=[]):  # a loader's start draws from the generator
            return next(iter(eval_loader(source, image_size, count)))["pixel_values"]
    count = min(count, len(source))
    images = [source.read_or_replace(number * len(source) // count)[0] for number in range(count)]
    return torch.stack([torch.from_numpy(resize_crop(image, image_size, centre_box(*image.size))) for image in images])


def watched_levels(schedule: NoiseSchedule, noise_to_signal: Sequence[float] = NOISE_TO_SIGNAL) -> list[int]:
    """The timesteps whose noise, relative to the signal, is nearest to these ratios; every schedule has one."""
    ratios = (schedule.sigmas / schedule.gammas).cpu()  # infinite where there is no signal left
    return sorted({(ratios - ratio).abs().argmin().item() for ratio in noise_to_signal})


class Restoration(NamedTuple):
    """Images at one level of noise: gamma_t and sigma_t, what the model is shown, what it restores; each (n,C,H,W) in
    the processor's normalisation.
    """

    gamma: float
    sigma: float
    noisy: torch.Tensor
    restored: torch.Tensor


@torch.no_grad()
def restorations(
    model: LDAEForPreTraining,
    processor: LDAEImageProcessor,
    pixels: torch.Tensor,
    seed: int = 0,
    timesteps: Sequence[int] | None = None,
) -> tuple[torch.Tensor, list[Restoration]]:
    """Images (n,C,H,W) in the processor's normalisation, and what becomes of them at a few levels of noise.

    The noisy image is what the noisy latents decode to, whatever space the network itself sees. The noise is always
    the same. A model with class labels is told none. Nothing is drawn from torch's generators, and a compiled model
    runs as it is written: it would be compiled once more for a batch of this size.

    Args:
        model: unwrapped, in either mode, which it is left in. Its weights are used as they are: those of an EMA are to
            be put in place before. Where weights are sharded over processes, all of them have to call it.
        processor: the model's. pixels: (n,C,H,W) uint8 of the processor's `image_size`. seed: of the noise.
        timesteps: the levels; default [`watched_levels`].

    Raises:
        ValueError: the processor is not the model's, the images have another size, or a level is not there.
    """
    model.check_processor(processor)
    schedule, was_training = model.ldae.schedule, model.training
    images = processor.normalize_pixels(pixels.to(model.device))
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(images), processor.num_patches, processor.latent_dim, generator=generator)
    found = []
    model.eval()
    try:
        with torch.compiler.set_stance("force_eager"):
            for level in watched_levels(schedule) if timesteps is None else timesteps:
                noisy, restored = model.denoise(images, level, noise)
                found.append(Restoration(schedule.gammas[level].item(), schedule.sigmas[level].item(), noisy, restored))
    finally:
        model.train(was_training)
    return images, found


def denoising_picture(
    model: LDAEForPreTraining,
    processor: LDAEImageProcessor,
    pixels: torch.Tensor,
    seed: int = 0,
    timesteps: Sequence[int] | None = None,
) -> Image.Image:
    """Images, and for each of a few levels of noise what the model is shown and what it restores, row by row.

    The number in the title of a noisy image is sigma_t / gamma_t. The pictures of a run differ by the weights alone.
    Arguments and errors are those of [`restorations`].
    """
    images, found = restorations(model, processor, pixels, seed, timesteps)
    rows = [("original", images)]
    for gamma, sigma, noisy, restored in found:
        rows += [(f"noise {sigma / gamma:.2f}", noisy), ("restored", restored)]
    return mosaic(rows, processor)


def to_unit_range(images: torch.Tensor, processor: LDAEImageProcessor) -> torch.Tensor:
    """Images (…,C,H,W) in the processor's normalisation to 0 ... 1, not clipped."""
    mean, std = (
        torch.tensor(values, device=images.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return images * std + mean


def mosaic(
    rows: Sequence[tuple[str, torch.Tensor]],
    processor: LDAEImageProcessor | None = None,
    columns: Sequence[str] = (),
) -> Image.Image:
    """Rows of images, a title and (n,C,H,W) each, as one picture on white.

    Values outside the range are clipped, NaN is black. Small images are enlarged, each pixel to a square; of large ones
    squares of pixels are averaged.

    Args:
        processor: in whose normalisation the images are; None for 0 ... 1. columns: titles above the first row.
    """
    images = torch.stack([images.float().cpu() for _, images in rows])
    if processor is not None:
        images = to_unit_range(images, processor)
    size, layout = images.shape[-1], images.shape[:2]
    images = F.avg_pool2d(images.nan_to_num(0).clamp(0, 1).flatten(0, 1), max(1, -(-size // LARGEST)))
    pixels = (images * 255).round().to(torch.uint8).unflatten(0, layout)
    times = max(1, SMALLEST // size)
    pixels = pixels.repeat_interleave(times, -1).repeat_interleave(times, -2)
    pixels = F.pad(pixels, (1, 1, 1, 1), value=255).permute(0, 3, 1, 4, 2)  # rows, H, columns, W, C
    images = Image.fromarray(pixels.flatten(2, 3).flatten(0, 1).contiguous().numpy())
    font = ImageFont.load_default(11)
    top, left = HEADER if columns else 0, max(MARGIN, *(math.ceil(font.getlength(title)) + 6 for title, _ in rows))
    picture = Image.new("RGB", (left + images.width, top + images.height), "white")
    picture.paste(images, (left, top))
    draw = ImageDraw.Draw(picture)
    for number, (title, _) in enumerate(rows):
        middle = top + (number + 0.5) * images.height / len(rows)
        draw.text((2, middle), title, fill="black", font=font, anchor="lm")
    for number, title in enumerate(columns):
        middle = left + (number + 0.5) * images.width / layout[1]
        draw.text((middle, top / 2), title, fill="black", font=font, anchor="mm")
    return picture
