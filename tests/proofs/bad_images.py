"""Proof: among 10,000 images 1 % are bad, of thirteen kinds. `ldae data check` finds each with its kind, training
survives them, replaces and reports each unusable one, and the good ones keep their pixels; memory hardly grows.

    python tests/proofs/bad_images.py
"""

import io
import os
import tempfile
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import psutil
from PIL import Image

from ldae_hf.images import read_image
from ldae_hf.training.data import eval_loader, load_images, train_loader
from ldae_hf.training.data_check import LEFT_OUT, UNUSABLE, check_images
from ldae_hf.training.sampling import Crop


MAX_PIXELS = 1_000_000
BATCH = 20
GROWTH = 200  # MB


def picture(number: int, size: tuple[int, int] = (56, 48)) -> Image.Image:
    """A smooth image of its own."""
    colours = np.random.default_rng(number).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str = "JPEG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def large(number: int) -> Image.Image:
    """Whose file is long enough to be cut or overwritten in its middle."""
    noise = np.random.default_rng(number).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    return Image.fromarray(noise)


def truncated(number: int) -> bytes:
    file = encoded(large(number))
    return file[: len(file) // 2]


def corrupt(number: int) -> bytes:
    """A PNG whose compressed data is overwritten."""
    file = bytearray(encoded(large(number), "PNG"))
    place = file.index(b"IDAT") + 500
    file[place : place + 200] = bytes(200)
    return bytes(file)


def damaged(number: int) -> bytes:
    """A JPEG that decodes, but ends early: the lower part is grey."""
    file = encoded(large(number))
    return file[: len(file) // 2] + b"\xff\xd9"


# Kind -> the file of an image, None if there is none; a duplicate repeats an image that is not bad.
BAD_FILES = {
    "missing": lambda number: None,
    "empty": lambda number: b"",
    "unreadable": lambda number: b"<html>404 Not Found</html>",
    "truncated": truncated,
    "corrupt": corrupt,
    "oversized": lambda number: encoded(Image.new("1", (12_000, 12_000)), "PNG"),
    "values": lambda number: encoded(Image.new("F", (40, 40), 3.5 + number), "TIFF"),
    "damaged": damaged,
    "tiny": lambda number: encoded(picture(number, (31, 64))),
    "duplicate": lambda number: encoded(picture(0), quality=90),
    "mode": lambda number: encoded(picture(number).convert("CMYK")),
    "aspect": lambda number: encoded(picture(number, (290, 32))),
    "animated": lambda number: encoded(
        picture(number), "GIF", save_all=True, append_images=[picture(number + 1), picture(number + 2)]
    ),
}


def write_images(folder: Path, images: int) -> tuple[list[bytes | None], dict[int, str]]:
    """Writes a data set, each hundredth image bad: its files, and the kind of the bad ones by number."""
    kinds = list(BAD_FILES)
    bad = {number: kinds[i % len(kinds)] for i, number in enumerate(range(50, images, 100))}
    bomb = BAD_FILES["oversized"](0)  # made once; it takes time
    files = [
        (bomb if bad[i] == "oversized" else BAD_FILES[bad[i]](i)) if i in bad else encoded(picture(i), quality=90)
        for i in range(images)
    ]
    rows = {
        "image": [
            {"bytes": file, "path": f"{i:06d}.jpg"} if file is not None else None for i, file in enumerate(files)
        ],
        "label": list(range(images)),
    }
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(folder)
    return files, bad


class PeakMemory:
    """MB by which this process and its children grow within a `with` block; shared pages count once."""

    def __enter__(self):
        self.stop, self.peak, self.before = threading.Event(), 0.0, self._now()
        self.thread = threading.Thread(target=self._watch)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.grown = self.peak - self.before

    def _watch(self):
        while not self.stop.wait(0.1):
            self.peak = max(self.peak, self._now())

    @staticmethod
    def _now() -> float:
        this, total = psutil.Process(), 0.0
        for process in (this, *this.children(recursive=True)):
            try:
                total += process.memory_full_info().pss / 1e6
            except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                pass  # it has just ended
        return total


def epoch(source) -> list[dict]:
    settings = dict(image_size=16, num_timesteps=10, tokens_shape=(1, 1), global_batch_size=BATCH)
    return list(train_loader(source, micro_batch_size=BATCH, num_steps=len(source) // BATCH, num_workers=2, **settings))


def run(images: int = 10_000) -> dict:
    """Figures of the proof; `images` a multiple of 100. Claims that fail are in `failed`, a list of sentences."""
    failed = []

    def claim(holds: bool, sentence: str):
        if not holds:
            failed.append(sentence)

    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        files, bad = write_images(folder / "images", images)
        source = load_images(folder / "images", max_pixels=MAX_PIXELS)
        file = folder / "quarantine.jsonl"
        began = time.monotonic()
        with PeakMemory() as memory_of_check:
            report = check_images(source, file, num_workers=2)
        seconds = time.monotonic() - began
        found = {finding["index"]: finding["kind"] for finding in report.findings}
        claim(found == bad and len(report.findings) == len(bad), "every bad image is listed once, with its kind")
        claim(all(finding["reason"] for finding in report.findings), "every bad image has a reason")

        unusable = {number for number, kind in bad.items() if kind in UNUSABLE}
        reported, replaced, same = set(), 0, 0
        crop = Crop(16)
        with PeakMemory() as memory_of_epoch:
            batches = epoch(source)
        for batch in batches:
            reported |= {row["index"] for row in batch["bad_images"]}
            for number, pixels in zip(batch["sample_ids"].tolist(), batch["pixel_values"].numpy(), strict=True):
                used = number + 1 if number in unusable else number
                expected = crop(read_image(files[used]), 0, number)
                replaced += number in unusable and np.array_equal(pixels, expected)
                same += number not in unusable and np.array_equal(pixels, expected)
        claim(reported == unusable, "training reports every unusable image and no other")
        claim(replaced == len(unusable), "training replaces every unusable image by the next one")
        claim(same == images - len(unusable), "all other images have the pixels that they have alone")

        stream = load_images(folder / "images", streaming=True, max_pixels=MAX_PIXELS)
        streamed = list(eval_loader(stream, 16, BATCH))
        claim(
            sum(len(batch["bad_images"]) for batch in streamed) == len(unusable)
            and sum(len(batch["labels"]) for batch in streamed) == images - len(unusable),
            "a stream leaves out every unusable image, reports it, and shows all others",
        )

        clean = load_images(folder / "images", max_pixels=MAX_PIXELS, quarantine=file)
        left_out = {number for number, kind in bad.items() if kind in LEFT_OUT}
        labels = [label for batch in epoch(clean) for label in batch["labels"].tolist()]
        claim(
            len(clean) == images - len(left_out) and not set(labels) & left_out and len(set(labels)) == len(labels),
            "with the quarantine file an epoch holds the good images only",
        )
        claim(not any(batch["bad_images"] for batch in epoch(clean)), "with the quarantine file nothing is replaced")
    grown = max(memory_of_check.grown, memory_of_epoch.grown)
    claim(images > 10_000 or grown < GROWTH, f"memory grows by less than {GROWTH} MB")
    return {
        "images": images,
        "bad": len(bad),
        "kinds": len(set(bad.values())),
        "listed": len(found),
        "unusable": len(unusable),
        "reported": len(reported),
        "replaced": replaced,
        "same_pixels": same,
        "left_out": len(left_out),
        "check_mb": round(memory_of_check.grown, 1),
        "epoch_mb": round(memory_of_epoch.grown, 1),
        "check_seconds": round(seconds, 1),
        "failed": failed,
    }


def main() -> int:
    figures = run()
    print(
        "{images:,} images, {bad} bad of {kinds} kinds: {listed} listed by the check in {check_seconds} s; an epoch "
        "reported {reported} and replaced {replaced} of {unusable} unusable ones,\n{same_pixels:,} others had "
        "their own pixels; {left_out} left out with the quarantine file; memory grew by {check_mb} MB (check), "
        "{epoch_mb} MB (epoch).".format(**figures)
    )
    for sentence in figures["failed"]:
        print(f"FAILED: {sentence}")
    return bool(figures["failed"])


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    raise SystemExit(main())
