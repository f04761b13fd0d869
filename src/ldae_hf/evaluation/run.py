"""From an encoder and a data set to a result: features, floors, probe or k-NN, protocol, ledger."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from transformers.utils import cached_file

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEPreTrainedModel
from ..recipes.recipe import Recipe
from ..training.circumstances import circumstances
from ..training.data import ImageSource, load_images
from .feature_maps import EncoderFeatures, load_encoder
from .features import FEATURE_CACHE, Features, extract
from .floors import FLOORS, build_floors
from .knn import knn
from .ledger import append_to_ledger
from .linear_probe import LEARNING_RATES, linear_probe


def run_linear_probe(
    encoder: str | Path | LDAEPreTrainedModel,
    dataset: str | Path | ImageSource | None = None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 90,
    probe_batch_size: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> dict:
    """Linear probe of an encoder and of the floors beside it, all under one protocol.

    Args:
        encoder: a folder, a name on the Hub, or a model (then with `processor`).
        dataset: what [`load_images`] opens with `train_split` and `test_split`, or the training images themselves (then
            with `test_dataset`); by default the data set and the splits of the recipe in the encoder's folder.
        learning_rates, epochs, held_out: as in [`linear_probe`]. probe_batch_size: its `batch_size`.
        seed: of the probe, the floors and frozen noise.
        progress: show progress bars.
        options: as for [`evaluate_encoder`].

    Returns:
        The result as plain JSON values: `task`, `name`, `dim`, `top1`, `best_top1`, … of [`linear_probe`], the same for
        each of the `floors`, `protocol`, and the circumstances (time, command, commit, machine, versions).

    Raises:
        ValueError: from the encoder, the processor, the data set or the probe.
    """

    def probe(train: Features, test: Features, device: torch.device) -> dict:
        return linear_probe(
            train.features,
            train.labels,
            test.features,
            test.labels,
            learning_rates=tuple(learning_rates),
            epochs=epochs,
            batch_size=probe_batch_size,
            held_out=held_out,
            seed=seed,
            device=device,
            progress=progress,
        )

    return evaluate_encoder("linear_probe", probe, encoder, dataset, seed=seed, progress=progress, **options)


def run_knn(
    encoder: str | Path | LDAEPreTrainedModel,
    dataset: str | Path | ImageSource | None = None,
    *,
    k: int = 20,
    temperature: float = 0.07,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> dict:
    """k-nearest-neighbour accuracy of an encoder and of the floors beside it; as [`run_linear_probe`].

    Args:
        k, temperature: as in [`knn`]. seed: of the floors and frozen noise. The others as for [`run_linear_probe`].
    """

    def classify(train: Features, test: Features, device: torch.device) -> dict:
        tensors = (train.features, train.labels, test.features, test.labels)
        return knn(*tensors, k=k, temperature=temperature, device=device)

    return evaluate_encoder("knn", classify, encoder, dataset, seed=seed, progress=progress, **options)


def evaluate_encoder(
    task: str,
    evaluate: Callable[[Features, Features, torch.device], dict],
    encoder: str | Path | LDAEPreTrainedModel,
    dataset: str | Path | ImageSource | None = None,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    test_dataset: str | Path | ImageSource | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    processor: str | Path | LDAEImageProcessor | None = None,
    timestep: int | None = None,
    noise: str = "clean",
    dtype: str = "float32",
    floors: Sequence[str] = FLOORS,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 2,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = FEATURE_CACHE,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Features of both splits under the encoder and the floors, and `evaluate` on each pair.

    Args:
        task: name of the result. evaluate: training features, test features, device -> metrics and protocol.
        encoder, dataset: as for [`run_linear_probe`].
        train_split, test_split: default `"train"` and `"test"`, or the recipe's where it names the data set.
        test_dataset: where the test images are, if not in `dataset`.
        image_column, label_column: as for [`load_images`]; detected by default.
        processor, timestep, noise, dtype, batch_size, num_workers, device, cache_dir: as for [`extract_features`].
        floors: names out of `FLOORS`; none with ().
        output: a JSON file for the result. ledger: a JSON-lines file that it is appended to.
    """
    model, processor = load_encoder(encoder, processor, device)
    recipe_file, training_file = (_beside_weights(encoder, name) for name in ("recipe.json", "training.json"))
    recipe = recipe_file and Recipe.load(recipe_file.parent)
    defaults = {"train_split": "train", "test_split": "test"}
    if dataset is None:
        if recipe is None:
            raise ValueError("No data set is given, and no recipe.json beside the encoder names one; name a data set.")
        dataset, defaults = recipe.data["dataset"], recipe.data
    train_split, test_split = train_split or defaults["train_split"], test_split or defaults["test_split"]
    columns = dict(image_column=image_column, label_column=label_column)
    train_source, test_source = (
        source if isinstance(source, ImageSource) else load_images(source, split, **columns)
        for source, split in ((dataset, train_split), (test_dataset or dataset, test_split))
    )
    for source in (train_source, test_source):
        if source.label_column is None:
            raise ValueError(f"{source.name} has no labels; name its label column, or another data set.")
    encoding = dict(timestep=timestep, noise=noise, dtype=dtype)
    encoder_map = EncoderFeatures(model, processor, seed=seed, **encoding)
    maps = [encoder_map, *build_floors(floors, model, processor, train_source, seed=seed, **encoding)]
    loading = dict(batch_size=batch_size, num_workers=num_workers, cache_dir=cache_dir, progress=progress)
    train, test = (
        extract(maps, source, processor.image_size, device=model.device, **loading)
        for source in (train_source, test_source)
    )

    entries = [
        {"dim": fitted.features.shape[1]} | evaluate(fitted, tested, model.device)
        for fitted, tested in zip(train, test, strict=True)
    ]
    protocol, *_ = [entry.pop("protocol") for entry in entries]  # all the same
    row = {
        "recipe": recipe and recipe.name,
        "tier": recipe and recipe.tier,
        "overrides": recipe and recipe.overrides,
        "training": training_file and json.loads(training_file.read_text()),
        "task": task,
        "name": str(encoder) if isinstance(encoder, str | Path) else encoder_map.name,
        **entries[0],
        "floors": {fmap.name: entry for fmap, entry in zip(maps[1:], entries[1:], strict=True)},
        "protocol": {
            "features": encoder_map.protocol,
            "image_size": processor.image_size,
            "preprocessing": f"centre crop, bicubic; mean {processor.image_mean}, std {processor.image_std}",
            "train": _describe(train_source, train[0]),
            "test": _describe(test_source, test[0]),
            "floors_seed": seed,
            task: protocol,
        },
    }
    row = append_to_ledger(row, ledger) if ledger else circumstances() | row
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return row


def _describe(source: ImageSource, features: Features) -> dict:
    return {
        "dataset": source.name,
        "split": source.dataset.split and str(source.dataset.split),
        "fingerprint": None if source.streaming else source.dataset._fingerprint,
        "images": len(features.labels),
        "bad_images": features.bad_images,
    }


def _beside_weights(encoder: str | Path | LDAEPreTrainedModel, name: str) -> Path | None:
    """A file that travels with the encoder's weights, if it does."""
    if isinstance(encoder, LDAEPreTrainedModel):
        return None
    file = cached_file(encoder, name, _raise_exceptions_for_missing_entries=False)
    return Path(file) if file else None
