"""The probes of pooled features, as commands run them: each over one encoder or several, beside their floors."""

from collections.abc import Sequence
from pathlib import Path

import torch

from ..training.data import ImageSource
from .features import Features
from .few_shot import FRACTIONS, few_shot
from .knn import VARIANTS, knn
from .linear_probe import LEARNING_RATES, linear_probe
from .run import Source, evaluate_encoders


Maps = dict[str, Features]
BATCH_NORMS = {"with": True, "without": False}  # how the command calls them


def run_linear_probe(
    encoders: Source | Sequence[Source],
    dataset: str | Path | ImageSource | None = None,
    *,
    learning_rates: Sequence[float] = LEARNING_RATES,
    batch_norm: Sequence[bool] = (True,),
    epochs: int = 90,
    probe_batch_size: int = 512,
    held_out: float = 0.1,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> dict | list[dict]:
    """Linear probe of encoders and of the floors beside them, all under one protocol.

    Args:
        encoders: one or several, each what [`open_encoder`] opens.
        dataset: what [`load_images`] opens with `train_split` and `test_split`, or the training images themselves (then
            with `test_dataset`); by default the data set and the splits of the recipe beside the encoders.
        learning_rates, batch_norm, epochs, held_out: as in [`linear_probe`], which selects one of them, and of the
            encoder's `layers` and `pools`, for each encoder and each floor. probe_batch_size: its `batch_size`.
        seed: of the probe, the floors and frozen noise.
        progress: show progress bars.
        options: as for [`evaluate_encoders`].

    Returns:
        The result as plain JSON values: `task`, `name`, `dim`, `top1`, `best_top1`, … of [`linear_probe`], the same for
        each of the `floors`, `protocol`, and the circumstances (time, command, commit, machine, versions). A list of
        them where the encoders are a list.

    Raises:
        ValueError: from an encoder, the data set or the probe.
    """

    def probe(train: Maps, test: Maps, device: torch.device) -> dict:
        train_maps, test_maps = ({name: one.features for name, one in maps.items()} for maps in (train, test))
        return linear_probe(
            train_maps,
            labels_of(train),
            test_maps,
            labels_of(test),
            learning_rates=tuple(learning_rates),
            batch_norm=tuple(batch_norm),
            epochs=epochs,
            batch_size=probe_batch_size,
            held_out=held_out,
            seed=seed,
            device=device,
            progress=progress,
        )

    own = dict(learning_rate=list(learning_rates), epochs=epochs, probe_batch_size=probe_batch_size, held_out=held_out)
    names = {normalised: name for name, normalised in BATCH_NORMS.items()}
    own["batch_norm"] = [names[normalised] for normalised in batch_norm]
    return _run("linear_probe", probe, encoders, dataset, "probe", own, seed=seed, progress=progress, **options)


def run_knn(
    encoders: Source | Sequence[Source],
    dataset: str | Path | ImageSource | None = None,
    *,
    k: int | Sequence[int] = 20,
    temperature: float = 0.07,
    variants: Sequence[str] = tuple(VARIANTS),
    **options,
) -> dict | list[dict]:
    """k-nearest-neighbour accuracy of encoders and of the floors beside them; as [`run_linear_probe`].

    Args:
        k, temperature, variants: as in [`knn`]. options: as for [`evaluate_encoders`], with one of the `layers` and
            one of the `pools`.
    """

    def classify(train: Maps, test: Maps, device: torch.device) -> dict:
        settings = dict(k=k, temperature=temperature, variants=variants, device=device)
        return knn(*tensors_of_one_map(train, test), **settings)

    own = dict(k=[k] if isinstance(k, int) else list(k), temperature=temperature, variant=list(variants))
    return _run("knn", classify, encoders, dataset, "knn", own, **options)


def run_few_shot(
    encoders: Source | Sequence[Source],
    dataset: str | Path | ImageSource | None = None,
    *,
    fractions: Sequence[float] = FRACTIONS,
    draws: int = 3,
    seed: int = 0,
    progress: bool = True,
    **options,
) -> dict | list[dict]:
    """Accuracy with few labels of encoders and of the floors beside them; as [`run_linear_probe`].

    Args:
        fractions, draws: as in [`few_shot`]. seed: of the draws, the floors and frozen noise. options: as for
            [`evaluate_encoders`], with one of the `layers` and one of the `pools`.
    """

    def classify(train: Maps, test: Maps, device: torch.device) -> dict:
        settings = dict(fractions=tuple(fractions), draws=draws, seed=seed, device=device, progress=progress)
        return few_shot(*tensors_of_one_map(train, test), **settings)

    own = dict(fraction=list(fractions), draws=draws)
    return _run("few_shot", classify, encoders, dataset, "few-shot", own, seed=seed, progress=progress, **options)


def _run(task, evaluate, encoders, dataset, command, command_options, **options) -> dict | list[dict]:
    """The row of an encoder, or the list of those of several."""
    rows = evaluate_encoders(
        task, evaluate, encoders, dataset, command=command, command_options=command_options, **options
    )
    return rows[0] if isinstance(encoders, Source) else rows


def labels_of(maps: Maps) -> torch.Tensor:
    """The same under every map, since those of unreadable images are left out of all."""
    return next(iter(maps.values())).labels


def tensors_of_one_map(train: Maps, test: Maps) -> tuple[torch.Tensor, ...]:
    """Training features and labels, test features and labels.

    Raises:
        ValueError: there are several maps.
    """
    if len(train) > 1:
        raise ValueError(
            f"Only a linear probe selects among feature maps ({', '.join(train)}); take one layer and one pool."
        )
    ([fitted], [tested]) = (maps.values() for maps in (train, test))
    return fitted.features, fitted.labels, tested.features, tested.labels
