"""The labelled images that the probe trains and is tested on."""

from dataclasses import dataclass
from pathlib import Path

from ...recipes.recipe import Recipe
from ...training.data import ImageSource, load_images


@dataclass(frozen=True)
class ProbeImages:
    """train, test: with labels in 0...num_classes - 1. splits: their names."""

    train: ImageSource
    test: ImageSource
    splits: tuple[str, str]
    num_classes: int

    @classmethod
    def open(
        cls,
        dataset,
        recipe: Recipe | None,
        train_split: str | None = None,
        test_split: str | None = None,
        image_column: str | None = None,
        label_column: str | None = None,
    ) -> "ProbeImages":
        """Both splits of a data set, or of that of a recipe, whose splits are the default then.

        Raises:
            ValueError: there is no data set, or no label, or one that is no class of the training split.
        """
        named = {"train_split": "train", "test_split": "test"}
        if dataset is None:
            if recipe is None:
                raise ValueError(
                    "No data set is given, and no recipe.json beside the encoder names one; name a data set."
                )
            dataset, named = recipe.data["dataset"], recipe.data
        splits = (train_split or named["train_split"], test_split or named["test_split"])
        columns = dict(image_column=image_column, label_column=label_column)
        train, test = (load_images(dataset, split, **columns) for split in splits)
        for source in (train, test):
            if source.label_column is None:
                raise ValueError(f"{source.name} has no labels; name its label column, or another data set.")
        classes = range(train.num_classes)
        for source, split in zip((train, test), splits, strict=True):
            if outside := set(source.dataset[source.label_column]) - set(classes):
                raise ValueError(
                    f"The split {split!r} of {source.name} has the label {min(outside, key=str)}, but the classes are "
                    f"0...{classes[-1]}; leave those images out, or name another split."
                )
        return cls(train, test, splits, len(classes))

    def identity(self) -> dict[str, dict]:
        """By which a run knows its images again, whatever folder they are in."""
        found = zip(("train", "test"), (self.train, self.test), self.splits, strict=True)
        return {
            key: {
                "dataset": Path(source.name).name,
                "split": split,
                "images": len(source),
                "label_column": source.label_column,
                "classes": self.num_classes,
            }
            for key, source, split in found
        }

    def facts(self, bad_images: tuple[int, int] = (0, 0)) -> dict[str, dict]:
        """What a result says of `train` and `test`. bad_images: of either, which could not be read."""
        found = zip(("train", "test"), (self.train, self.test), bad_images, strict=True)
        return {
            name: {
                "dataset": source.name,
                "split": source.dataset.split and str(source.dataset.split),
                "fingerprint": source.dataset._fingerprint,  # `datasets` has no public name for it
                "images": len(source) - bad,
                "bad_images": bad,
            }
            for name, source, bad in found
        }
