"""Nearest-neighbour retrieval, exact, by cosine: how well an encoder finds images of a query's class."""

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ..training.data import load_images
from .features import Features
from .run import Source, evaluate_encoders


SIMILARITIES = 2**24  # how many are held at once: 64 MB
RANKS = (1, 5, 10)


def run_retrieval(
    encoders: Source | Sequence[Source],
    dataset: str | Path | None = None,
    *,
    ranks: Sequence[int] = RANKS,
    picture: str | Path | None = None,
    **options,
) -> list[dict]:
    """Retrieval with the features of encoders, and of the floors beside each: the test images are the queries, the
    training images the database. With one split for both, each query is left out of its own ranking.

    Args:
        encoders, dataset, options: as for [`evaluate_encoders`]. ranks: as in [`retrieval`].
        picture: a file for some queries and their nearest images, as [`retrieval_picture`] paints them.

    Returns:
        One row for each encoder, as of [`evaluate_encoders`], with what [`retrieval`] gives.

    Raises:
        ValueError: from an encoder, the data set or the ranking, or a picture is asked for of several encoders.
    """
    encoders = [encoders] if isinstance(encoders, Source) else list(encoders)
    if picture is not None and len(encoders) > 1:
        raise ValueError("A picture shows what one encoder finds; give one encoder, or no picture.")
    kept = []

    def evaluate(train: dict[str, Features], test: dict[str, Features], device: torch.device) -> dict:
        [database], [queries] = train.values(), test.values()
        kept.append((database, queries))  # the encoder's first, its floors' after it
        found = (database.features, database.labels, queries.features, queries.labels)
        return retrieval(*found, ranks=ranks, device=device)

    words = dict(command="retrieve", command_options=dict(rank=list(ranks)))
    rows = evaluate_encoders("retrieval", evaluate, encoders, dataset, **words, **options)
    if picture is not None:
        from .retrieval_picture import retrieval_picture
        from .sample_pictures import save_picture  # needs diffusers

        columns = {key: options.get(key) for key in ("image_column", "label_column")}
        described = (rows[0]["protocol"][part] for part in ("train", "test"))
        sources = [
            load_images(dataset or part["dataset"], options.get(f"{name}_split") or part["split"] or name, **columns)
            for name, part in zip(("train", "test"), described, strict=True)
        ]
        save_picture(retrieval_picture(*kept[0], *sources, rows[0]["protocol"]["image_size"]), Path(picture))
    return rows


def retrieval(
    database: torch.Tensor,
    database_labels: torch.Tensor,
    queries: torch.Tensor,
    query_labels: torch.Tensor,
    *,
    ranks: Sequence[int] = RANKS,
    device: str | torch.device = "cpu",
) -> dict:
    """Ranks the images of a database by cosine to each query; those of the query's class are the relevant ones.

    Where queries and database are the same images, each query is left out of its own ranking. A query without a
    relevant image does not count.

    Args:
        database, queries: features (n,D) and (m,D). database_labels, query_labels: (n,) and (m,) classes.
        ranks: the k of recall and precision.
        device: where to compute; both sets of features are moved there.

    Returns:
        In percent, means over queries: `mean_average_precision` of the whole ranking (equal similarities share a rank,
        as in scikit-learn's `average_precision_score`); for each k `recall_at_k`, the share of queries with a relevant
        image among the k nearest, and `precision_at_k`, the share of relevant images among them. `queries` that
        counted, `queries_without_match`; the `protocol`; the `seconds` it took.

    Raises:
        ValueError: features and labels do not fit, no query has a relevant image, or a k is out of range.
    """
    began = time.monotonic()
    for name, features, labels in (("database", database, database_labels), ("query", queries, query_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1] or not len(labels):
            raise ValueError(
                f"The {name} features {tuple(features.shape)} and labels {tuple(labels.shape)} must be (n,D) and (n,)."
            )
        if not torch.isfinite(features).all():
            raise ValueError(f"The {name} features hold NaN or infinite values; look at the encoder that made them.")
        if labels.min() < 0:
            raise ValueError(f"The {name} set has samples without a label; name its label column, or another split.")
    same = same_images(database, queries)
    if not ranks or min(ranks) < 1 or max(ranks) > len(database) - same:
        raise ValueError(f"The ranks {list(ranks)} must lie in 1 ... {len(database) - same}, the images of a ranking.")
    database_labels, query_labels = database_labels.to(device), query_labels.to(device)
    precisions, hits = [], []
    for start, similarities in similarity_chunks(database, queries, same, device):
        relevant = database_labels == query_labels[start : start + len(similarities), None]
        if same:
            relevant.diagonal(start).fill_(False)
        precisions.append(average_precisions(similarities, relevant).cpu())
        hits.append(relevant.gather(1, similarities.topk(max(ranks), dim=1).indices).cpu())
    precisions, hits = torch.cat(precisions), torch.cat(hits)
    counted = ~precisions.isnan()
    if not counted.any():
        raise ValueError("No query has an image of its class in the database; take queries and database of one set.")
    hits = hits[counted].double()
    return {
        "mean_average_precision": 100 * precisions[counted].double().mean().item(),
        **{f"recall_at_{k}": 100 * hits[:, :k].amax(dim=1).mean().item() for k in ranks},
        **{f"precision_at_{k}": 100 * hits[:, :k].mean().item() for k in ranks},
        "queries": int(counted.sum()),
        "queries_without_match": int((~counted).sum()),
        "protocol": {
            "similarity": "cosine",
            "relevant": "same class",
            "ranking": "the whole database" + (" without the query itself" if same else ""),
            "ranks": list(ranks),
            "recall_at_k": "queries with a relevant image among the k nearest",
        },
        "seconds": round(time.monotonic() - began, 1),
    }


def same_images(database: torch.Tensor, queries: torch.Tensor) -> bool:
    """Whether two sets of features are those of the same images in the same order."""
    return database.shape == queries.shape and torch.equal(database, queries)


def similarity_chunks(database: torch.Tensor, queries: torch.Tensor, same: bool, device: str | torch.device):
    """For as many queries at once as fit: the number of the first, and cosines (m,n), -inf for the query itself."""
    database = F.normalize(database.to(device).float())
    chunk_size = max(1, SIMILARITIES // len(database))
    for start in range(0, len(queries), chunk_size):
        similarities = F.normalize(queries[start : start + chunk_size].to(device).float()) @ database.T
        if same:
            similarities.diagonal(start).fill_(-torch.inf)
        yield start, similarities


def average_precisions(similarities: torch.Tensor, relevant: torch.Tensor) -> torch.Tensor:
    """(m,) the mean of the precisions at the ranks of the relevant images; NaN for a query that has none.

    Args:
        similarities: (m,n). relevant: (m,n) bool.
    """
    results = []
    for all_costs, cost, is_relevant in zip(sorted_rows(-similarities), -similarities, relevant, strict=True):
        found = cost[is_relevant].sort().values
        # How many, of all and of the relevant ones, are at least as near: their quotient is the precision there.
        ranks, relevant_ranks = (torch.searchsorted(costs, found, right=True) for costs in (all_costs, found))
        results.append((relevant_ranks / ranks).mean())
    return torch.stack(results)


def sorted_rows(values: torch.Tensor) -> torch.Tensor:
    """Each row from low to high; on a CPU NumPy sorts values alone in a twentieth of torch's time."""
    if values.device.type == "cpu":
        return torch.from_numpy(np.sort(values.numpy(), axis=1))
    return values.sort(dim=1).values
