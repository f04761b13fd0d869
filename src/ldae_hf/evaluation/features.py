"""Pooled features of a set of images: extracted once, in one pass for several feature maps, and cached."""

import os
from collections.abc import Iterable, Iterator, Sequence
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub.constants import HF_HOME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from .. import __version__
from ..progress import progress_bar
from ..training.data import ImageSource, eval_loader, load_images
from .encoders import PooledFeatures, open_encoder, pooled_together
from .feature_maps import FeatureMap


FEATURE_CACHE = Path(os.environ.get("LDAE_FEATURE_CACHE") or Path(HF_HOME, "ldae-hf", "features"))


class Features(NamedTuple):
    """`features` (n,D) float32, `labels` (n,) int64, -1 where there is none, `sample_ids` (n,) int64: the row numbers
    in the data set. Unreadable images are left out; `bad_images` counts them."""

    features: torch.Tensor
    labels: torch.Tensor
    sample_ids: torch.Tensor
    bad_images: int


def extract_features(
    encoder: str | Path | PreTrainedModel,
    source: str | Path | ImageSource,
    split: str = "train",
    *,
    layer: int | str = "last",
    pool: str = "mean",
    processor=None,
    timestep: int | None = None,
    noise: str = "clean",
    seed: int = 0,
    dtype: str = "float32",
    image_size: int | None = None,
    crop_share: float = 1.0,
    batch_size: int = 256,
    num_workers: int = 2,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = FEATURE_CACHE,
    progress: bool = True,
) -> Features:
    """The features of all images of a split, of their centre crops.

    Args:
        encoder, processor, timestep, noise, seed, dtype, image_size, device: as for [`open_encoder`].
        source: what [`load_images`] opens, or what it gave; `split` counts in the former case, slices
            (`"train[:1000]"`) included.
        layer, pool: as for [`PooledFeatures`].
        crop_share: the side of a crop as a share of the side of the largest centred square; 0.875 is usual elsewhere.
        batch_size: images of a forward pass. num_workers: processes that decode images.
        cache_dir: where features are kept; None keeps nothing. Features of streams are not kept.
        progress: show a progress bar.

    Raises:
        ValueError: from the encoder, the processor or the data set.
    """
    condition = dict(timestep=timestep, noise=noise, seed=seed, dtype=dtype, image_size=image_size)
    opened = open_encoder(encoder, processor=processor, device=device, **condition)
    if not isinstance(source, ImageSource):
        source = load_images(source, split)
    return extract(
        [PooledFeatures(opened, layer, pool)],
        source,
        opened.image_size,
        crop_share=crop_share,
        device=opened.device,
        batch_size=batch_size,
        num_workers=num_workers,
        cache_dir=cache_dir,
        progress=progress,
    )[0]


@torch.no_grad()
def extract(
    feature_maps: Iterable[FeatureMap],
    source: ImageSource,
    image_size: int,
    *,
    crop_share: float = 1.0,
    device: str | torch.device = "cpu",
    batch_size: int = 256,
    num_workers: int = 2,
    cache_dir: str | Path | None = FEATURE_CACHE,
    progress: bool = True,
) -> list[Features]:
    """The features of all images under several feature maps, with one pass over the images for those not in the cache,
    and one forward pass for all maps of one encoder.

    The features stay in memory: 4·n·D bytes each. The arguments are those of [`extract_features`].
    """
    feature_maps = list(feature_maps)
    files = [cache_file(cache_dir, feature_map, source, image_size, crop_share) for feature_map in feature_maps]
    results = [read_features(file) if file and file.exists() else None for file in files]
    missing = [index for index, result in enumerate(results) if result is None]
    if not missing:
        return results

    parts, labels, sample_ids, bad_images = [[] for _ in missing], [], [], set()
    bar = progress_bar(total=source.num_images, desc=f"features of {source.name}", unit=" images", disable=not progress)
    for batch in centre_crops(source, image_size, batch_size, num_workers, crop_share):
        bad_images |= {bad["index"] for bad in batch["bad_images"]}
        # The loader puts another image in the place of a bad one: that would count it twice.
        good = torch.tensor([sample_id not in bad_images for sample_id in batch["sample_ids"].tolist()])
        bar.update(len(good))
        if not good.any():
            continue
        pixels = batch["pixel_values"][good].to(device, non_blocking=True)
        labels.append(batch["labels"][good])
        sample_ids.append(batch["sample_ids"][good])
        found = _under_all([feature_maps[index] for index in missing], pixels, sample_ids[-1])
        for part, features in zip(parts, found, strict=True):
            part.append(features.float().cpu())
    bar.close()
    for part, index in zip(parts, missing, strict=True):
        results[index] = Features(torch.cat(part), torch.cat(labels), torch.cat(sample_ids), len(bad_images))
        if files[index]:
            write_features(files[index], results[index])
    return results


def _under_all(
    feature_maps: Sequence[FeatureMap], pixels: torch.Tensor, sample_ids: torch.Tensor
) -> list[torch.Tensor]:
    """The features of a batch under each map, those of one encoder together."""
    pooled = [feature_map for feature_map in feature_maps if isinstance(feature_map, PooledFeatures)]
    found = {}
    for encoder in {feature_map.encoder for feature_map in pooled}:
        maps = [feature_map for feature_map in pooled if feature_map.encoder is encoder]
        found |= zip(maps, pooled_together(maps, pixels, sample_ids), strict=True)
    return [found[one] if one in found else one(pixels, sample_ids) for one in feature_maps]


def centre_crops(
    source: ImageSource, image_size: int, batch_size: int, num_workers: int = 0, crop_share: float = 1.0
) -> Iterator[dict]:
    """Batches of [`eval_loader`], of which only the centre is kept where `crop_share` is less than 1.

    Raises:
        ValueError: the share is not in 0...1.
    """
    if not 0 < crop_share <= 1:
        raise ValueError(f"crop_share={crop_share} must be above 0 and at most 1.")
    resized = round(image_size / crop_share)
    start = (resized - image_size) // 2
    inside = slice(start, start + image_size)
    for batch in eval_loader(source, resized, batch_size, num_workers):
        yield batch | {"pixel_values": batch["pixel_values"][:, :, inside, inside]}


def cache_file(
    cache_dir: str | Path | None, feature_map: FeatureMap, source: ImageSource, image_size: int, crop_share: float = 1.0
) -> Path | None:
    """Where these features are kept; None if they are not."""
    if cache_dir is None or source.streaming:
        return None
    # `datasets` has no public name for it: a hash of the files and of all that was done to the rows since.
    images = f"{source.dataset._fingerprint} max_pixels={source.max_pixels} image_size={image_size}"
    if crop_share != 1:
        images += f" crop_share={crop_share}"
    key = f"ldae-hf {__version__} {feature_map.fingerprint} {images}"
    return Path(cache_dir) / f"{sha256(key.encode()).hexdigest()}.safetensors"


def write_features(file: Path, features: Features) -> None:
    """Written aside and renamed, so that a file in the cache is always a whole one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    tensors = features._asdict()
    save_file(tensors, aside, metadata={"bad_images": str(tensors.pop("bad_images"))})
    aside.replace(file)


def read_features(file: Path) -> Features:
    """The inverse of `write_features`.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        with safe_open(file, "pt") as tensors:
            values = {name: tensors.get_tensor(name) for name in tensors.keys()}
            return Features(**values, bad_images=int(tensors.metadata()["bad_images"]))
    except SafetensorError as error:
        raise ValueError(f"{file} in the cache of features is damaged ({error}); delete it.") from error
