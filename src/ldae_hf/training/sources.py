"""Any images that `datasets` can open, as one thing: rows of an image, which we decode ourselves, and a label."""

import glob
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import fsspec
from datasets import ClassLabel, Dataset, Features, IterableDataset, Value, load_dataset_builder, load_from_disk
from datasets import Image as ImageFeature
from datasets.exceptions import DatasetGenerationError
from PIL import Image

from ..images import IMAGE_COLUMNS, read_image
from .hub_access import patiently
from .quarantine import Quarantine, digest, leave_out
from .tar_files import tolerate_bad_members


LABEL_COLUMNS = ("label", "labels", "cls", "fine_label")
MAX_PIXELS = 89_478_485  # from here Pillow warns of a decompression bomb
MAX_TRIES = 100  # unreadable images in a row, before this is taken for a fault of the data set

_FILE_BUILDERS = {".parquet": "parquet", ".arrow": "arrow", ".tar": "webdataset"}
_BUILDERS = ("imagefolder", "parquet", "arrow", "webdataset")


class BadImageError(ValueError):
    """An image that cannot be used; the message is the reason."""


@dataclass(frozen=True)
class ImageSource:
    """Images of one split, with or without labels. [`load_images`] makes it.

    Attributes:
        name: for messages. dataset: the columns of image (as bytes or path) and label, nothing else.
        label_column: None if there are no labels; they read as -1 then. label_names: if the data set has them.
        num_images: None for a stream that does not say.
        max_pixels: larger images are unusable; judged by the header, before decoding.
        quarantine: images that are left out. A stream skips them; of other data sets `dataset` holds them no more, so
            that images are numbered without them.
    """

    name: str
    dataset: Dataset | IterableDataset
    image_column: str
    label_column: str | None
    label_names: list[str] | None
    num_images: int | None
    max_pixels: int = MAX_PIXELS
    quarantine: Quarantine | None = None

    @property
    def streaming(self) -> bool:
        return isinstance(self.dataset, IterableDataset)

    def __len__(self) -> int:
        if self.num_images is None:
            raise ValueError(f"{self.name} is a stream that does not say how many images it has; give num_images.")
        return self.num_images

    @property
    def num_classes(self) -> int:
        """Classes of the labels: as many as they have names, else one more than the largest.

        Raises:
            ValueError: there are no labels, some are missing or negative, or they are a stream's without names.
        """
        if self.label_names is not None:
            return len(self.label_names)
        if self.label_column is None or self.streaming:
            raise ValueError(f"{self.name} does not say how many classes it has; give it a column of ClassLabel.")
        labels = set(self.dataset[self.label_column])
        if None in labels or min(labels) < 0:
            raise ValueError(f"Some images of {self.name} have no label; leave them out.")
        return max(labels) + 1

    @property
    def left_out(self) -> dict | None:
        """What the quarantine file leaves out, for a run's identity: how many images, and a hash of them."""
        return self.quarantine and {"images": len(self.quarantine.rows), "sha256": self.quarantine.sha256}

    def file_bytes(self, row: dict) -> bytes:
        """The image file of a row, as it is.

        Raises:
            BadImageError: there is none.
        """
        return _image_bytes(row[self.image_column], self.name)

    def digest(self, row: dict) -> str:
        """By which an image is known again: a hash of its file, or of the file's name if it is missing."""
        try:
            return digest(self.file_bytes(row))
        except BadImageError:
            return digest(Path((row[self.image_column] or {}).get("path") or "").name.encode())

    def read(self, row: dict) -> tuple[Image.Image, int]:
        """RGB image and label (-1 if there is none) of a row of `dataset`.

        Raises:
            BadImageError: the image is missing, empty, unreadable, truncated or too large.
        """
        try:
            image = read_image(self.file_bytes(row), self.max_pixels)
        except BadImageError:
            raise
        except ValueError as error:
            raise BadImageError(str(error)) from error
        label = row[self.label_column] if self.label_column else None
        return image, -1 if label is None else label

    def read_or_replace(self, index: int) -> tuple[Image.Image, int, list[dict]]:
        """As `read`, for the image of a number; if it is bad, the next one that is not, and a list of the bad ones.

        Raises:
            ValueError: too many in a row are bad.
        """
        bad_images = []
        for candidate in range(index, index + min(self.num_images, MAX_TRIES)):
            number = candidate % self.num_images
            row = self.dataset[number]
            try:
                return *self.read(row), bad_images
            except BadImageError as error:
                bad_images.append(self.describe_bad(number, row, error))
        raise ValueError(
            f"{len(bad_images)} images in a row of {self.name}, from number {index} on, cannot be read; "
            f"the last one: {bad_images[-1]['reason']}"
        )

    def describe_bad(self, index: int | str, row: dict, error: BadImageError) -> dict:
        """A line for the list of bad images: `index` (in a stream "shard:row"), `path` if the row has one, `reason`."""
        path = (row[self.image_column] or {}).get("path")
        return {"index": index} | ({"path": path} if path else {}) | {"reason": str(error)}


def _image_bytes(value: dict | None, name: str) -> bytes:
    if value is None or (value["bytes"] is None and value["path"] is None):
        raise BadImageError("The row has no image.")
    if value["bytes"] is not None:
        return value["bytes"]

    def read() -> bytes:
        with fsspec.open(value["path"], "rb") as file:
            return file.read()

    # Only what is wrong with this one file; a network or a disk that fails is a fault of the run.
    try:
        return patiently(read, f"Reading {value['path']}", name)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise BadImageError(f"The file cannot be opened: {error.strerror or error}.") from error


def load_images(
    source: str | Path | Iterable[str | Path] | Dataset | IterableDataset | dict,
    split: str = "train",
    *,
    config: str | None = None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    data_dir: str | None = None,
    data_files: str | list | dict | None = None,
    num_images: int | None = None,
    max_pixels: int = MAX_PIXELS,
    quarantine: str | Path | None = None,
) -> ImageSource:
    """Opens a set of images, wherever `datasets` finds it. Local files are read without asking the network.

    If the Hub does not answer, this waits and tries again, for about six minutes.

    Args:
        source: a folder (of images, of Parquet, tar or Arrow files, or written by `save_to_disk`), given as it stands
            or inside $LDAE_DATA; one or several such files, or a pattern like `data/train-*.parquet`; a loaded
            `Dataset`, `IterableDataset` or a dictionary of them by split; the name of a builder (`imagefolder`,
            `parquet`, `arrow`, `webdataset`) with `data_dir` or `data_files`; else a name on the Hub.
        split: name of the split, `datasets`' slices (`train[:1000]`) included. Files given one by one, and a loaded
            data set, are the split.
        config: configuration of a data set on the Hub, or of a folder whose README.md has several.
        streaming: read a stream instead of preparing the data set on disk.
        image_column, label_column: names; by default the first that there is of image, jpg, jpeg, png, img, webp, and
            of label, labels, cls, fine_label if it holds integers.
        num_images: length of a stream, where it does not say or says it wrong, with what the quarantine leaves out.
        max_pixels: images with more are unusable.
        quarantine: a file of `ldae data check`; the images that it names are left out.

    Raises:
        ValueError: no such file, split or column, a column of the wrong type, no images, a data set of the Hub that is
            gated, private or missing (the message says how to get access), or the quarantine of another data set.
        ConnectionError: the Hub did not answer.
    """
    name = str(source) if isinstance(source, (str, Path)) else "the data set"
    data = open_dataset(source, name, split, config, streaming, data_dir, data_files)
    if isinstance(data, Dataset) and streaming:
        # Shards are the unit that processes and workers share.
        data = data.to_iterable_dataset(num_shards=max(1, min(64, len(data))))
    if data.features is None:
        raise ValueError(f"{name} is a stream of unknown columns; give its features when it is made.")
    image_column, label_column = _columns(name, data.features, image_column, label_column)
    label_feature = data.features[label_column] if label_column else None
    if isinstance(data, IterableDataset):
        splits = data.info.splits or {}
        if num_images is None and str(data.split) in splits:
            num_images = splits[str(data.split)].num_examples
    elif num_images is not None:
        raise ValueError(f"num_images is for streams, but {name} is no stream and has {len(data)} images.")
    else:
        num_images = len(data)
    if num_images == 0:
        raise ValueError(f"{name} has no images in its split {split!r}.")
    data = data.with_format(None).select_columns([image_column] + ([label_column] if label_column else []))
    source = ImageSource(
        name=name,
        dataset=data.cast_column(image_column, ImageFeature(decode=False)),
        image_column=image_column,
        label_column=label_column,
        label_names=label_feature.names if isinstance(label_feature, ClassLabel) else None,
        num_images=num_images,
        max_pixels=max_pixels,
    )
    return source if quarantine is None else leave_out(source, quarantine)


def open_dataset(source, name, split, config=None, streaming=False, data_dir=None, data_files=None):
    """All columns of what [`load_images`] opens; with its arguments."""
    if isinstance(source, (Dataset, IterableDataset)):
        return source
    if isinstance(source, dict):
        return _pick(source, name, split)
    if name in _BUILDERS and (data_dir or data_files):
        return _build(name, split, streaming, path=name, data_dir=data_dir, data_files=data_files)
    if not isinstance(source, (str, Path)) or glob.has_magic(name):
        files = sorted(glob.glob(name)) if isinstance(source, (str, Path)) else [str(file) for file in source]
        return _open_files(files, name, split, streaming)
    path = Path(name).expanduser()
    inside = Path(os.environ.get("LDAE_DATA") or ".") / path
    if not path.exists() and inside.exists():
        path = inside
    if path.is_file():
        return _open_files([str(path)], name, split, streaming)
    if (path / "dataset_dict.json").is_file():
        return _pick(load_from_disk(path), name, split)
    if (path / "state.json").is_file():
        return load_from_disk(path)
    if path.is_dir():
        return _build(name, split, streaming, path=str(path), name=config, data_dir=data_dir, data_files=data_files)
    # Names on the Hub are NAME or OWNER/NAME.
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.suffix in _FILE_BUILDERS:
        raise ValueError(f"There is no file or folder {name}.")
    return _build(name, split, streaming, path=name, name=config, data_dir=data_dir, data_files=data_files)


def _open_files(files: list[str], name: str, split: str, streaming: bool) -> Dataset | IterableDataset:
    if missing := [file for file in files if not os.path.isfile(file)] or ([] if files else [name]):
        raise ValueError(f"There is no file {missing[0]}.")
    builders = {_FILE_BUILDERS.get(Path(file).suffix) for file in files}
    if len(builders) > 1 or None in builders:
        raise ValueError(f"{name} must be files of one kind, {', '.join(_FILE_BUILDERS)}, or a folder of images.")
    return _build(name, split, streaming, path=builders.pop(), data_files={split.split("[")[0]: files})


def _build(title: str, split: str, streaming: bool, **arguments) -> Dataset | IterableDataset:
    def build() -> Dataset | IterableDataset:
        builder = load_dataset_builder(**arguments)
        _check_split(title, split, builder.config.data_files or builder.info.splits or {})
        tolerate_bad_members(builder)
        if streaming:
            return builder.as_streaming_dataset(split=split)
        builder.download_and_prepare()
        return builder.as_dataset(split=split)

    try:
        return patiently(build, f"Opening {title}", title)
    except DatasetGenerationError as error:
        raise ValueError(f"{title} cannot be prepared: {error.__cause__ or error}") from error


def _pick(splits: dict, name: str, split: str) -> Dataset | IterableDataset:
    _check_split(name, split, splits)
    if split in splits:
        return splits[split]
    raise ValueError(f"{name} is loaded already, so the split must be whole, not {split!r}.")


def _check_split(name: str, split: str, splits: Iterable[str]) -> None:
    for part in split.split("+"):
        if part.split("[")[0].strip() not in splits:
            raise ValueError(f"{name} has no split {split!r}; it has {', '.join(map(str, splits))}.")


def _columns(name: str, features: Features, image: str | None, label: str | None) -> tuple[str, str | None]:
    """Names of the image and label columns, the latter None if there is none."""
    there = f"{name} has the columns {', '.join(features)}"
    for column in (image, label):
        if column is not None and column not in features:
            raise ValueError(f"There is no column {column!r}: {there}.")
    of_images = [column for column, feature in features.items() if isinstance(feature, ImageFeature)]
    image = image or next((column for column in (*IMAGE_COLUMNS, *of_images[:1]) if column in features), None)
    if image is None:
        raise ValueError(f"No column is named as images are, {', '.join(IMAGE_COLUMNS)}: {there}; name one.")
    feature = features[image]
    as_bytes_or_path = isinstance(feature, Value) and feature.dtype in ("binary", "large_binary", "string")
    as_both = isinstance(feature, dict) and {"bytes", "path"} & set(feature)
    if not (isinstance(feature, ImageFeature) or as_bytes_or_path or as_both):
        raise ValueError(f"The column {image!r} of {name} holds no images but {feature}; name another one.")
    integers = [column for column, feature in features.items() if _holds_integers(feature)]
    if label is not None and label not in integers:
        raise ValueError(
            f"The label column {label!r} of {name} holds {features[label]}, not integers; "
            "convert it with `Dataset.class_encode_column`."
        )
    return image, label or next((column for column in LABEL_COLUMNS if column in integers), None)


def _holds_integers(feature) -> bool:
    return isinstance(feature, ClassLabel) or (isinstance(feature, Value) and "int" in feature.dtype)
