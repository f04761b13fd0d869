"""What an evaluation is given, and what its result says of that: encoders, what lies beside their weights, images."""

from pathlib import Path

from transformers import PreTrainedModel
from transformers.utils import cached_file

from ..recipes.recipe import Recipe
from ..training.data import ImageSource, load_images
from .encoders import Encoder
from .encoders.timm_vit import PREFIX
from .features import Features


Source = str | Path | PreTrainedModel


def labelled(source: str | Path | ImageSource, split: str, **columns) -> ImageSource:
    """The images of a split, or those that are given.

    Args:
        columns: `image_column` and `label_column` of [`load_images`].

    Raises:
        ValueError: they have no labels, or what [`load_images`] raises.
    """
    source = source if isinstance(source, ImageSource) else load_images(source, split, **columns)
    if source.label_column is None:
        raise ValueError(f"{source.name} has no labels; name its label column, or another data set.")
    return source


def describe(source: ImageSource, features: Features) -> dict:
    """Which images the features are of, for a protocol."""
    return {
        "dataset": source.name,
        "split": source.dataset.split and str(source.dataset.split),
        "fingerprint": None if source.streaming else source.dataset._fingerprint,
        "images": len(features.labels),
        "bad_images": features.bad_images,
    }


def preprocessing(encoder: Encoder, crop_share: float) -> str:
    """How images become the encoder's input, for a protocol."""
    crop = "centre crop" if crop_share == 1 else f"centre crop, {crop_share} of its side"
    return f"{crop}, bicubic; mean {encoder.mean}, std {encoder.std}"


def data_of(recipes: list[Recipe | None]) -> tuple[str, str, str]:
    """The data set that the encoders' recipes name, and its training and test split.

    Raises:
        ValueError: they name none, or different ones.
    """
    keys = ("dataset", "train_split", "test_split")
    named = list(dict.fromkeys(tuple(recipe.data[key] for key in keys) for recipe in recipes if recipe is not None))
    if not named:
        raise ValueError("No data set is given, and no recipe.json beside the encoder names one; name a data set.")
    if len(named) > 1:
        shown = " and ".join(dataset for dataset, *_ in named)
        raise ValueError(f"No data set is given, and the encoders' recipes name different data ({shown}); name one.")
    return named[0]


def recipe_beside(source: Source) -> Recipe | None:
    """The recipe that an encoder was trained by, where it was trained with this package."""
    file = beside_weights(source, "recipe.json")
    return file and Recipe.load(file.parent)


def beside_weights(source: Source, name: str) -> Path | None:
    """A file that travels with the encoder's weights, if it does."""
    if isinstance(source, PreTrainedModel) or str(source).startswith(PREFIX):
        return None
    file = cached_file(source, name, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None
