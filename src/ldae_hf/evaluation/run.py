"""From encoders and a data set to results: features, floors, a task on each, protocol, ledger."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ..training.circumstances import circumstances
from ..training.data import ImageSource
from .encoders import Encoder, PooledFeatures, open_encoder
from .features import FEATURE_CACHE, Features, extract
from .floors import FLOORS, build_floors
from .inputs import Source, beside_weights, data_of, describe, labelled, preprocessing, recipe_beside
from .ledger import append_to_ledger
from .rerun import rerun_command


# Training features and test features by the name of their map, and the device -> metrics, `protocol`, `seconds`.
Evaluate = Callable[[dict[str, Features], dict[str, Features], torch.device], dict]


def evaluate_encoders(
    task: str,
    evaluate: Evaluate,
    encoders: Source | Sequence[Source],
    dataset: str | Path | ImageSource | None = None,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    test_dataset: str | Path | ImageSource | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    processor=None,
    timestep: int | None = None,
    noise: str = "clean",
    layers: Sequence[int | str] = ("last",),
    pools: Sequence[str] = ("mean",),
    dtype: str = "float32",
    floors: Sequence[str] = FLOORS,
    seed: int = 0,
    image_size: int | None = None,
    crop_share: float = 1.0,
    batch_size: int = 256,
    num_workers: int = 2,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = FEATURE_CACHE,
    command: str | None = None,
    command_options: Mapping | None = None,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> list[dict]:
    """Features of both splits under each encoder and the floors beside it, and `evaluate` on them.

    Args:
        task: name of the results. evaluate: training features and test features, device -> metrics and protocol. An
            encoder's are named "{layer}/{pool}", a floor's "features".
        encoders: one or several, each what [`open_encoder`] opens.
        dataset: what [`load_images`] opens with `train_split` and `test_split`, or the training images themselves (then
            with `test_dataset`); by default the data set and the splits of the recipe beside the encoders.
        train_split, test_split: default `"train"` and `"test"`, or the recipe's where it names the data set.
        test_dataset: where the test images are, if not in `dataset`.
        image_column, label_column: as for [`load_images`]; detected by default.
        processor: as for [`open_encoder`], of a single encoder.
        timestep, noise, dtype, image_size: as for [`open_encoder`].
        layers, pools: every pair is a feature map, see [`PooledFeatures`].
        floors: names out of `FLOORS`; none with (). One that two encoders share is evaluated once.
        seed: of the floors and frozen noise.
        crop_share, batch_size, num_workers, device, cache_dir, progress: as for [`extract_features`].
        command, command_options: the command of `ldae` that does this, and the options that are the task's own, for
            `rerun`.
        output: a JSON file for the result, or for the list of several. ledger: a JSON-lines file that each is appended
            to.

    Returns:
        One row for each encoder, as plain JSON values: `task`, `name`, `dim` and what `evaluate` gave, the same for
        each of the `floors`, `protocol`, `rerun`, and the circumstances (time, command, commit, machine, versions).

    Raises:
        ValueError: from an encoder, the data set or the task; and before any work if the encoders' recipes name
            different data sets, or one processor is given for several encoders.
    """
    sources = [encoders] if isinstance(encoders, Source) else list(encoders)
    if not sources:
        raise ValueError("There is no encoder to evaluate; give at least one.")
    if processor is not None and len(sources) > 1:
        raise ValueError("One processor cannot be that of several encoders; leave it out, or give one encoder.")
    condition = dict(timestep=timestep, noise=noise, seed=seed, dtype=dtype, image_size=image_size)
    opened = [open_encoder(source, processor=processor, device=device, **condition) for source in sources]
    maps = [[PooledFeatures(encoder, layer, pool) for layer in layers for pool in pools] for encoder in opened]
    recipes = [recipe_beside(source) for source in sources]
    if dataset is None:
        dataset, *splits = data_of(recipes)
    else:
        splits = ["train", "test"]
    splits = [given or default for given, default in zip((train_split, test_split), splits, strict=True)]
    columns = dict(image_column=image_column, label_column=label_column)
    if isinstance(dataset, ImageSource) and test_dataset is None:
        raise ValueError("Images that are loaded already are one split; give those of the other as test_dataset.")
    images = [labelled(*pair, **columns) for pair in zip((dataset, test_dataset or dataset), splits, strict=True)]
    loading = dict(crop_share=crop_share, batch_size=batch_size, num_workers=num_workers)
    options = dict(dataset=dataset, train_split=splits[0], test_split=splits[1], **columns, processor=processor)
    options |= dict(layer=list(layers), pool=list(pools), noise=noise, dtype=dtype, floor=list(floors) or ["none"])
    options |= dict(seed=seed, **loading)

    rows, known_floors = [], {}
    for source, encoder, own_maps, recipe in zip(sources, opened, maps, recipes, strict=True):
        latent_dim = recipe and recipe.model["latent_dim"]
        shape = dict(latent_dim=latent_dim, layer=layers[-1], pool=pools[0], crop_share=crop_share, seed=seed)
        own_floors = {
            (floor.fingerprint, encoder.image_size): floor
            for floor in build_floors(floors, encoder, images[0], **shape)
        }
        new_floors = {key: floor for key, floor in own_floors.items() if key not in known_floors}
        groups = [{one.name: one for one in own_maps}, *({"features": floor} for floor in new_floors.values())]
        keeping = dict(cache_dir=cache_dir, progress=progress)
        (entry, *entries), described = _evaluate_groups(evaluate, groups, images, encoder, **loading, **keeping)
        known_floors |= zip(new_floors, entries, strict=True)
        protocol = {
            "features": _features_protocol(encoder, own_maps),
            "image_size": encoder.image_size,
            "preprocessing": preprocessing(encoder, crop_share),
            **described,
            "floors_seed": seed,
            task: entry.pop("protocol"),
        }
        training = beside_weights(source, "training.json")
        own = dict(timestep=encoder.facts["timestep"], image_size=encoder.image_size)
        again = None
        if command is not None and test_dataset is None:
            again = rerun_command(command, options | own | dict(command_options or {}), [source])
        row = {
            "recipe": recipe and recipe.name,
            "tier": recipe and recipe.tier,
            "overrides": recipe and recipe.overrides,
            "training": training and json.loads(training.read_text()),
            "task": task,
            "name": encoder.name,
            **entry,
            "floors": {floor.name: known_floors[key] for key, floor in own_floors.items()},
            "protocol": protocol,
            "rerun": again,
        }
        rows.append(append_to_ledger(row, ledger) if ledger else circumstances() | row)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows if len(rows) > 1 else rows[0], indent=2, ensure_ascii=False, allow_nan=False)
        Path(output).write_text(text + "\n", encoding="utf-8")
    return rows


def _evaluate_groups(
    evaluate: Evaluate, groups: list[dict], images: list[ImageSource], encoder: Encoder, **loading
) -> tuple[list[dict], dict]:
    """`evaluate` on the features of each group of maps, and what was read of both splits; the protocol, which is the
    same for all, stays in the first entry."""
    maps = [one for group in groups for one in group.values()]
    loading = dict(device=encoder.device, **loading)
    found = [dict(zip(maps, extract(maps, split, encoder.image_size, **loading), strict=True)) for split in images]
    entries = []
    for group in groups:
        train, test = ({name: features[one] for name, one in group.items()} for features in found)
        dim = next(iter(train.values())).features.shape[1]
        entries.append({"dim": dim} | evaluate(train, test, encoder.device))
    for entry in entries[1:]:
        entry.pop("protocol")
    read = zip(("train", "test"), images, found, strict=True)
    return entries, {name: describe(split, features[maps[0]]) for name, split, features in read}


def _features_protocol(encoder: Encoder, maps: list[PooledFeatures]) -> dict:
    """That of the only map, or of all of them, with lists of their layers and pools."""
    if len(maps) == 1:
        return maps[0].protocol
    return encoder.facts | {key: list(dict.fromkeys(one.protocol[key] for one in maps)) for key in ("layer", "pool")}
