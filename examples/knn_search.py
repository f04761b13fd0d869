"""Which images of a data set look most like this one, to an encoder: a search by example.

    python examples/knn_search.py cat.jpg --dataset cifar10 --split "train[:10000]"
    python examples/knn_search.py cat.jpg --dataset path/to/photographs

Prints the nearest images by the cosine of their features, and paints them after the query. The features of the data set
are computed once and kept; the next query takes seconds. Data sets are found in $LDAE_DATA, as a path or on the Hub.
"""

from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageOps

from ldae_hf.evaluation.encoders import load_ldae
from ldae_hf.evaluation.features import extract_features
from ldae_hf.evaluation.sample_pictures import image_grid
from ldae_hf.training import load_images


def search(
    image: Annotated[Path, typer.Argument(exists=True, dir_okay=False)],
    dataset: str = "cifar10",
    split: str = "train",
    encoder: str = "model_cards/ldae-cifar10",
    count: int = 24,
    output: Path = Path("neighbours.png"),
):
    """Print and paint the images of a data set that are nearest to an image."""
    source = load_images(dataset, split)
    index = extract_features(encoder, source)

    model, processor = load_ldae(encoder, device="cpu")
    query = Image.open(image).convert("RGB")
    with torch.no_grad():
        features = model(**processor(query, return_tensors="pt")).pooler_output  # (1, D)
    similarities = F.cosine_similarity(index.features, features)  # (n,)
    similarities, nearest = similarities.topk(min(count, len(similarities)))

    pictures = [query]
    for similarity, row in zip(similarities.tolist(), index.sample_ids[nearest].tolist(), strict=True):
        picture, label = source.read(source.dataset[row])
        name = source.label_names[label] if source.label_names and label >= 0 else ""
        typer.echo(f"{similarity:.3f}  number {row}  {name}".rstrip())
        pictures.append(picture)
    side = processor.image_size
    image_grid([ImageOps.fit(picture, (side, side)) for picture in pictures]).save(output)
    typer.echo(f"{output}: the query and its {len(pictures) - 1} nearest of {len(index.features)}, row by row")


if __name__ == "__main__":
    typer.run(search)
