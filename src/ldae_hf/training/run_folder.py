"""A run's folder, before anything is built: which run it holds, and how far that is."""

import json
from pathlib import Path

from accelerate.utils import broadcast_object_list

from .checkpointing import clear_leftovers, newest_intact, set_aside
from .session import RunError, Session


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
