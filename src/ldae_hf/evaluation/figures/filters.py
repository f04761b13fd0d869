"""Figure 4: filters of patch-wise tokenizers, as small images."""

from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from ...patch_tokenizers import unpatchify
from .images import image_figure
from .sources import find_processor, find_tokenizer


NAMES = {"patch_ae": "AE", "patch_vae": "VAE"}
PER_ROW = 8  # of a PCA alone


def filters_figure(sources: Sequence[str | Path], num_filters: int = 8) -> Figure:
    """The first principal directions of patches, and below them, a row each, the filters of learned tokenizers.

    A filter is a row of V (K,P) as an image of the patch's size, around grey, with the largest of its values at the
    end of the range. PCA's come by falling variance; those of a learned tokenizer have no order, and are shown by
    falling variance of their latents.

    Args:
        sources: runs, checkpoints, tokenizers' runs, or folders of processors. The PCA is that of the first.
        num_filters: how many of each, at most K.

    Raises:
        ValueError: a tokenizer is convolutional, or of another patch than the first, or there is no PCA.
    """
    processor = find_processor(sources[0])
    rows = [("PCA", processor.components[: processor.latent_dim].float())]
    for source in sources:
        learned = find_tokenizer(source)
        if learned is None:
            continue
        if learned.patch_size != processor.patch_size:
            raise ValueError(
                f"{source} has patches of {learned.patch_size} pixels and {sources[0]} of {processor.patch_size}; "
                "draw them apart."
            )
        order = learned.buffers["explained_variance"].argsort(descending=True)
        rows.append((NAMES[learned.tokenizer], learned.buffers["components"][order]))
    count = min(num_filters, *(len(filters) for _, filters in rows))
    pictures = [[_as_image(row, processor.patch_size) for row in filters[:count]] for _, filters in rows]
    if len(rows) == 1:
        [filters] = pictures
        columns = min(PER_ROW, count)
        filters += [None] * (-count % columns)
        return image_figure([filters[start : start + columns] for start in range(0, len(filters), columns)])
    return image_figure(pictures, [str(number) for number in range(1, count + 1)], [name for name, _ in rows])


def _as_image(weights: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(P,) -> (C,patch_size,patch_size) in 0...1."""
    return 0.5 + unpatchify(weights[None, None], patch_size, (1, 1))[0] / (2 * weights.abs().max())
