"""Any image to 8-bit RGB, and the one way in which all of the package cuts and resizes it."""

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from transformers.image_utils import ChannelDimension, infer_channel_dimension_format


IMAGE_COLUMNS = ("image", "jpg", "jpeg", "png", "img", "webp")  # of a data set, the first that there is


def read_image(data: bytes, max_pixels: int = 89_478_485) -> Image.Image:
    """Decodes an image file to 8-bit RGB, after reading its size from the header: a 10 kB file can hold 265 MB.

    Args:
        data: the bytes of a file in any format that Pillow reads.
        max_pixels: refuse more than so many; the default is the size from which Pillow warns.

    Raises:
        ValueError: the bytes are empty, unreadable or truncated, or hold too many pixels; the message says which.
    """
    if not data:
        raise ValueError("The image file is empty.")
    try:
        image = Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ValueError(f"The image has too many pixels: {error}") from error
    # Pillow's readers raise whatever a broken file leads them to: OSError, SyntaxError, struct.error, ...
    except Exception as error:
        raise ValueError("The image file is unreadable: Pillow knows no such format.") from error
    if image.width * image.height > max_pixels:
        raise ValueError(f"The image has too many pixels: {image.width}x{image.height} is more than {max_pixels}.")
    try:
        image.load()
        return to_rgb(image)
    except Exception as error:
        raise ValueError(f"The image file cannot be decoded: {error}") from error


def to_rgb(
    image: Image.Image | np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None = None
) -> Image.Image:
    """The one way from any image to 8-bit RGB.

    EXIF orientation is applied; of an animation the first frame counts; alpha is laid over white; palettes, CMYK and
    other colour spaces are converted, ICC profiles ignored. 16-bit values, and PIL's 32-bit "I" which holds such, are
    divided by 257 and rounded; floats, PIL's "F" too, are taken as 0...1; other integers as 0...255.

    Args:
        image: PIL image, or array or tensor (H,W), (H,W,C) or (C,H,W) with 1, 3 or 4 channels.
        input_data_format: "channels_first" or "channels_last" for arrays; read off the shape by default.

    Raises:
        ValueError: the type or shape is none of these, or values are NaN or out of range.
    """
    if not isinstance(image, Image.Image):
        image = _image_from_array(image, input_data_format)
    if image.tell() != 0:
        image.seek(0)
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_to_uint8(np.asarray(image), 65535 if image.mode == "I" else 255))
    if image.mode in ("La", "RGBa"):
        image = image.convert(image.mode.upper())
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image if image.mode == "RGB" else image.convert("RGB")


def _image_from_array(image: np.ndarray | torch.Tensor, input_data_format: str | ChannelDimension | None):
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        # NumPy has no bfloat16.
        image = (image.float() if image.is_floating_point() else image).numpy()
    if not isinstance(image, np.ndarray):
        raise ValueError(f"An image must be a PIL image, an array, a tensor or bytes, not {type(image).__name__}.")
    if image.ndim == 2:
        image = image[..., None]
    elif image.ndim != 3 or not {1, 3, 4} & {image.shape[0], image.shape[2]}:
        raise ValueError(f"An array must be (H,W), (C,H,W) or (H,W,C) with 1, 3 or 4 channels, not {image.shape}.")
    elif ChannelDimension(input_data_format or infer_channel_dimension_format(image, (1, 3, 4))) == "channels_first":
        image = image.transpose(1, 2, 0)
    if image.size == 0 or image.shape[2] not in (1, 3, 4):
        raise ValueError(f"The image has {image.shape[0]}x{image.shape[1]} pixels and {image.shape[2]} channels.")
    return Image.fromarray(_to_uint8(image[..., 0] if image.shape[2] == 1 else image))


def _to_uint8(values: np.ndarray, largest_integer: int = 255) -> np.ndarray:
    kind, itemsize = values.dtype.kind, values.dtype.itemsize
    if values.dtype == np.uint8:
        return values
    if kind == "b":
        return values.astype(np.uint8) * 255
    if kind == "f":
        # Written so that NaN fails it too.
        if not np.all((values >= 0) & (values <= 1)):
            raise ValueError("A floating-point image must have values in 0...1 without NaN; rescale or clip it.")
        return np.rint(values * 255).astype(np.uint8)
    if kind not in "iu":
        raise ValueError(f"An image cannot have the dtype {values.dtype}; use uint8, or floats in 0...1.")
    if (kind, itemsize) == ("u", 2):
        largest_integer = 65535
    if values.min() < 0 or values.max() > largest_integer:
        raise ValueError(f"An image of dtype {values.dtype} must have values in 0...{largest_integer}; rescale it.")
    return (values if largest_integer == 255 else (values.astype(np.uint32) + 128) // 257).astype(np.uint8)


def centre_box(width: int, height: int) -> tuple[int, int, int, int]:
    """(left, upper, right, lower) of the largest centred square, in pixels."""
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


def resize_crop(image: Image.Image, size: int, box: tuple[float, float, float, float]) -> np.ndarray:
    """Cuts `box` out of an RGB image and resizes it, bicubic with antialias, in one step: uint8 (C,size,size)."""
    resized = image.resize((size, size), Image.Resampling.BICUBIC, box=box)
    # Plane by plane: an array of the whole image would have to be transposed, which takes longer than this.
    planes = bytearray().join(resized.tobytes("raw", band) for band in "RGB")
    return np.frombuffer(planes, dtype=np.uint8).reshape(3, size, size)


def flatten_images(images: Any) -> Iterator[Any]:
    """Single images from nested lists and from arrays (B,...) with four dimensions."""
    if isinstance(images, (list, tuple)):
        for image in images:
            yield from flatten_images(image)
    elif getattr(images, "ndim", 0) == 4:
        yield from images
    else:
        yield images


def open_image(image: Any) -> Any:
    """A PIL image, array or tensor from itself, from bytes, from {"bytes", "path"} or from a row of a dataset.

    Raises:
        ValueError: the bytes are no image, or no column of the row is named as images are.
        OSError: there is no such file.
    """
    if isinstance(image, Mapping):
        if "bytes" in image:
            data = image["bytes"]
            return read_image(Path(image["path"]).read_bytes() if data is None else data)
        column = next((name for name in IMAGE_COLUMNS if name in image), None)
        if column is None:
            raise ValueError(
                f"None of the columns {', '.join(image)} is named {', '.join(IMAGE_COLUMNS)}; rename the image column."
            )
        return open_image(image[column])
    return read_image(image) if isinstance(image, bytes) else image
