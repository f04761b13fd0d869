"""Decoded, cropped images/s of one core from JPEGs in Parquet: `train_loader` against `datasets`' own decoding.

The images are made: coloured noise whose spectrum falls as a photograph's does, 500x375 pixels, JPEG of quality 90 with
4:2:0, 106 kB each, about the size of ImageNet's. They are kept in the folder for temporary files. "Per core" is per
second of processor time, this process and its workers together, so that other work on the machine hardly counts. A
round is one pass, the start of the workers included.

The first peer is what a user of `datasets` would write well: `Image()` decodes, a transform cuts, resizes and flips,
uint8 goes to the data loader; boxes and flips are given to it ready-made, and its pixels are checked to be ours. The
second one normalises to float32 on the way, as the examples of `transformers` do. Neither draws timesteps and noise, as
ours does. The parts of ours are measured alone, each on what the one before it has left; "transfer" is a worker that
stacks finished samples and hands them over.
"""

import resource
import statistics
import tempfile
from collections.abc import Callable, Iterable
from functools import partial
from io import BytesIO
from pathlib import Path

import datasets
import measure
import numpy as np
import torch
from PIL import Image, features
from torch.utils.data import DataLoader

from ldae_hf.images import centre_box, read_image, resize_crop
from ldae_hf.training.data import ImageSource, load_images, train_loader
from ldae_hf.training.sampling import (
    Corruption,
    Crop,
    SampleMaker,
    collate,
    epoch_order,
    random_generator,
    random_resized_box,
)


SIZE, TOKENS, TIMESTEPS = 256, (256, 32), 50
WIDTH, HEIGHT = 500, 375
CROPS = {"centre": Crop(SIZE), "random_resized": Crop(SIZE, "random_resized", (0.2, 1.0), flip=True)}
OURS, PEER, FLOAT = "ldae-hf train_loader", "datasets, uint8", "datasets, float32"


def photograph(random: np.random.Generator) -> bytes:
    """A JPEG with amplitudes 1/f^1.15: grey structure with some colour on it."""
    frequency = np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None])
    amplitude = np.maximum(frequency, 1 / WIDTH) ** -1.15

    def plane():
        spectrum = random.standard_normal(amplitude.shape) + 1j * random.standard_normal(amplitude.shape)
        values = np.fft.irfft2(spectrum * amplitude, (HEIGHT, WIDTH))
        return (values - values.mean()) / values.std()

    grey = 120 + 55 * plane()
    pixels = np.stack([grey + 18 * plane() for _ in range(3)], axis=-1)
    stream = BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(stream, "JPEG", quality=90, subsampling="4:2:0")
    return stream.getvalue()


def photographs(count: int) -> datasets.Dataset:
    """The data set, made on the first call."""
    folder = Path(tempfile.gettempdir(), "ldae-hf-benchmarks")
    file = folder / f"photographs-{count}.parquet"
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(0)
        columns = {
            "image": [{"bytes": photograph(random), "path": None} for _ in range(count)],
            "label": [number % 10 for number in range(count)],
        }
        kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(10))
        unfinished = file.with_suffix(".unfinished")
        datasets.Dataset.from_dict(columns, kinds).to_parquet(unfinished)
        unfinished.rename(file)
    return datasets.load_dataset("parquet", data_files={"train": str(file)}, split="train", cache_dir=str(folder))


# ----------------------------------------------------------------------------------------------------------- loaders


def ours(source: ImageSource, crop: Crop, num_workers: int, args) -> DataLoader:
    return train_loader(
        source,
        image_size=SIZE,
        num_timesteps=TIMESTEPS,
        tokens_shape=TOKENS,
        global_batch_size=args.batch,
        micro_batch_size=args.batch,
        num_steps=args.steps,
        crop=crop.mode,
        crop_scale=crop.scale,
        flip=crop.flip,
        num_workers=num_workers,
    )


def box_and_flip(crop: Crop, index: int) -> tuple[tuple[int, int, int, int], bool]:
    """What `crop` draws for an image in epoch 0."""
    generator = random_generator(crop.seed, "crop", 0, index)
    flip = generator.random() < 0.5 and crop.flip
    if crop.mode == "centre":
        return centre_box(WIDTH, HEIGHT), flip
    return random_resized_box(WIDTH, HEIGHT, crop.scale, generator), flip


def peer(images: datasets.Dataset, crop: Crop, as_float: bool, num_workers: int, args) -> DataLoader:
    drawn = [box_and_flip(crop, index) for index in range(len(images))]

    def pixels(image: Image.Image, index: int) -> torch.Tensor:
        box, flip = drawn[index]
        image = image.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)
        if flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1)
        return values.float().div_(255).sub_(0.5).div_(0.5) if as_float else values

    def transform(rows: dict) -> dict:
        return {"pixel_values": list(map(pixels, rows["image"], rows["index"])), "label": rows["label"]}

    indexed = images.add_column("index", list(range(len(images)))).with_transform(transform)
    order = epoch_order(0, 0, len(images))[: args.steps * args.batch].tolist()
    return DataLoader(indexed, batch_size=args.batch, sampler=order, num_workers=num_workers)


def loaders(images: datasets.Dataset, crop: Crop, args) -> dict[str, Callable[[int], DataLoader]]:
    """By name, what makes a loader with so many workers."""
    found = {OURS: partial(ours, load_images(images), crop, args=args)}
    found |= {name: partial(peer, images, crop, name == FLOAT, args=args) for name in (PEER, FLOAT)}
    first, other = (next(iter(found[name](0)))["pixel_values"] for name in (OURS, PEER))
    if not torch.equal(first, other):
        raise RuntimeError("The two do not give the same pixels, so that their times cannot be compared.")
    return found


def processor_seconds(run: Callable[[], object]) -> float:
    """What `run` takes of all cores, in this process and in those that it starts and ends."""

    def used() -> float:
        both = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        return sum(usage.ru_utime + usage.ru_stime for usage in both)

    before = used()
    run()
    return used() - before


def one_pass(make: Callable[[], Iterable]) -> float:
    """Processor seconds of a loader from its making to its end, when its workers are gone."""

    def read_all():
        for _ in make():
            pass

    return processor_seconds(read_all)


# ------------------------------------------------------------------------------------------------------------- parts


def parts(images: datasets.Dataset, crop: Crop, args) -> dict[str, Callable[[], float]]:
    """By name, what answers the processor seconds of one part of `train_loader` for all images of a pass."""
    source = load_images(images)
    keys = epoch_order(0, 0, len(images))[: args.batch].tolist()
    rows = [source.dataset[key] for key in keys]
    files = [row[source.image_column]["bytes"] for row in rows]
    decoded = [read_image(data) for data in files]
    boxes = [box_and_flip(crop, key)[0] for key in keys]
    make = SampleMaker(crop, Corruption(TIMESTEPS, TOKENS))
    samples = [make(image, 0, 0, key) | {"bad_images": []} for image, key in zip(decoded, keys, strict=True)]
    handed_over = partial(DataLoader, samples * args.steps, args.batch, num_workers=1, collate_fn=collate)

    def resize(image, box):
        image.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box)

    def each(run: Callable, *arguments: list) -> Callable[[], float]:
        def run_all():
            for _ in range(args.steps):
                for values in zip(*arguments, strict=True):
                    run(*values)

        return partial(processor_seconds, run_all)

    return {
        "row of the data set": each(source.dataset.__getitem__, keys),
        "Pillow's decoding alone": each(lambda data: Image.open(BytesIO(data)).load(), files),
        "read_image": each(read_image, files),
        "Pillow's resize alone": each(resize, decoded, boxes),
        "resize_crop": each(resize_crop, decoded, [SIZE] * args.batch, boxes),
        "the crop, with its draws": each(crop, decoded, [0] * args.batch, keys),
        "timestep and noise": each(make.corruption, [0] * args.batch, keys),
        "collate": each(collate, [samples]),
        "collate and transfer": partial(one_pass, handed_over),
    }


# ------------------------------------------------------------------------------------------------------------ report


def compare(name: str, images: datasets.Dataset, args) -> list[dict]:
    """One result per loader and number of workers, and one per part."""
    made, count = loaders(images, CROPS[name], args), args.steps * args.batch
    runs = {
        (loader, workers): partial(one_pass, partial(make, workers))
        for workers in args.workers
        for loader, make in made.items()
    }
    alone = parts(images, CROPS[name], args)
    times = measure.interleave(runs | {(part, None): run for part, run in alone.items()}, args.repeats)
    results = []
    for (what, workers), seconds in times.items():
        each = [second / count for second in seconds]
        result = {"crop": name, "workers": workers, "what": what, "seconds_per_image": each}
        if workers is None:
            result["share_of_ours"] = measure.ratio(seconds, times[OURS, args.workers[0]], 100)
        else:
            result["ours_over_this"] = measure.ratio(seconds, times[OURS, workers])
        results.append(result)
    return results


def row_of(result: dict) -> list[str]:
    each = result["seconds_per_image"]
    middle, least, most = (1e6 * function(each) for function in (statistics.median, min, max))
    return [
        result["crop"],
        "" if result["workers"] is None else str(result["workers"]),
        result["what"],
        f"{middle:.0f} ({least:.0f}–{most:.0f})",
        f"{1e6 / middle:.0f}",
        measure.spread(result["ours_over_this"]) if "ours_over_this" in result else "",
        measure.spread(result["share_of_ours"]) if "share_of_ours" in result else "",
    ]


def main():
    parser = measure.parser(__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=2000, help="images of the file")
    parser.add_argument("--batch", type=int, default=64, help="images per batch")
    parser.add_argument("--steps", type=int, default=16, help="batches of a pass")
    parser.add_argument("--crops", nargs="+", default=list(CROPS), choices=list(CROPS))
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2], help="processes that decode")
    args = parser.parse_args()
    if args.images < args.steps * args.batch:
        parser.error(f"a pass reads {args.steps * args.batch} images; give at least so many --images")
    torch.set_num_threads(1)
    images = photographs(args.images)

    results = [result for name in args.crops for result in compare(name, images, args)]
    columns = ["crop", "workers", "what", "µs per image", "images/s per core", "ldae-hf over this"]
    columns += [f"% of train_loader, {args.workers[0]} workers"]
    kilobytes = sum(len(row["image"]["bytes"]) for row in load_images(images).dataset.take(100)) / 100e3
    notes = [
        f"{args.images} made JPEGs of {WIDTH}x{HEIGHT}, {kilobytes:.0f} kB each, to {SIZE}x{SIZE}; "
        f"passes of {args.steps} batches of {args.batch}, {args.repeats} interleaved",
        f"datasets {datasets.__version__}, Pillow {features.version('pil')}, libjpeg-turbo "
        f"{features.version('libjpeg_turbo')}",
        "Medians (min–max over the rounds).",
    ]
    measure.report(args, columns, list(map(row_of, results)), results, notes)


if __name__ == "__main__":
    main()
