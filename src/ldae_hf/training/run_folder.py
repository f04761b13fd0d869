"""A run's folder, before anything is built: which run it holds, how far that is, and whether it can begin as asked."""

import json
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list
from safetensors import safe_open

from ..configuration_ldae import LEARNED_TOKENIZERS, LDAEConfig
from ..modeling_ldae import LDAEForPreTraining
from .checkpointing import WEIGHTS, clear_leftovers, newest_intact, set_aside
from .fit_pca import given_processor
from .session import RunError, Session
from .starting_point import StartingPoint


FINGERPRINTS = {"processor_fingerprint", "tokenizer_fingerprint"}  # no recipe knows them


def check_options(at_least_one: dict[str, int | None], mixed_precision: str) -> None:
    """Raises RunError for a value that would only fail, or be ignored, later."""
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise RunError(f"{name} is {value}, but must be at least 1.")
    if mixed_precision not in ("bf16", "no"):  # fp16 needs its losses scaled
        raise RunError(f"mixed_precision is {mixed_precision!r}, but must be 'bf16' or 'no'.")


def identity(run: dict) -> dict:
    """What must be equal for a run to be the same, by dotted names."""
    sections = {section: run["recipe"][section] for section in ("model", "tokenizer", "data", "train")}
    values = {f"{section}.{key}": value for section, keys in sections.items() for key, value in keys.items()}
    return values | {key: value for key, value in run.items() if key != "recipe"}


def check_same_run(output_dir: Path, run: dict) -> None:
    """Raises RunError if the folder holds another run; of values that are not known yet nothing is said."""
    file = output_dir / "run.json"
    if not file.exists():
        return
    try:
        before = identity(json.loads(file.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunError(f"{file} cannot be read as a run; choose another --output-dir.") from error
    for key, value in identity(run).items():
        if key in before and before[key] != value:
            raise RunError(
                f"{output_dir} holds a run with {key}={before[key]!r}, not {value!r}; "
                "choose another --output-dir, or the values of that run to go on with it."
            )


def check_start_fits(start: StartingPoint, config: LDAEConfig) -> list[str]:
    """Looks at another training's model before anything of a run that is to start from it is written.

    Args:
        config: of the run's model.

    Returns:
        The values of the configuration that are others there, so that its weights have learned another task, as texts.

    Raises:
        RunError: a weight is missing, unknown, or has another shape, or tokens are made by another network.
        ValueError: its processor is not one for this model.
    """
    given_processor(start.folder, config)
    theirs = LDAEConfig.from_pretrained(start.folder)
    if theirs.tokenizer != config.tokenizer and {theirs.tokenizer, config.tokenizer} & set(LEARNED_TOKENIZERS):
        raise RunError(
            f"A run cannot start from {start.source}: its tokenizer is {theirs.tokenizer}, the recipe's "
            f"{config.tokenizer}, and one of them is learned: weights for its tokens mean nothing for the other's."
        )
    with torch.device("meta"):
        model = LDAEForPreTraining(config)
    ours = {name: tuple(value.shape) for name, value in model.named_parameters()}
    with safe_open(start.folder / WEIGHTS, "pt") as file:
        there = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}
    own = {name for name, _ in model.named_buffers()}  # basis and tables, which a run makes itself
    for name in sorted(ours.keys() | there.keys() - own):
        if there.get(name) != ours.get(name):
            raise RunError(
                f"A run cannot start from {start.source}: {name} has the shape {there.get(name, 'none')} there, "
                f"{ours.get(name, 'none')} in the recipe's model; take the recipe that it was trained with."
            )
    keys = [key for key in LDAEConfig.__annotations__ if key not in FINGERPRINTS]
    values = {key: (getattr(theirs, key), getattr(config, key)) for key in keys}
    return [f"{key}={there!r} there, {ours!r} here" for key, (there, ours) in values.items() if there != ours]


def newest_checkpoint(folder: Path, session: Session) -> Path | None:
    """The newest intact checkpoint, the same in all processes; damaged ones behind it are said and set aside.

    Raises:
        DamagedError: there are checkpoints, and all are damaged.
    """
    newest: list[Path] = []

    def look() -> None:
        found, problems = newest_intact(folder)
        for problem in problems:
            print(f"warning: {problem} It is set aside; going on from {found}.")
        set_aside(folder, found)
        clear_leftovers(folder)
        newest.extend([found] if found else [])

    session.on_main(look)
    [found] = broadcast_object_list([newest[0] if newest else None])
    return found
