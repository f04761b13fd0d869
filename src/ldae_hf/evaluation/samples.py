"""Many generated images in a folder, made by several processes and gone on with after whatever ended them.

An image is a function of the seed and its number (sample_noise.py), of its class, which is its number modulo their
count, and of the model: not of the shard that holds it, or of the process that made it (up to rounding, which moves a
few grey levels by one where batches differ).
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryFile

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from .. import __version__
from ..manifest import DamagedError, flush, write_text
from ..pipeline_ldae import LDAEPipeline
from ..progress import progress_bar
from ..scheduling_ldae import LDAEScheduler
from .sample_noise import noise_generators


FACTS = "samples.json"
SHARD_BYTES, SHARD_IMAGES = 2**24, 1000  # at most
SAMPLERS = {"ancestral": 1.0, "deterministic": 0.0}  # eta of the scheduler


@dataclass(frozen=True)
class Sampling:
    """How images are drawn.

    Attributes:
        sampler: "ancestral" (DDPM) or "deterministic" (DDIM). steps: levels of noise that are visited.
        guidance: of classifier-free guidance; 1 is none. seed: of all noise.
    """

    sampler: str = "ancestral"
    steps: int = 250
    guidance: float = 1.0
    seed: int = 0

    def check(self, pipeline: LDAEPipeline) -> None:
        """Raises ValueError unless the pipeline can draw images so."""
        if self.sampler not in SAMPLERS:
            raise ValueError(f"sampler={self.sampler!r} is not one of {', '.join(SAMPLERS)}.")
        if not isinstance(pipeline.scheduler, LDAEScheduler):
            raise ValueError(
                f"The samplers {' and '.join(SAMPLERS)} are LDAEScheduler's, but this pipeline has a "
                f"{type(pipeline.scheduler).__name__}; set pipeline.scheduler = "
                "LDAEScheduler.for_model(pipeline.model.config)."
            )
        pipeline.scheduler.set_timesteps(self.steps)  # raises
        if not 0 <= self.guidance < float("inf"):
            raise ValueError(f"guidance={self.guidance} must be 0 or more, and finite.")
        if self.guidance != 1 and pipeline.model.config.num_classes is None:
            raise ValueError(
                f"guidance={self.guidance} guides towards classes, and this model was trained without labels; leave it "
                "out."
            )

    def facts(self, pipeline: LDAEPipeline, model: str) -> dict:
        """All that the images are a function of, as JSON values. model: sha256 of the whole model."""
        num_classes, config = pipeline.model.config.num_classes, pipeline.scheduler.config
        settings = {key: value for key, value in config.items() if not key.startswith("_")}
        return {
            "model": model,
            "processor": pipeline.processor.fingerprint,
            "image_size": pipeline.processor.image_size,
            "dtype": str(pipeline.model.dtype).removeprefix("torch."),
            "scheduler": {"class": type(pipeline.scheduler).__name__} | settings,
            **asdict(self),
            "labels": None if num_classes is None else f"the sample's number modulo {num_classes}",
            "ldae-hf": __version__,
        }

    def labels(self, pipeline: LDAEPipeline, numbers: range) -> list[int] | None:
        """The classes of the images of these numbers, None for a model without."""
        num_classes = pipeline.model.config.num_classes
        return None if num_classes is None else [number % num_classes for number in numbers]

    def draw(self, pipeline: LDAEPipeline, numbers: range) -> torch.Tensor:
        """The images of these numbers, in one batch: uint8 (n,3,H,W) on the CPU."""
        images = pipeline(
            len(numbers),
            class_labels=self.labels(pipeline, numbers),
            guidance_scale=self.guidance,
            num_inference_steps=self.steps,
            eta=SAMPLERS[self.sampler],
            generator=noise_generators(self.seed, numbers),
            output_type="pt",
        ).images
        return to_uint8(images).cpu()


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Images in 0 ... 1, as a pipeline gives them, in grey levels."""
    return images.mul(255).round().to(torch.uint8)


class SampleStore:
    """A folder of images: `samples.json`, what they are a function of, and `shard-00000.safetensors`, … of `images`
    (n,3,H,W) uint8 and `labels` (n,) int64, -1 where there are none.

    Every shard carries the sha256 of its content, and is written aside and renamed.

    Args:
        facts: JSON values, as [`Sampling.facts`] has them. image_size: H and W.
        count: how many images are asked for. The folder may hold fewer, or more.
    """

    def __init__(self, folder: str | Path, facts: dict, image_size: int, count: int):
        if count < 1:
            raise ValueError(f"{count} samples are too few; ask for at least one.")
        self.folder, self.facts, self.count = Path(folder), facts, count
        self.shard_size = max(1, min(SHARD_IMAGES, SHARD_BYTES // (3 * image_size**2)))

    @property
    def num_shards(self) -> int:
        return -(-self.count // self.shard_size)

    def numbers(self, shard: int) -> range:
        """Of the images in a shard; the last one may hold fewer than the others."""
        first = shard * self.shard_size
        return range(first, min(first + self.shard_size, self.count))

    def file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.safetensors"

    def check(self) -> None:
        """Raises ValueError if the folder holds other samples than these, or may hold them."""
        try:
            held = json.loads((self.folder / FACTS).read_bytes())
        except NotADirectoryError as error:
            raise ValueError(f"{self.folder} is a file; samples need a folder.") from error
        except FileNotFoundError:
            if any(self.folder.glob("shard-*.safetensors")):
                raise ValueError(f"{self.folder} does not say what its samples are ({FACTS}); delete it.") from None
            return
        except ValueError:
            held = None
        if not isinstance(held, dict):
            raise ValueError(f"{self.folder / FACTS} is damaged; delete the folder.")
        for key in dict.fromkeys((*self.facts, *held)):
            if held.get(key) != self.facts.get(key):
                raise ValueError(
                    f"{self.folder} holds other samples: their {key} is {held.get(key)!r}, not "
                    f"{self.facts.get(key)!r}; name another folder, or delete this one."
                )

    def begin(self) -> None:
        """Makes the folder and says what it will hold; one that lacks nothing may be read-only.

        Raises:
            ValueError: samples are missing and cannot be written there.
        """
        if (self.folder / FACTS).exists() and all(self.file(shard).exists() for shard in range(self.num_shards)):
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / FACTS).exists():
                write_text(self.folder / FACTS, json.dumps(self.facts, indent=2, ensure_ascii=False) + "\n")
            with TemporaryFile(dir=self.folder):  # to try, hours before the first shard is written
                pass
        except OSError as error:
            reason = error.strerror or error
            raise ValueError(f"Samples cannot be written to {self.folder}: {reason}; name another folder.") from error

    def write(self, shard: int, images: torch.Tensor, labels: torch.Tensor) -> None:
        """Raises OSError, which names the file: the disk is full, or something else is wrong with it."""
        file = self.file(shard)
        aside = file.with_name(f".{file.name}.writing")
        tensors = {"images": images.contiguous(), "labels": labels}
        try:
            aside.write_bytes(save(tensors, metadata={"sha256": self._digest(shard, images, labels)}))
            flush(aside)
            aside.replace(file)
        except OSError as error:
            aside.unlink(missing_ok=True)
            raise OSError(error.errno, error.strerror, str(file)) from error  # of a full disk it names no file

    def read(self, shard: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """The images and labels of a shard, None if it is not there or was made for a smaller count.

        Raises:
            DamagedError: it is not as it was written.
            OSError: it is there and cannot be read.
        """
        file, wanted = self.file(shard), len(self.numbers(shard))
        if not file.exists():
            return None
        file.open("rb").close()  # safetensors names no file, and says of a forbidden one that it is not there
        try:
            with safe_open(file, "pt") as tensors:
                images, labels = tensors.get_tensor("images"), tensors.get_tensor("labels")
                intact = tensors.metadata()["sha256"] == self._digest(shard, images, labels)
        except (SafetensorError, KeyError, TypeError):  # TypeError: no metadata
            intact = False
        if not intact:
            raise DamagedError(f"{file} is damaged: its content is not the one that was written.")
        return (images[:wanted], labels[:wanted]) if len(images) >= wanted else None

    def _digest(self, shard: int, images: torch.Tensor, labels: torch.Tensor) -> str:
        digest = sha256(json.dumps([self.facts, shard], sort_keys=True).encode())
        for tensor in (images, labels):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        return digest.hexdigest()


class ShardedSamples:
    """Iterates over the shards of one process as (images, labels); what is missing, it makes and stores.

    Process r of w has the shards r, r + w, …

    Attributes:
        made: images that had to be generated. seconds: that this took.
    """

    def __init__(
        self,
        store: SampleStore,
        sampling: Sampling,
        pipeline: LDAEPipeline,
        *,
        batch_size: int = 64,
        process: int = 0,
        num_processes: int = 1,
        progress: bool = True,
    ):
        self.store, self.sampling, self.pipeline, self.batch_size = store, sampling, pipeline, batch_size
        self.shards = range(process, store.num_shards, num_processes)
        self.description = "samples" + (f" of process 1 of {num_processes}" if num_processes > 1 else "")
        self.progress, self.made, self.seconds = progress and process == 0, 0, 0.0

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        self.pipeline.set_progress_bar_config(disable=True)
        total = sum(len(self.store.numbers(shard)) for shard in self.shards)
        with progress_bar(total=total, desc=self.description, unit=" images", disable=not self.progress) as bar:
            for shard in self.shards:
                try:
                    found = self.store.read(shard)
                except DamagedError as error:
                    bar.write(f"warning: {error} It is made again.")
                    found = None
                if found is None:
                    found = self._make(shard, bar)
                else:
                    bar.update(len(found[0]))
                yield found

    def _make(self, shard: int, bar) -> tuple[torch.Tensor, torch.Tensor]:
        began, numbers, images = time.monotonic(), self.store.numbers(shard), []
        for start in range(0, len(numbers), self.batch_size):
            batch = numbers[start : start + self.batch_size]
            images.append(self.sampling.draw(self.pipeline, batch))
            bar.update(len(batch))
        labels = self.sampling.labels(self.pipeline, numbers)
        made = torch.cat(images), torch.tensor([-1] * len(numbers) if labels is None else labels)
        self.store.write(shard, *made)
        self.made += len(numbers)
        self.seconds += time.monotonic() - began
        return made
