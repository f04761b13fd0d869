"""The whole line in four minutes on two CPU cores, without a download: images in, encoder out.

    make quickstart            (or: python examples/quickstart.py --seed 1)

Draws an image set from what comes with scikit-learn (its handwritten digits, on low-contrast crops of its two
photographs), fits the PCA, pre-trains l-DAE, probes the encoder against its floors, and paints what it learned. The
same functions train on ImageNet; only the recipe's tier and the data set differ.
"""

import os
import sys
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import typer
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from ldae_hf import LDAEForPreTraining, LDAEImageProcessor
from ldae_hf.evaluation.figures import denoising_figure, save_figure
from ldae_hf.evaluation.ledger import result_table
from ldae_hf.evaluation.tasks import run_knn, run_linear_probe
from ldae_hf.training import checkpoints, eval_loader, load_images, pretrain


def digits_on_photographs(digits: np.ndarray, photographs: list[Image.Image], count: int, seed: int):
    """`count` images of 32x32 pixels: a digit, large, black or white, on a low-contrast crop of a photograph."""
    random = np.random.default_rng(seed)
    for index in range(count):
        photograph = photographs[random.integers(len(photographs))]
        side = int(random.integers(48, 200))
        left, top = (int(random.integers(0, length - side)) for length in photograph.size)
        crop = photograph.resize((32, 32), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        background = 0.35 * np.asarray(crop, dtype=np.float32) + 0.65 * random.uniform(80, 175)
        size = int(random.integers(22, 31))
        digit = Image.fromarray((digits[index % len(digits)] * 255 / 16).astype(np.uint8))
        mask = Image.new("L", (32, 32))
        place = tuple(random.integers(0, 33 - size, 2).tolist())
        mask.paste(digit.resize((size, size), Image.Resampling.BICUBIC), place)
        alpha = np.asarray(mask, dtype=np.float32)[..., None] / 255
        ink = 255.0 * random.integers(2)
        yield index % len(digits), Image.fromarray((background * (1 - alpha) + ink * alpha).round().astype(np.uint8))


def make_images(folder: Path) -> None:
    """Writes train.parquet (8,000 images) and test.parquet (2,000), of different digits."""
    digits, photographs = load_digits(), [Image.fromarray(photograph) for photograph in load_sample_images().images]
    order = np.random.default_rng(0).permutation(len(digits.images))
    for split, chosen, count in (("train", order[:1400], 8000), ("test", order[1400:], 2000)):
        rows = {"image": [], "label": []}
        for source, image in digits_on_photographs(digits.images[chosen], photographs, count, seed=len(chosen)):
            stream = BytesIO()
            image.save(stream, "PNG")
            rows["image"].append({"bytes": stream.getvalue(), "path": None})
            rows["label"].append(int(digits.target[chosen[source]]))
        columns = {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(n) for n in range(10)])}
        datasets.Dataset.from_dict(rows, datasets.Features(columns)).to_parquet(folder / f"{split}.parquet")


def quickstart(output_dir: Path = Path("runs/quickstart"), seed: int = 0):
    """Draw images, pre-train l-DAE on them, probe the encoder, paint what it learned."""
    images = output_dir / "images"
    if not (images / "test.parquet").exists():
        images.mkdir(parents=True, exist_ok=True)
        make_images(images)

    run = output_dir / f"seed-{seed}"
    encoder = pretrain("l_dae", tier="quickstart", dataset=str(images), output_dir=run, seed=seed)
    options = dict(cache_dir=run / "features", seed=seed)
    probe = run_linear_probe(encoder, str(images), output=run / "probe.json", **options)
    neighbours = run_knn(encoder, str(images), output=run / "knn.json", **options)

    model = LDAEForPreTraining.from_pretrained(checkpoints(run / "checkpoints")[-1])
    processor = LDAEImageProcessor.from_pretrained(encoder)
    batch = next(iter(eval_loader(load_images(str(images), "test"), processor.image_size, batch_size=4)))
    picture = save_figure(denoising_figure(model, processor, batch["pixel_values"]), run / "denoising.png")

    load = f'import ldae_hf; from transformers import AutoModel; print(AutoModel.from_pretrained("{encoder}"))'
    typer.echo(f"""
linear probe on frozen features
{result_table(probe)}

20 nearest neighbours
{result_table(neighbours)}

picture   {picture}
encoder   {encoder}
load it   {os.path.relpath(sys.executable)} -c '{load}'
""")


if __name__ == "__main__":
    typer.run(quickstart)
