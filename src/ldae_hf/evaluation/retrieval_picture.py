"""Queries and what retrieval finds for them, to look at."""

import torch
import torch.nn.functional as F
from PIL import Image

from ..images import centre_box, resize_crop
from ..training.data import ImageSource
from ..training.pictures import mosaic
from .features import Features
from .retrieval import same_images


QUERIES, NEIGHBOURS = 8, 8
RIGHT, WRONG = (0.1, 0.65, 0.2), (0.85, 0.15, 0.1)  # frames: green and red


def retrieval_picture(
    database: Features, queries: Features, database_images: ImageSource, query_images: ImageSource, size: int
) -> Image.Image:
    """A few queries, spread evenly over their set, with their nearest images of the database, the nearest first; the
    frame of each says whether it is of the query's class.

    Args:
        database, queries: features, and the images that they are of. size: pixels per side of the crops.
    """
    count = min(QUERIES, len(queries.labels))
    chosen = torch.arange(count) * len(queries.labels) // count
    similarities = F.normalize(queries.features[chosen]) @ F.normalize(database.features).T
    if same_images(database.features, queries.features):
        similarities[torch.arange(count), chosen] = -torch.inf
    nearest = similarities.topk(min(NEIGHBOURS, similarities.shape[1] - 1), dim=1).indices

    rows = []
    for query, neighbours in zip(chosen.tolist(), nearest, strict=True):
        label = int(queries.labels[query])
        name = query_images.label_names[label] if query_images.label_names else f"class {label}"
        shown = [crop(query_images, int(queries.sample_ids[query]), size)]
        for neighbour in neighbours.tolist():
            found = crop(database_images, int(database.sample_ids[neighbour]), size)
            shown.append(framed(found, RIGHT if int(database.labels[neighbour]) == label else WRONG))
        rows.append((name, torch.stack(shown)))
    return mosaic(rows, columns=["query", *map(str, range(1, nearest.shape[1] + 1))])


def crop(source: ImageSource, sample_id: int, size: int) -> torch.Tensor:
    """(3,size,size) in 0...1, the centre crop of a row."""
    image, _ = source.read(source.dataset[sample_id])
    return torch.from_numpy(resize_crop(image, size, centre_box(*image.size)).copy()) / 255


def framed(image: torch.Tensor, colour: tuple[float, float, float]) -> torch.Tensor:
    """The image with a border of this colour, a sixteenth of its side wide."""
    width = max(1, image.shape[-1] // 16)
    frame = torch.tensor(colour)[:, None, None].expand_as(image).clone()
    inside = (..., slice(width, -width), slice(width, -width))
    frame[inside] = image[inside]
    return frame
