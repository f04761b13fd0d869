"""A feature extractor of one's own for the Fréchet distance: a small network that learns a data set's labels.

What a network sees in images is what a distance between its features measures. Inception learned ImageNet's classes;
where its weights are not at hand, or the images are nothing like ImageNet's, a network that has learned the classes of
these images sees what matters in them. Its numbers cannot be compared with those of another one.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch

from ..manifest import check_folder, write_folder
from ..progress import progress_bar
from .circumstances import circumstances
from .data import ImageSource, eval_loader, load_images, train_loader
from .perceptual import LABEL_FEATURES, LabelFeatures, check_labels, train_label_features


BATCH_SIZE = 64
CROPS = {"crop": "random_resized", "crop_scale": (0.6, 1.0), "flip": True}
TRAINING = "training.json"


def train_extractor(
    dataset,
    output_dir: str | Path,
    *,
    train_split: str = "train",
    test_split: str = "test",
    image_size: int = 32,
    epochs: int = 12,
    widths: tuple[int, ...] = (48, 96, 192),
    seed: int = 0,
    num_workers: int = 2,
    image_column: str | None = None,
    label_column: str | None = None,
    progress: bool = True,
) -> dict:
    """Trains `LabelFeatures` on mirrored and mildly cropped images, and measures it on centre crops of a test split.

    `output_dir` is written whole when all is done: the weights, `label_features.json`, and `training.json` with what is
    returned. A folder that is finished is not trained again.

    Args:
        dataset: what [`load_images`] opens, with labels.
        image_size: side of the crops in pixels. widths: channels of the stages; each but the first halves the sides.
        seed: of initialisation, order and crops. num_workers: processes that decode images.

    Returns:
        `test_top1` and `train_top1` in percent (the latter of the last epoch, while the weights still moved), the
        settings and figures of the training, and the circumstances: command, commit, machine.

    Raises:
        ValueError: no such data set, split or column, no labels or one that is no class, sides too small for the
            stages, or the folder is damaged, or holds something else or an extractor of other settings.
    """
    output_dir = Path(output_dir)
    settings = {
        "dataset": str(dataset) if isinstance(dataset, (str, Path)) else None,
        "train_split": train_split,
        "test_split": test_split,
        "image_size": image_size,
        "epochs": epochs,
        "widths": list(widths),
        "seed": seed,
        "image_column": image_column,
        "label_column": label_column,
    }
    if (finished := _finished(output_dir, settings)) is not None:
        print(f"the extractor in {output_dir} is finished and is not trained again")
        return finished
    if image_size < 2 ** (len(widths) - 1):
        raise ValueError(f"Images of {image_size} pixels cannot be halved between {len(widths)} stages; give fewer.")
    columns = {"image_column": image_column, "label_column": label_column}
    train, test = (load_images(dataset, split, **columns) for split in (train_split, test_split))
    num_classes = _num_classes(train, test)
    started = circumstances()  # now: the commit may be another one when the training is over
    batch_size = min(BATCH_SIZE, len(train))
    steps = len(train) // batch_size

    def loader_of_epoch(epoch: int) -> Iterator[dict]:
        return train_loader(
            train,
            image_size=image_size,
            num_timesteps=1,
            tokens_shape=(1, 1),
            global_batch_size=batch_size,
            micro_batch_size=batch_size,
            start_step=epoch * steps,
            num_steps=(epoch + 1) * steps,
            seed=seed,
            num_workers=num_workers,
            **CROPS,
        )

    network, figures = train_label_features(
        loader_of_epoch,
        num_classes,
        widths=tuple(widths),
        epochs=epochs,
        device="cuda" if torch.cuda.is_available() else "cpu",
        seed=seed,
        progress=progress,
    )
    measured = measure(network, test, image_size, num_workers, progress)
    facts = settings | {"batch_size": batch_size, "crops": CROPS} | measured | figures | started
    facts = json.loads(json.dumps(facts))  # as the file gives it back

    def write(folder: Path) -> None:
        network.save(folder)
        (folder / TRAINING).write_text(json.dumps(facts, indent=2) + "\n")

    write_folder(output_dir, write)
    return facts


@torch.no_grad()
def measure(
    network: LabelFeatures, source: ImageSource, image_size: int, num_workers: int = 0, progress: bool = True
) -> dict:
    """`test_top1`, the percentage of centre crops that get their own label, of `test_images` that can be read."""
    device = network.head.weight.device
    correct, seen = 0, 0
    batches = eval_loader(source, image_size, 256, num_workers)
    for batch in progress_bar(batches, desc=f"test on {source.name}", disable=not progress):
        labels, sample_ids = batch["labels"], batch["sample_ids"]
        bad_images = {bad["index"] for bad in batch["bad_images"]}
        good = torch.tensor([sample_id not in bad_images for sample_id in sample_ids.tolist()])
        predicted = network.logits(batch["pixel_values"].to(device, torch.float32) / 127.5 - 1).argmax(dim=1).cpu()
        correct, seen = correct + int((predicted == labels)[good].sum()), seen + int(good.sum())
    return {"test_top1": 100 * correct / seen, "test_images": seen}


def _num_classes(train: ImageSource, test: ImageSource) -> int:
    """Classes of the training split, which every label of both must be one of: some test splits hide theirs.

    Raises:
        ValueError: there are no labels, or one is missing or out of range.
    """
    for source in (train, test):
        if source.label_column is None:
            raise ValueError(
                f"The {'training' if source is train else 'test'} split of {source.name} has no labels; name their "
                "column with --label-column, or train the extractor on a labelled data set of like images."
            )
    num_classes = train.num_classes
    for source in (train, test):
        labels = torch.tensor([-1 if label is None else label for label in source.dataset[source.label_column]])
        check_labels(labels, torch.arange(len(labels)), num_classes)
    return num_classes


def _finished(folder: Path, settings: dict) -> dict | None:
    """The facts of the extractor in a folder, None if the folder is empty or not there. Raises ValueError otherwise."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / f"{LABEL_FEATURES}.json").is_file():
        raise ValueError(f"{folder} holds something else than an extractor; choose another --output-dir.")
    check_folder(folder, needed=(TRAINING,))
    facts = json.loads((folder / TRAINING).read_text())
    if differing := [key for key, value in settings.items() if facts.get(key) != value]:
        key = differing[0]
        raise ValueError(
            f"{folder} holds an extractor with {key}={facts.get(key)!r}, not {settings[key]!r}; choose another "
            "--output-dir, or delete it."
        )
    return facts
