"""From encoders and a segmentation set to results: tokens of the patches, floors, probe, protocol, ledger."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path

import torch

from ..patch_tokenizers import patchify
from ..progress import progress_bar
from ..training.circumstances import circumstances
from ..training.data import ImageSource
from .encoders import Encoder, open_encoder
from .floors import latents_of
from .inputs import Source, beside_weights, preprocessing, recipe_beside
from .label_maps import IGNORED, LabelMapSource, label_map_loader, load_label_maps
from .ledger import append_to_ledger
from .rerun import rerun_command
from .segmentation import LEARNING_RATES, majority_scores, segmentation_probe


SEGMENTATION_FLOORS = ("pixels", "latents", "untrained", "majority")
MEMORY = 4.0  # GB

TokenMap = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # uint8 crops (B,C,S,S), sample ids (B,) -> (B,N,D)


def run_segmentation(
    encoders: Source | Sequence[Source],
    dataset: str | Path,
    *,
    train_split: str = "train",
    test_split: str = "test",
    config: str | None = None,
    image_column: str | None = None,
    mask_column: str | None = None,
    ignore_index: int = 255,
    reduce_labels: bool = False,
    processor=None,
    layer: int | str = "last",
    timestep: int | None = None,
    noise: str = "clean",
    dtype: str = "float32",
    image_size: int | None = None,
    floors: Sequence[str] = SEGMENTATION_FLOORS,
    learning_rates: Sequence[float] = LEARNING_RATES,
    epochs: int = 30,
    probe_batch_size: int = 16,
    held_out: float = 0.1,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 2,
    memory: float = MEMORY,
    device: str | torch.device | None = None,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> list[dict]:
    """A linear segmentation probe on the patch tokens of encoders, and on the floors beside each.

    Args:
        encoders, processor, timestep, noise, dtype, image_size, device: as for [`evaluate_encoders`].
        dataset, config, image_column, mask_column, ignore_index, reduce_labels: as for [`load_label_maps`].
        layer: the block after which tokens are taken, after the final norm; a class token and registers are left out.
        floors: out of "pixels" (the values of the patch), "latents" (what the tokenizer or a PCA makes of the patch),
            "untrained" (the encoder with new weights), and "majority" (the most frequent class everywhere).
        learning_rates, epochs, held_out, seed: as in [`segmentation_probe`]. probe_batch_size: its `batch_size`.
        batch_size: images of a forward pass. num_workers: processes that decode images.
        memory: GB that tokens (float16) and label maps may take each; what is more lies in a temporary file.
        output: a JSON file for the result, or the list of several. ledger: a JSON-lines file that each is appended to.

    Returns:
        One row for each encoder, as plain JSON values: `mean_iou`, `pixel_accuracy`, … of [`segmentation_probe`], the
        same for each of the `floors`, `protocol`, `rerun`, and the circumstances.

    Raises:
        ValueError: from an encoder, the data set or the probe, or there is no such floor.
    """
    sources = [encoders] if isinstance(encoders, Source) else list(encoders)
    if unknown := [name for name in floors if name not in SEGMENTATION_FLOORS]:
        raise ValueError(f"There is no floor {unknown[0]!r}; the floors are {', '.join(SEGMENTATION_FLOORS)}.")
    if processor is not None and len(sources) > 1:
        raise ValueError("One processor cannot be that of several encoders; leave it out, or give one encoder.")
    condition = dict(timestep=timestep, noise=noise, seed=seed, dtype=dtype, image_size=image_size)
    opened = [open_encoder(source, processor=processor, device=device, **condition) for source in sources]
    data = dict(config=config, image_column=image_column, mask_column=mask_column)
    data |= dict(ignore_index=ignore_index, reduce_labels=reduce_labels)
    images = {split: load_label_maps(dataset, split, **data) for split in (train_split, test_split)}
    loading = dict(batch_size=batch_size, num_workers=num_workers, memory=memory, progress=progress)
    training = dict(learning_rates=tuple(learning_rates), epochs=epochs, batch_size=probe_batch_size, held_out=held_out)
    training |= dict(seed=seed, progress=progress)
    options = data | dict(dataset=dataset, train_split=train_split, test_split=test_split, layer=layer, noise=noise)
    options |= dict(processor=processor, dtype=dtype, floor=list(floors) or ["none"], epochs=epochs, seed=seed)
    options |= dict(learning_rate=list(learning_rates), batch_size=batch_size, num_workers=num_workers, memory=memory)

    rows = []
    for source, encoder in zip(sources, opened, strict=True):
        maps = {encoder.name: tokens_of(encoder, layer)} | floor_maps(
            floors, encoder, images[train_split].images, layer, seed
        )
        entries = {}
        for name, token_map in maps.items():
            found = [
                extract_tokens(token_map, split, encoder.image_size, device=encoder.device, name=name, **loading)
                for split in images.values()
            ]
            (train_tokens, train_maps, _), (test_tokens, test_maps, _) = found
            num_classes = 1 + max(int(train_maps.max()), int(test_maps.max()))
            tensors = (train_tokens, train_maps, test_tokens, test_maps)
            scores = segmentation_probe(*tensors, num_classes=num_classes, device=encoder.device, **training)
            entries[name] = {"dim": train_tokens.shape[-1]} | scores
        if "majority" in floors:
            entries["majority class"] = {"dim": 0} | majority_scores(train_maps, test_maps, num_classes)
        entry = entries.pop(encoder.name)
        described = zip(("train", "test"), images.items(), found, strict=True)
        protocol = {
            "features": encoder.facts | {"layer": layer, "pool": "none: tokens of the patches, kept in float16"},
            "image_size": encoder.image_size,
            "preprocessing": f"{preprocessing(encoder, 1.0)}; masks to the nearest pixel",
            **{name: _describe(split, one, *tokens) for name, (split, one), tokens in described},
            "floors_seed": seed,
            "segmentation_probe": entry.pop("protocol"),
        }
        for floor in entries.values():
            floor.pop("protocol", None)
        recipe, trained = recipe_beside(source), beside_weights(source, "training.json")
        own = dict(timestep=encoder.facts.get("timestep"), image_size=encoder.image_size)
        row = {
            "recipe": recipe and recipe.name,
            "tier": recipe and recipe.tier,
            "overrides": recipe and recipe.overrides,
            "training": trained and json.loads(trained.read_text()),
            "task": "segmentation_probe",
            "name": encoder.name,
            **entry,
            "floors": entries,
            "protocol": protocol,
            "rerun": rerun_command("segment", options | own, [source]),
        }
        rows.append(append_to_ledger(row, ledger) if ledger else circumstances() | row)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(rows if len(rows) > 1 else rows[0], indent=2, ensure_ascii=False, allow_nan=False)
        Path(output).write_text(text + "\n", encoding="utf-8")
    return rows


def tokens_of(encoder: Encoder, layer: int | str = "last") -> TokenMap:
    """An encoder's tokens of the patches after a block."""
    number = encoder.num_layers if layer == "last" else layer
    return lambda pixels, ids: encoder.tokens(pixels, ids, [number])[0][:, encoder.num_prefix_tokens :]


def floor_maps(
    floors: Sequence[str], encoder: Encoder, source: ImageSource, layer: int | str, seed: int
) -> dict[str, TokenMap]:
    """The floors of these names that are token maps, by what tables call them."""
    maps = {}
    if "pixels" in floors:
        maps["raw pixels"] = lambda pixels, ids: patchify(pixels.float() / 255, encoder.patch_size)
    if "latents" in floors:
        latents = latents_of(encoder, source, None, dict(image_size=encoder.image_size, seed=seed))
        num_patches = (encoder.image_size // encoder.patch_size) ** 2
        maps[latents.name] = lambda pixels, ids: latents(pixels, ids).unflatten(1, (num_patches, -1))
    if "untrained" in floors:
        maps["untrained encoder"] = tokens_of(encoder.untrained(seed), layer)
    return maps


@torch.no_grad()
def extract_tokens(
    token_map: TokenMap,
    source: LabelMapSource,
    image_size: int,
    *,
    device: str | torch.device = "cpu",
    batch_size: int = 64,
    num_workers: int = 2,
    memory: float = MEMORY,
    progress: bool = True,
    name: str = "",
) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Tokens (n,N,D) float16 and label maps (n,S,S) int16 of all rows that can be used, and why others cannot.

    Args:
        memory: GB beyond which each of the two goes to a file in the temporary folder, which ends with the process.

    Raises:
        ValueError: no row can be used, the tokens are not finite in float16, or they fit neither in memory nor on disk.
    """
    tokens, maps, done, bad = None, None, 0, []
    bar = progress_bar(total=len(source), desc=f"tokens of {name or source.name}", unit=" images", disable=not progress)
    for batch in label_map_loader(source, image_size, batch_size, num_workers):
        bad += batch["bad"]
        bar.update(len(batch["bad"]) + len(batch["sample_ids"]))
        if not len(batch["sample_ids"]):
            continue
        found = token_map(batch["pixel_values"].to(device, non_blocking=True), batch["sample_ids"]).half().cpu()
        if not torch.isfinite(found).all():
            raise ValueError(f"The tokens of {name} hold values that are not finite in float16; look at the encoder.")
        if tokens is None:
            tokens = _storage((len(source), *found.shape[1:]), torch.float16, memory)
            maps = _storage((len(source), image_size, image_size), torch.int16, memory)
        tokens[done : done + len(found)], maps[done : done + len(found)] = found, batch["classes"]
        done += len(found)
    bar.close()
    if not done:
        raise ValueError(f"No row of {source.name} can be used; the first: {bad[0]}")
    return tokens[:done], maps[:done], bad


def _storage(shape: tuple[int, ...], dtype: torch.dtype, memory: float) -> torch.Tensor:
    """An uninitialised tensor of two-byte values, in memory or, where that is too much, in a file without a name."""
    size = 2 * prod(shape)
    if size <= memory * 1e9:
        return torch.empty(shape, dtype=dtype)
    folder = Path(tempfile.gettempdir())
    if size > shutil.disk_usage(folder).free:
        raise ValueError(
            f"The tokens of {shape[0]} images take {size / 1e9:.1f} GB, more than the {memory:g} GB of memory that are "
            f"allowed, and than is free in {folder}. Take fewer images (train[:2000]), or set TMPDIR to a larger disk."
        )
    with tempfile.NamedTemporaryFile(dir=folder) as file:  # its name goes at once, its contents with the tensor
        return torch.from_file(file.name, shared=True, size=prod(shape), dtype=dtype).reshape(shape)


def _describe(split: str, source: LabelMapSource, tokens: torch.Tensor, maps: torch.Tensor, bad: list[str]) -> dict:
    if bad:
        warnings.warn(f"{len(bad)} rows of {source.name} {split} are left out; the first: {bad[0]}", stacklevel=2)
    return {
        "dataset": source.name,
        "split": split,
        "fingerprint": source.images.dataset._fingerprint,
        "mask_column": source.mask_column,
        "ignore_index": source.ignore_index,
        "reduce_labels": source.reduce_labels,
        "images": len(tokens),
        "bad_images": len(bad),
        "labelled_share": round((maps != IGNORED).double().mean().item(), 4),
    }
