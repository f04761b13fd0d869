"""Images with a label map each: any set that `datasets` opens with a column of images and one of masks."""

import io
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from datasets import Array2D, Array3D, Dataset, IterableDataset, LargeList, List
from datasets import Image as ImageFeature
from PIL import ExifTags, Image
from torch.utils.data import DataLoader

from ..images import centre_box, resize_crop
from ..training.data import ImageSource, load_images
from ..training.sources import MAX_PIXELS, BadImageError, open_dataset
from ..training.workers import shield_from_signals


MASK_COLUMNS = ("mask", "annotation", "label", "labels", "label_map", "semantic_mask", "segmentation_mask", "semseg")
MASK_MODES = ("1", "L", "P", "I", "I;16")  # one number per pixel; a palette's index is the class
TURNS = {  # EXIF orientations, as `ImageOps.exif_transpose` applies them
    2: lambda mask: mask[:, ::-1],
    3: lambda mask: mask[::-1, ::-1],
    4: lambda mask: mask[::-1],
    5: lambda mask: mask.T,
    6: lambda mask: np.rot90(mask, -1),
    7: lambda mask: mask[::-1, ::-1].T,
    8: np.rot90,
}
IGNORED = -1
MOST_CLASSES = 1000


@dataclass(frozen=True)
class LabelMapSource:
    """Images of one split with their masks. [`load_label_maps`] makes it.

    Attributes:
        images: the images, as probes read them. masks: the rows of `mask_column`, nothing else.
        ignore_index: the number of pixels that belong to no class. reduce_labels: whether 0 is ignored too, and every
            other number stands for the class below it.
    """

    images: ImageSource
    masks: Dataset
    mask_column: str
    ignore_index: int = 255
    reduce_labels: bool = False

    @property
    def name(self) -> str:
        return self.images.name

    def __len__(self) -> int:
        return len(self.masks)

    def read(self, index: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        """The centre crop of an image, uint8 (C,size,size), and of its mask, int16 (size,size), -1 where ignored.

        The image is resized bicubically, the mask to the nearest pixel, both from the same square.

        Raises:
            BadImageError: the image or the mask cannot be used, or they do not fit each other.
        """
        row = self.images.dataset[index]
        data = self.images.file_bytes(row)
        image, _ = self.images.read(row | {self.images.image_column: {"bytes": data, "path": None}})
        mask, turned = read_mask(self.masks[index][self.mask_column], self.images.max_pixels)
        mask = as_shown(mask, image.size, 1 if turned else exif_orientation(Image.open(io.BytesIO(data))))
        box = centre_box(*image.size)
        nearest = Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST, box=box)
        return resize_crop(image, size, box), self.classes(np.asarray(nearest))

    def classes(self, mask: np.ndarray) -> np.ndarray:
        """Numbers of a mask to classes from 0 on, int16, -1 for what is ignored."""
        ignored = mask == self.ignore_index
        if self.reduce_labels:
            ignored, mask = ignored | (mask == 0), mask - 1
        classes = np.where(ignored, IGNORED, mask)
        low, high = classes.min(), classes.max()
        if low < IGNORED or high >= MOST_CLASSES:
            raise BadImageError(
                f"The mask holds the class {low if low < IGNORED else high}, but classes are 0 ... {MOST_CLASSES - 1}; "
                "is it a mask of instances, or is another number to be ignored?"
            )
        return classes.astype(np.int16)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        """Crop, classes and number of a row, or the reason why it cannot be used; for a data loader."""
        index, size = key
        try:
            pixels, classes = self.read(index, size)
        except BadImageError as error:
            return {"bad": f"row {index}: {error}"}
        return {"pixel_values": pixels, "classes": classes, "sample_ids": index}


def exif_orientation(picture: Image.Image) -> int:
    """How a picture is turned before it is shown, 2 ... 8, or 1 where it is not."""
    orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    return orientation if orientation in TURNS else 1


def as_shown(mask: np.ndarray, size: tuple[int, int], orientation: int) -> np.ndarray:
    """A mask as its image is shown, (H,W). It may have been drawn on the image as stored, before its EXIF orientation
    is applied, or on what a viewer shows; which of the two, its size tells where it can.

    Args:
        size: (width, height) of the image as shown. orientation: of the image's file, 1 if the mask needs no turn.

    Raises:
        BadImageError: the mask fits neither, or both alike.
    """
    (height, width), shown = mask.shape, f"{size[0]}x{size[1]}"
    stored = size[::-1] if orientation >= 5 else size
    if (width, height) not in (size, stored):
        also = "" if stored == size else f" (as stored {stored[0]}x{stored[1]})"
        raise BadImageError(f"The mask has {width}x{height} pixels, its image {shown}{also}.")
    if orientation == 1:
        return mask
    if stored == size:
        raise BadImageError(
            f"The image is turned by its EXIF orientation {orientation}, and its mask, which says nothing of the kind, "
            f"may belong to it before or after: both have {shown} pixels. Store the image turned and without the tag."
        )
    return mask if (width, height) == size else TURNS[orientation](mask)


def read_mask(value, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, bool]:
    """(H,W) int32 out of a row's mask, a picture's file with one number per pixel or an array; and whether an EXIF
    orientation of its own turned it.

    Raises:
        BadImageError: there is none, it cannot be read, is too large, or holds colours.
    """
    if value is None:
        raise BadImageError("The row has no mask.")
    if isinstance(value, dict):
        try:
            data = Path(value["path"]).read_bytes() if value["bytes"] is None else value["bytes"]
            picture = Image.open(io.BytesIO(data))
        except Exception as error:  # of a broken file Pillow's readers raise whatever it leads them to
            raise BadImageError(f"The mask is unreadable: {error}") from error
        if picture.mode not in MASK_MODES:
            raise BadImageError(f"The mask is a picture of mode {picture.mode}, not of one class number per pixel.")
        if picture.width * picture.height > max_pixels:
            raise BadImageError(f"The mask has too many pixels: {picture.width}x{picture.height}.")
        try:
            mask, orientation = np.asarray(picture).astype(np.int32), exif_orientation(picture)
        except Exception as error:
            raise BadImageError(f"The mask cannot be decoded: {error}") from error
        return (mask, False) if orientation == 1 else (TURNS[orientation](mask), True)
    try:
        mask = np.asarray(value)
    except ValueError as error:
        raise BadImageError("The mask's rows are not all of one length.") from error
    mask = mask.squeeze() if mask.ndim == 3 and 1 in (mask.shape[0], mask.shape[2]) else mask
    if mask.ndim != 2 or mask.dtype.kind not in "iub" or not mask.size:
        raise BadImageError(f"The mask is an array {mask.shape} of {mask.dtype}, not (height, width) of integers.")
    return mask.astype(np.int32), False


def load_label_maps(
    source,
    split: str = "train",
    *,
    config: str | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    ignore_index: int = 255,
    reduce_labels: bool = False,
) -> LabelMapSource:
    """Opens a segmentation set, wherever [`load_images`] finds one.

    Args:
        source, split, config: as for [`load_images`].
        image_column, mask_column: names; by default that of images is found as `load_images` finds it, and that of
            masks is the first that there is of mask, annotation, label, …, else the only other column of images.
        ignore_index, reduce_labels: as in [`LabelMapSource`]. In ADE20K 0 is what belongs to none of the 150 classes:
            its usual protocol reduces labels.

    Raises:
        ValueError: what `load_images` raises, a stream, or no column that can be the masks'.
    """
    name = str(source) if isinstance(source, str | Path) else "the data set"
    data = open_dataset(source, name, split, config)
    if isinstance(data, IterableDataset):
        raise ValueError(f"{name} is a stream, of which no training order can be made; download it first.")
    images = load_images(data, image_column=image_column)
    if mask_column is None:
        mask_column = _detect_masks(name, data, images.image_column)
    elif mask_column not in data.features:
        raise ValueError(f"There is no column {mask_column!r}: {name} has the columns {', '.join(data.features)}.")
    masks = data.with_format(None).select_columns([mask_column])
    if isinstance(masks.features[mask_column], ImageFeature):
        masks = masks.cast_column(mask_column, ImageFeature(decode=False))
    return LabelMapSource(replace(images, name=name), masks, mask_column, ignore_index, reduce_labels)


def _detect_masks(name: str, data: Dataset, image_column: str) -> str:
    others = {column: feature for column, feature in data.features.items() if column != image_column}
    pictures = [column for column, feature in others.items() if isinstance(feature, ImageFeature)]
    arrays = [column for column, feature in others.items() if isinstance(feature, Array2D | Array3D | List | LargeList)]
    named = [column for column in MASK_COLUMNS if column in (*pictures, *arrays)]
    if not named and len(pictures) != 1:
        raise ValueError(
            f"Which column of {name} holds the masks cannot be told; it has {', '.join(data.features)}. Name one."
        )
    return (named or pictures)[0]


def label_map_loader(source: LabelMapSource, size: int, batch_size: int, num_workers: int = 0) -> Iterator[dict]:
    """Centre crops with their label maps in order: batches of `pixel_values` (B,C,size,size) uint8, `classes`
    (B,size,size) int16, `sample_ids` (B,) int64, and `bad`, a list of reasons, one for each row that is left out.
    """
    return DataLoader(
        source,
        batch_size=batch_size,
        sampler=[(index, size) for index in range(len(source))],
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=shield_from_signals,
        generator=torch.Generator(),
    )


def _collate(rows: list[dict]) -> dict:
    good = [row for row in rows if "bad" not in row]
    batch = {"bad": [row["bad"] for row in rows if "bad" in row], "sample_ids": []}
    if good:
        batch |= {key: torch.from_numpy(np.stack([row[key] for row in good])) for key in good[0]}
    return batch
