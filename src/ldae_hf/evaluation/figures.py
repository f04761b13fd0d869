"""Pictures of what a run learned."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import LearnedTokenizer
from ..modeling_ldae import LDAEForPreTraining
from ..patch_tokenizers import unpatchify
from ..training.tokenizers import tokenizer_folder


def denoising_figure(
    model: LDAEForPreTraining,
    processor: LDAEImageProcessor,
    pixels: torch.Tensor,
    path: str | Path,
    *,
    timesteps: tuple[int, ...] | None = None,
    num_filters: int = 16,
    seed: int = 0,
) -> Path:
    """Paints clean · noisy · denoised images at several noise levels, and the first PCA filters (Figures 4 and 8).

    Args:
        pixels: (n,C,H,W) uint8 crops, a few; one row each.
        path: the picture's file, `.png` or `.svg`.
        timesteps: noise levels; default about a quarter, a half and all of the levels that hold signal.
        num_filters: how many of the K directions are shown.
        seed: of the noise.

    Returns:
        `path`.
    """
    model.check_processor(processor)
    levels = int((model.ldae.schedule.gammas > 0).sum())
    timesteps = timesteps or tuple(sorted({(levels - 1) * part // 4 for part in (1, 2, 4)}))
    images = processor.normalize_pixels(pixels)
    was_training, generator = model.training, torch.Generator().manual_seed(seed)
    noise = torch.randn(len(images), processor.num_patches, processor.latent_dim, generator=generator)
    columns = [("clean", images)]
    with torch.inference_mode():
        model.eval()
        for timestep in timesteps:
            noisy, restored = model.denoise(images.to(model.device), timestep, noise)
            sigma = model.ldae.schedule.sigmas[timestep].item()
            columns += [(f"noisy, σ {sigma:.2f}", noisy.cpu()), ("denoised", restored.cpu())]
        model.train(was_training)

    rows = len(images)
    figure = Figure(
        figsize=(1.25 * len(columns), 1.25 * rows + 0.3 + 0.62 * -(-num_filters // 8)), layout="constrained"
    )
    FigureCanvasAgg(figure)
    upper, lower = figure.subfigures(2, 1, height_ratios=(1.25 * rows + 0.3, 0.62 * -(-num_filters // 8)))
    axes = upper.subplots(rows, len(columns), squeeze=False)
    for column, (title, pictures) in enumerate(columns):
        axes[0, column].set_title(title, fontsize=8)
        for row in range(rows):
            _show(axes[row, column], _to_unit(pictures[row], processor))
    filters = processor.components[: min(num_filters, processor.latent_dim)].float()
    filters = unpatchify(filters[:, None], processor.patch_size, (1, 1))
    grid = lower.subplots(-(-num_filters // 8), 8, squeeze=False).flatten()
    for axis in grid:
        axis.axis("off")
    for axis, weights in zip(grid, filters, strict=False):  # the last axes may stay empty
        _show(axis, 0.5 + weights / (2 * weights.abs().max()))
    patch = f"{processor.patch_size}x{processor.patch_size}"
    lower.suptitle(f"first {len(filters)} of {processor.latent_dim} PCA directions of {patch} patches", fontsize=8)
    return save_figure(figure, path)


def filters_figure(tokenizers: Sequence[str | Path], path: str | Path, *, num_filters: int = 8) -> Path:
    """Paints the first filters of patch-wise tokenizers, one row each, below the first PCA directions (Figure 4).

    A filter is a row of V (K,P) as an image of the patch's size, around grey. The order of a learned tokenizer's
    filters means nothing; they are shown by falling variance of their latents.

    Args:
        tokenizers: folders of tokenizer runs. path: the picture's file, `.png` or `.svg`.
        num_filters: how many of each, at most K.

    Returns:
        `path`.

    Raises:
        ValueError: a tokenizer is convolutional: it has no filters of the patch's size.
    """
    names = {"patch_ae": "AE", "patch_vae": "VAE"}
    rows = []
    for folder in map(tokenizer_folder, tokenizers):
        learned = LearnedTokenizer.from_pretrained(folder)
        if learned.tokenizer not in names:
            raise ValueError(f"{folder} holds a {learned.tokenizer}, which is not patch-wise and has no such filters.")
        if not rows:
            pca = LDAEImageProcessor.from_pretrained(folder.parent / "processor").components
            rows.append(("PCA", pca[: learned.latent_dim].float(), learned.patch_size))
        order = learned.buffers["explained_variance"].argsort(descending=True)
        rows.append((names[learned.tokenizer], learned.buffers["components"][order], learned.patch_size))
    columns = min(num_filters, min(len(filters) for _, filters, _ in rows))
    figure = Figure(figsize=(0.62 * columns + 0.5, 0.66 * len(rows)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (name, filters, patch_size) in zip(axes, rows, strict=True):
        pictures = unpatchify(filters[:columns, None], patch_size, (1, 1))
        for axis, weights in zip(row, pictures, strict=True):
            _show(axis, 0.5 + weights / (2 * weights.abs().max()))
        row[0].text(-0.15, 0.5, name, transform=row[0].transAxes, ha="right", va="center", fontsize=8)
    return save_figure(figure, path)


def save_figure(figure: Figure, path: str | Path) -> Path:
    """Writes a figure and the folders above it that are missing; text in an SVG stays text."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(path, dpi=160)
    return path


def _to_unit(image: torch.Tensor, processor: LDAEImageProcessor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (processor.image_mean, processor.image_std))
    return image * std + mean


def _show(axis, image: torch.Tensor) -> None:
    axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.axis("off")
