"""What fine-tuning does to a crop: RandAugment (arXiv 1909.13719) and random erasing (arXiv 1708.04896), as MAE's
fine-tuning: what timm calls "rand-m9-mstd0.5-inc1", and a rectangle of noise in a quarter of the images.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps


GREY_LEVELS = 255
# Of ImageNet, in units of 0...1: MAE erases with noise that is standard normal once normalised with these.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ERASED_AREA, ERASED_RATIO = (0.02, 1 / 3), (0.3, 1 / 0.3)

Fill = tuple[int, int, int]
# image, strength 0...1, sign (-1 or 1), and the colour of what comes in from outside -> image
Operation = Callable[[Image.Image, float, int, Fill], Image.Image]


def _affine(matrix_of: Callable[[float, Image.Image], tuple]) -> Operation:
    def transform(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
        matrix = matrix_of(sign * strength, image)
        return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC, fillcolor=fill)

    return transform


def _enhanced(kind: type) -> Operation:
    def enhance(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
        return kind(image).enhance(max(0.1, 1 + sign * 0.9 * strength))

    return enhance


def _rotate(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    return image.rotate(sign * 30 * strength, Image.Resampling.BICUBIC, fillcolor=fill)


def _posterize(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    dropped = 4 + int(4 * strength)  # bits; all of them at full strength, which ImageOps.posterize refuses
    return image.point([level >> dropped << dropped for level in range(256)] * 3)


def _solarize(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    return ImageOps.solarize(image, 256 - int(256 * strength))


def _solarize_add(image: Image.Image, strength: float, sign: int, fill: Fill) -> Image.Image:
    added = int(110 * strength)
    return image.point([min(255, level + added) if level < 128 else level for level in range(256)] * 3)


OPERATIONS: dict[str, Operation] = {
    "auto_contrast": lambda image, *_: ImageOps.autocontrast(image),
    "equalize": lambda image, *_: ImageOps.equalize(image),
    "invert": lambda image, *_: ImageOps.invert(image),
    "rotate": _rotate,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "colour": _enhanced(ImageEnhance.Color),
    "contrast": _enhanced(ImageEnhance.Contrast),
    "brightness": _enhanced(ImageEnhance.Brightness),
    "sharpness": _enhanced(ImageEnhance.Sharpness),
    "shear_x": _affine(lambda amount, image: (1, 0.3 * amount, 0, 0, 1, 0)),
    "shear_y": _affine(lambda amount, image: (1, 0, 0, 0.3 * amount, 1, 0)),
    "translate_x": _affine(lambda amount, image: (1, 0, 0.45 * amount * image.width, 0, 1, 0)),
    "translate_y": _affine(lambda amount, image: (1, 0, 0, 0, 1, 0.45 * amount * image.height)),
}
_BY_NUMBER = tuple(OPERATIONS.values())


@dataclass(frozen=True)
class RandAugment:
    """Two operations in a row, each drawn from the fifteen and done half of the time.

    Args:
        magnitude, deviation: of the normal distribution that the strength is drawn from, in 0...10, cut off there.
        fill: colour of what comes in from outside.
    """

    magnitude: float = 9.0
    deviation: float = 0.5
    fill: Fill = (128, 128, 128)

    def __call__(self, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """uint8 (3,H,W) -> uint8 (3,H,W)."""
        numbers, draws = generator.integers(len(_BY_NUMBER), size=2), generator.random((2, 2))
        strengths = np.clip(generator.normal(self.magnitude, self.deviation, 2) / 10, 0, 1)
        image = None
        for number, (chance, side), strength in zip(numbers, draws, strengths, strict=True):
            if chance < 0.5:
                if image is None:
                    image = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
                image = _BY_NUMBER[number](image, float(strength), 1 if side < 0.5 else -1, self.fill)
        return pixels if image is None else np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


@dataclass(frozen=True)
class RandomErasing:
    """Noise in place of a rectangle, in some of the images: for each value, with ImageNet's mean and deviation.

    Args:
        probability: share of the images.
    """

    probability: float = 0.25

    def __call__(self, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """uint8 (3,H,W) -> uint8 (3,H,W)."""
        if generator.random() >= self.probability:
            return pixels
        _, height, width = pixels.shape
        for _ in range(10):
            area = height * width * generator.uniform(*ERASED_AREA)
            ratio = math.exp(generator.uniform(*map(math.log, ERASED_RATIO)))
            rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if rows < height and columns < width:
                top, left = generator.integers(height - rows + 1), generator.integers(width - columns + 1)
                pixels = pixels.copy()
                pixels[:, top : top + rows, left : left + columns] = _noise(rows, columns, generator)
                break
        return pixels


def _noise(rows: int, columns: int, generator: np.random.Generator) -> np.ndarray:
    mean, std = (GREY_LEVELS * np.array(values, np.float32)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    noise = generator.standard_normal((3, rows, columns), dtype=np.float32)
    return np.clip(np.rint(mean + std * noise), 0, GREY_LEVELS).astype(np.uint8)


@dataclass(frozen=True)
class Augmentations:
    """One after the other, for [`labelled_loader`]; a function of the crop and the generator."""

    steps: tuple[Callable[[np.ndarray, np.random.Generator], np.ndarray], ...]

    def __call__(self, pixels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        for step in self.steps:
            pixels = step(pixels, generator)
        return pixels
