"""What a tokenizer keeps of an image: the error of encode and decode beside PCA's at the same K, and what its latents
tell of the labels (a linear probe on them).
"""

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import LearnedTokenizer
from ..patch_tokenizers import PatchPCA, Tokenizer, patchify
from ..progress import progress_bar
from ..training.circumstances import circumstances
from ..training.data import ImageSource, eval_loader, load_images
from ..training.run_tokenizer import tokenizer_folder
from .features import FEATURE_CACHE, extract
from .floors import TokenizerLatents
from .ledger import LEDGER, append_to_ledger, read_ledger
from .linear_probe import LEARNING_RATES, linear_probe


def run_reconstruction(
    tokenizer: str | Path,
    dataset: str | Path | ImageSource,
    *,
    processor: str | Path | None = None,
    train_split: str = "train",
    test_split: str = "test",
    probe: bool = False,
    learning_rates: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 2,
    device: str | torch.device | None = None,
    cache_dir: str | Path | None = FEATURE_CACHE,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
    progress: bool = True,
) -> dict:
    """Reconstruction of the test images' centre crops by a learned tokenizer, beside PCA at the same K.

    Args:
        tokenizer: the folder of a tokenizer run, or its `tokenizer/` (then with `processor`).
        dataset: what [`load_images`] opens, or the test images themselves (then without `probe`).
        processor: a folder; by default the one of the run.
        probe: also fit a linear probe on the flattened latents of the training images.
        learning_rates, seed: of the probe.
        output: a JSON file for the result. ledger: a JSON-lines file that it is appended to.

    Returns:
        The result as plain JSON values: `squared_error` (mean over pixels, of values in [-1, 1]), `psnr` (dB, against a
        range of 255 grey levels), the same of `pca`, and with `probe` `latents_top1` in percent.

    Raises:
        ValueError: from the tokenizer, the processor or the data set.
    """
    if probe and isinstance(dataset, ImageSource):
        raise ValueError("A probe needs the training images beside the test images; name the data set.")
    folder = tokenizer_folder(tokenizer)
    learned = LearnedTokenizer.from_pretrained(folder)
    processor = LDAEImageProcessor.from_pretrained(processor or folder.parent / "processor")
    same_basis = learned.processor_fingerprint in (None, processor.fingerprint)
    if not same_basis or learned.patch_size != processor.patch_size:
        raise ValueError(f"The tokenizer in {folder} goes with another processor than this one.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pca = PatchPCA(processor.patch_size, 3, learned.latent_dim, "global")
    pca.load_state_dict({name: value.float() for name, value in pca.fitted(*processor.basis).items()})
    # The scaling changes no reconstruction, but the cached latents are kept under the processor's.
    modules = {"learned": learned.module(processor.latent_scaling).to(device), "pca": pca.to(device)}
    source = dataset if isinstance(dataset, ImageSource) else load_images(dataset, test_split)
    errors, images, bad = reconstruction_errors(modules, source, processor, device, batch_size, num_workers, progress)
    row = {
        "recipe": learned.training.get("recipe"),
        "tier": learned.training.get("tier"),
        "overrides": learned.training.get("overrides"),
        "training": learned.training,
        "task": "reconstruction",
        "name": str(tokenizer),
        "tokenizer": learned.tokenizer,
        "latent_dim": learned.latent_dim,
        **figures(errors["learned"]),
        "pca": figures(errors["pca"]),
        "protocol": {
            "tokenizer": learned.fingerprint,
            "processor": processor.fingerprint,
            "image_size": processor.image_size,
            "test": {"dataset": source.name, "split": test_split, "images": images, "bad_images": bad},
        },
    }
    if probe:
        latents = TokenizerLatents(modules["learned"], processor, learned.tokenizer, learned.fingerprint)
        options = dict(device=device, batch_size=batch_size, num_workers=num_workers, cache_dir=cache_dir)
        train, test = (
            extract([latents], load_images(dataset, split), processor.image_size, progress=progress, **options)[0]
            for split in (train_split, test_split)
        )
        tensors = (train.features, train.labels, test.features, test.labels)
        rates = tuple(learning_rates)
        found = linear_probe(*tensors, learning_rates=rates, seed=seed, device=device, progress=progress)
        row["latents_top1"] = found["top1"]
        row["protocol"] |= {"train": {"split": train_split, "images": len(train.labels)}, "probe": found["protocol"]}
    row = append_to_ledger(row, ledger) if ledger else circumstances() | row
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        Path(output).write_text(json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    return row


@torch.no_grad()
def reconstruction_errors(
    modules: dict[str, Tokenizer],
    source: ImageSource,
    processor: LDAEImageProcessor,
    device: torch.device,
    batch_size: int = 64,
    num_workers: int = 2,
    progress: bool = True,
) -> tuple[dict[str, float], int, int]:
    """Mean squared error of each tokenizer's decode(encode(x)), over pixels in [-1, 1]; images; unreadable images."""
    sums, images, bad_images = dict.fromkeys(modules, 0.0), 0, set()
    values = 3 * processor.image_size**2
    bar = progress_bar(total=source.num_images, desc="reconstruction", unit=" images", disable=not progress)
    for batch in eval_loader(source, processor.image_size, batch_size, num_workers):
        bad_images |= {bad["index"] for bad in batch["bad_images"]}
        good = torch.tensor([sample_id not in bad_images for sample_id in batch["sample_ids"].tolist()])
        bar.update(len(good))
        if not good.any():
            continue
        pixels = processor.normalize_pixels(batch["pixel_values"][good].to(device))
        patches = patchify(pixels, processor.patch_size)
        for name, module in modules.items():
            error = (patches - module.decode(module.encode(pixels))).double().square().sum().item()
            sums[name] += error / values
        images += len(pixels)
    bar.close()
    if not images:
        raise ValueError(f"No image of {source.name} can be read.")
    return {name: total / images for name, total in sums.items()}, images, len(bad_images)


def figures(squared_error: float) -> dict[str, float]:
    """The error and its peak signal-to-noise ratio; pixels in [-1, 1] have a range of 2."""
    psnr = 10 * torch.log10(torch.tensor(4 / squared_error, dtype=torch.float64)).item() if squared_error else None
    return {"squared_error": squared_error, "psnr": psnr}


def reconstruction_table(result: dict) -> str:
    """A result of `run_reconstruction` as plain text."""
    lines = [f"{'':24}{'squared error':>14}{'PSNR (dB)':>11}"]
    rows = {f"{result['tokenizer']}, K = {result['latent_dim']}": result, "PCA at the same K": result["pca"]}
    for name, row in rows.items():
        psnr = "-" if row["psnr"] is None else f"{row['psnr']:.2f}"
        lines.append(f"{name:24}{row['squared_error']:>14.5f}{psnr:>11}")
    if "latents_top1" in result:
        lines.append(f"linear probe on the latents: {result['latents_top1']:.1f} %")
    return "\n".join(lines)


def reconstruction_markdown(ledger: str | Path = LEDGER) -> str:
    """The newest result of each tokenizer in a ledger, as a markdown table in the order in which they were measured."""
    rows = {(row["tokenizer"], row["name"]): row for row in read_ledger(ledger) if row["task"] == "reconstruction"}
    lines = [
        "| tokenizer | K | squared error | PCA at the same K | linear probe on its latents |",
        "|---|---|---|---|---|",
    ]
    for row in rows.values():
        name = f"`{row['recipe']}` ({row['tier']})" if row["recipe"] else f"`{row['tokenizer']}`, {row['name']}"
        if perceptual := row["training"].get("perceptual_loss"):
            name += f", perceptual loss: {perceptual}"
        errors = f"{row['squared_error']:.4f} | {row['pca']['squared_error']:.4f}"
        probe = f"{row['latents_top1']:.1f}" if "latents_top1" in row else ""
        lines.append(f"| {name} | {row['latent_dim']} | {errors} | {probe} |")
    return "\n".join(lines)
