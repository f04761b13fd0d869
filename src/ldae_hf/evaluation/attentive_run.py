"""From encoders and a data set to results of an attentive probe: tokens of the patches, floors, protocol, ledger."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..progress import progress_bar
from ..training.circumstances import circumstances
from ..training.data import ImageSource
from .attentive_probe import LEARNING_RATES, NUM_HEADS, attentive_probe
from .dense import MEMORY, TokenMap, _storage, floor_maps, tokens_of
from .encoders import open_encoder
from .features import Features, centre_crops
from .inputs import Source, beside_weights, data_of, describe, labelled, preprocessing, recipe_beside
from .ledger import append_to_ledger
from .rerun import rerun_command


TOKEN_FLOORS = ("pixels", "latents", "untrained")


def run_attentive_probe(
    encoders: Source | Sequence[Source],
    dataset: str | Path | ImageSource | None = None,
    *,
    train_split: str | None = None,
    test_split: str | None = None,
    test_dataset: str | Path | ImageSource | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    processor=None,
    layer: int | str = "last",
    timestep: int | None = None,
    noise: str = "clean",
    dtype: str = "float32",
    image_size: int | None = None,
    crop_share: float = 1.0,
    floors: Sequence[str] = TOKEN_FLOORS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    num_heads: int = NUM_HEADS,
    epochs: int = 20,
    probe_batch_size: int = 256,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 256,
    num_workers: int = 2,
    memory: float = MEMORY,
    device: str | torch.device | None = None,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> dict | list[dict]:
    """Attentive probe on the patch tokens of encoders, and on the floors beside each; as [`run_linear_probe`].

    Args:
        encoders, dataset, train_split, test_split, test_dataset, image_column, label_column, processor, timestep,
            noise, dtype, image_size, crop_share, device, output, ledger: as for [`evaluate_encoders`].
        layer: the block after which tokens are taken, after the final norm; a class token and registers are left out.
        floors: out of "pixels" (the values of each patch), "latents" (what the tokenizer or a PCA makes of them) and
            "untrained" (the encoder with new weights); others have no tokens.
        learning_rates, num_heads, epochs, held_out: as in [`attentive_probe`]. probe_batch_size: its `batch_size`.
        seed: of the probe, the floors and frozen noise.
        batch_size: images of a forward pass. num_workers: processes that decode images.
        memory: GB that the tokens of a split, 2·n·N·D bytes, may take; more lie in a temporary file.

    Raises:
        ValueError: from an encoder, the data set or the probe, or there is no such floor.
    """
    sources = [encoders] if isinstance(encoders, Source) else list(encoders)
    if unknown := [name for name in floors if name not in TOKEN_FLOORS]:
        raise ValueError(f"{unknown[0]!r} is no floor with tokens; those are {', '.join(TOKEN_FLOORS)}.")
    if processor is not None and len(sources) > 1:
        raise ValueError("One processor cannot be that of several encoders; leave it out, or give one encoder.")
    condition = dict(timestep=timestep, noise=noise, seed=seed, dtype=dtype, image_size=image_size)
    opened = [open_encoder(source, processor=processor, device=device, **condition) for source in sources]
    recipes = [recipe_beside(source) for source in sources]
    dataset, *splits = (dataset, "train", "test") if dataset is not None else data_of(recipes)
    splits = [given or default for given, default in zip((train_split, test_split), splits, strict=True)]
    columns = dict(image_column=image_column, label_column=label_column)
    images = [labelled(*pair, **columns) for pair in zip((dataset, test_dataset or dataset), splits, strict=True)]
    loading = dict(crop_share=crop_share, batch_size=batch_size, num_workers=num_workers, memory=memory)
    probing = dict(learning_rates=tuple(learning_rates), num_heads=num_heads, epochs=epochs, held_out=held_out)
    options = dict(dataset=dataset, train_split=splits[0], test_split=splits[1], **columns, processor=processor)
    options |= dict(
        layer=layer, noise=noise, dtype=dtype, floor=list(floors) or ["none"], learning_rate=list(learning_rates)
    )
    options |= dict(num_heads=num_heads, epochs=epochs, held_out=held_out, probe_batch_size=probe_batch_size)
    options |= dict(seed=seed, **loading)

    rows = []
    for source, encoder, recipe in zip(sources, opened, recipes, strict=True):
        maps = {encoder.name: tokens_of(encoder, layer)} | floor_maps(floors, encoder, images[0], layer, seed)
        entries = {}
        for name, token_map in maps.items():
            train, test = (
                extract_image_tokens(
                    token_map, split, encoder.image_size, device=encoder.device, name=name, progress=progress, **loading
                )
                for split in images
            )
            entries[name] = {"dim": train.features.shape[-1]} | attentive_probe(
                train.features,
                train.labels,
                test.features,
                test.labels,
                batch_size=probe_batch_size,
                seed=seed,
                device=encoder.device,
                progress=progress,
                **probing,
            )
        entry = entries.pop(encoder.name)
        for floor in entries.values():
            floor.pop("protocol")
        training = beside_weights(source, "training.json")
        own = dict(timestep=encoder.facts.get("timestep"), image_size=encoder.image_size)
        row = {
            "recipe": recipe and recipe.name,
            "tier": recipe and recipe.tier,
            "overrides": recipe and recipe.overrides,
            "training": training and json.loads(training.read_text()),
            "task": "attentive_probe",
            "name": encoder.name,
            **entry,
            "floors": entries,
            "protocol": {
                "features": encoder.facts | {"layer": layer, "pool": "none: tokens of the patches, kept in float16"},
                "image_size": encoder.image_size,
                "preprocessing": preprocessing(encoder, crop_share),
                "train": describe(images[0], train),
                "test": describe(images[1], test),
                "floors_seed": seed,
                "attentive_probe": entry.pop("protocol"),
            },
            "rerun": None if test_dataset else rerun_command("attentive-probe", options | own, [source]),
        }
        rows.append(append_to_ledger(row, ledger) if ledger else circumstances() | row)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows if len(rows) > 1 else rows[0], indent=2, ensure_ascii=False, allow_nan=False)
        Path(output).write_text(text + "\n", encoding="utf-8")
    return rows[0] if isinstance(encoders, Source) else rows


@torch.no_grad()
def extract_image_tokens(
    token_map: TokenMap,
    source: ImageSource,
    image_size: int,
    *,
    crop_share: float = 1.0,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    num_workers: int = 2,
    memory: float = MEMORY,
    progress: bool = True,
    name: str = "",
) -> Features:
    """Tokens (n,N,D) float16 of the centre crops of all images that can be read, in [`Features`].

    Args:
        memory: GB beyond which they go to a file in the temporary folder, which ends with the process.

    Raises:
        ValueError: tokens are not finite in float16, or fit neither in memory nor on disk.
    """
    tokens, labels, sample_ids, bad_images, done = None, [], [], set(), 0
    bar = progress_bar(total=len(source), desc=f"tokens of {name or source.name}", unit=" images", disable=not progress)
    for batch in centre_crops(source, image_size, batch_size, num_workers, crop_share):
        bad_images |= {bad["index"] for bad in batch["bad_images"]}
        # The loader puts another image in the place of a bad one: that would count it twice.
        good = torch.tensor([sample_id not in bad_images for sample_id in batch["sample_ids"].tolist()])
        bar.update(len(good))
        if not good.any():
            continue
        labels.append(batch["labels"][good])
        sample_ids.append(batch["sample_ids"][good])
        found = token_map(batch["pixel_values"][good].to(device, non_blocking=True), sample_ids[-1]).half().cpu()
        if not torch.isfinite(found).all():
            raise ValueError(f"The tokens of {name} hold values that are not finite in float16; look at the encoder.")
        if tokens is None:
            tokens = _storage((len(source), *found.shape[1:]), torch.float16, memory)
        tokens[done : done + len(found)] = found
        done += len(found)
    bar.close()
    if tokens is None:
        raise ValueError(f"No image of {source.name} can be read.")
    return Features(tokens[:done], torch.cat(labels), torch.cat(sample_ids), len(bad_images))
