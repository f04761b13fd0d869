"""Latents of the training images, encoded once: what a run reads in place of images that never change.

Only centre crops without flips stay the same from epoch to epoch. The folder's name is a hash of all that the tokens
depend on, the tokenizer's and the processor's fingerprints among them.
"""

import json
import os
import shutil
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..manifest import check_folder, write_folder
from ..modeling_ldae import LDAEForPreTraining
from ..progress import progress_bar
from .data import ImageSource, eval_loader
from .session import Session


BYTES_PER_FILE = 2**28
INDEX = "index.json"


def file_name(number: int) -> str:
    return f"tokens-{number:05d}.safetensors"


def parts_of(folder: Path) -> Path:
    """Where files are until all are there."""
    return folder.with_name(f".{folder.name}.parts")


class TokenCache:
    """(N,K) fp32 tokens and the label by image number, read from memory-mapped files. [`cache_tokens`] makes it.

    Attributes:
        bad_images: rows of images that could not be read, whose place another one took.
    """

    def __init__(self, folder: Path):
        index = json.loads((folder / INDEX).read_text())
        self.folder, self.num_images, self.bad_images = folder, index["num_images"], index["bad_images"]
        self.images_per_file = index["images_per_file"]
        self._files: dict[int, tuple] = {}

    def __len__(self) -> int:
        return self.num_images

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        number, row = divmod(index, self.images_per_file)
        if number not in self._files:
            file = safe_open(self.folder / file_name(number), "pt")
            self._files[number] = file.get_slice("tokens"), file.get_tensor("labels")
        tokens, labels = self._files[number]
        return tokens[row], int(labels[row])

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_files": {}}  # open files do not travel to a worker


def can_be_cached(config: LDAEConfig, data: dict) -> bool:
    """Whether images always are the same under a recipe's `data` section, and the target is latents."""
    is_still = data["crop"] == "centre" and not data["flip"]
    return is_still and "latent" in (config.input_space, config.prediction_target)


def check_cacheable(config: LDAEConfig, data: dict, source: ImageSource) -> None:
    """Raises ValueError unless the images of a recipe's `data` section can be replaced by latents."""
    if data["crop"] != "centre" or data["flip"]:
        raise ValueError(
            "Latents can be cached only where images never change: data.crop must be centre and data.flip false."
        )
    if config.input_space != "latent" and config.prediction_target != "latent":
        raise ValueError("Latents can be cached only where the target is latents, not the image itself.")
    if source.streaming:
        raise ValueError("Latents of a stream cannot be cached; read the data set without streaming.")


def cache_tokens(
    folder: Path,
    model: LDAEForPreTraining,
    processor: LDAEImageProcessor,
    source: ImageSource,
    session: Session,
    loading: dict,
) -> TokenCache:
    """Encodes every image of `source` with the model's tokenizer, unless `folder` holds the tokens already.

    Args:
        folder: where a folder named by its content's hash is made.
        loading: image size, crop, flip and workers, as for `train_loader`.

    Raises:
        DamagedError: the tokens that are there are damaged.
        Interrupted: by a signal; the files that are done are kept.
    """
    key = {
        "tokenizer": [model.config.tokenizer, model.config.latent_dim, model.config.latent_scaling],
        "fingerprints": [model.config.tokenizer_fingerprint, processor.fingerprint],
        "images": [source.dataset._fingerprint, source.max_pixels, loading["image_size"]],
    }
    folder = folder / sha256(json.dumps(key).encode()).hexdigest()[:16]
    already_there = (folder / INDEX).is_file()
    session.accelerator.wait_for_everyone()  # all have looked before the first one writes
    if not already_there:
        encode_all(folder, model, processor, source, session, loading)
    else:
        session.on_main(lambda: check_folder(folder, (INDEX,)))
        session.on_main(lambda: shutil.rmtree(parts_of(folder), ignore_errors=True))  # of a start that was killed
    return TokenCache(folder)


@torch.no_grad()
def encode_all(
    folder: Path,
    model: LDAEForPreTraining,
    processor: LDAEImageProcessor,
    source: ImageSource,
    session: Session,
    loading: dict,
) -> None:
    """Every process encodes its share of the files; those of an earlier attempt are kept."""
    accelerator = session.accelerator
    tokens_shape = (model.config.num_patches, model.config.latent_dim)
    images_per_file = max(1, BYTES_PER_FILE // (4 * tokens_shape[0] * tokens_shape[1]))
    numbers = range(-(-len(source) // images_per_file))
    parts = parts_of(folder)
    parts.mkdir(parents=True, exist_ok=True)

    def encode_share() -> None:
        bar = progress_bar(total=len(source), desc="latents", unit=" images", disable=not accelerator.is_main_process)
        with bar:
            for number in numbers[accelerator.process_index :: accelerator.num_processes]:
                rows = range(number * images_per_file, min((number + 1) * images_per_file, len(source)))
                if not (parts / file_name(number)).is_file():
                    encode_file(parts / file_name(number), rows)
                bar.update(len(rows) * accelerator.num_processes)

    def encode_file(target: Path, rows: range) -> None:
        images = replace(source, dataset=source.dataset.select(rows), num_images=len(rows))
        tokens, labels, bad_images = torch.empty(len(rows), *tokens_shape), [], []
        for batch in eval_loader(images, loading["image_size"], 64, loading["num_workers"]):
            pixels = processor.normalize_pixels(batch["pixel_values"].to(accelerator.device))
            done = sum(map(len, labels))
            tokens[done : done + len(pixels)] = model.ldae.tokenizer.encode(pixels)
            labels.append(batch["labels"])
            bad_images += [bad | {"index": bad["index"] + rows.start} for bad in batch["bad_images"]]
        aside = target.with_name(f".{target.name}")
        tensors = {"tokens": tokens, "labels": torch.cat(labels)}
        save_file(tensors, aside, metadata={"bad_images": json.dumps(bad_images)})
        aside.replace(target)

    def write(path: Path) -> None:
        bad_images = []
        for number in numbers:
            with safe_open(parts / file_name(number), "pt") as file:
                bad_images += json.loads(file.metadata()["bad_images"])
            os.link(parts / file_name(number), path / file_name(number))  # nothing is lost if this is killed
        index = {"num_images": len(source), "images_per_file": images_per_file, "bad_images": bad_images}
        (path / INDEX).write_text(json.dumps(index, indent=2))

    def join() -> None:
        write_folder(folder, write)
        shutil.rmtree(parts)

    session.together(encode_share, at_once=True)
    session.on_main(join)
