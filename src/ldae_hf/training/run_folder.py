"""A run's folder and machine, before anything is built: which run it holds, and accelerate's view of the machine."""

import json
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs

from .loop import RunError


def check_options(at_least_one: dict[str, int | None], mixed_precision: str) -> None:
    """Raises RunError for a value that would only fail, or be ignored, later."""
    for name, value in at_least_one.items():
        if value is not None and value < 1:
            raise RunError(f"{name} is {value}, but must be at least 1.")
    if mixed_precision not in ("bf16", "no"):  # fp16 needs its losses scaled
        raise RunError(f"mixed_precision is {mixed_precision!r}, but must be 'bf16' or 'no'.")


def make_accelerator(output_dir: Path, mixed_precision: str, report_to) -> Accelerator:
    """Accelerate's view of the machine.

    Raises:
        RunError: a tracker is not installed.
    """
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=list(report_to) or None,
        project_dir=output_dir,
        # Accumulation is ours: the one that `accelerate config` may have set would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        # The other processes wait while the main one evaluates and saves.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(hours=2))],
    )
    if missing := {*report_to} - {"all", *map(str, accelerator.log_with)}:
        raise RunError(f"The tracker {', '.join(sorted(missing))} is not installed.")
    return accelerator


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
