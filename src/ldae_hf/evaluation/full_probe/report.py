"""Whether a folder holds this probe, and what a finished one says of itself."""

import json
from pathlib import Path
from types import SimpleNamespace

from ...training.session import RunError
from ..inputs import beside_weights, recipe_beside
from ..ledger import append_to_ledger, read_ledger
from ..rerun import rerun_command
from .images import ProbeImages
from .protocol import Protocol


COMMAND = "full-probe"


def check_same_probe(output_dir: Path, identity: dict[str, dict]) -> None:
    """Raises RunError if the folder holds another run than the one of this identity, which its `run.json` holds."""
    file = output_dir / "run.json"
    if not file.exists():
        return
    try:
        sections = json.loads(file.read_text())
        before = {(section, key): value for section, values in sections.items() for key, value in values.items()}
    except (ValueError, AttributeError) as error:
        raise RunError(f"{file} cannot be read as a full probe; choose another --output-dir.") from error
    for section, values in identity.items():
        for key, value in values.items():
            if (held := before.get((section, key))) != value:
                raise RunError(
                    f"{output_dir} holds a run with {section}.{key}={held!r}, not {value!r}; choose another "
                    "--output-dir, or the values of that run to go on with it."
                )


def training_of(source) -> dict:
    """`recipe`, `tier`, `overrides` and `training` of an encoder, None where nobody knows, as of None."""
    if source is None:
        return dict.fromkeys(("recipe", "tier", "overrides", "training"))
    recipe, file = recipe_beside(source), beside_weights(source, "training.json")
    return {
        "recipe": recipe and recipe.name,
        "tier": recipe and recipe.tier,
        "overrides": recipe and recipe.overrides,
        "training": file and json.loads(file.read_text()),
    }


def hand_over(row: dict, output: str | Path | None, ledger: str | Path | None) -> None:
    """A finished result, also one of an earlier session, to the file and the ledger that are asked for; a ledger that
    has it gets it no second time."""
    if ledger and row not in read_ledger(ledger):
        append_to_ledger(row, ledger)
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(row, indent=2, ensure_ascii=False, allow_nan=False)
        Path(output).write_text(text + "\n", encoding="utf-8")


def rerun(options: SimpleNamespace, images: ProbeImages, protocol: Protocol, timestep: int | None) -> str | None:
    """The command that gives the number again, every option that it depends on spelled out."""
    taken = ("layer", "pool", "noise", "dtype", "floor", "processor", "image_column", "label_column", "num_workers")
    explicit = {
        "dataset": images.train.name if options.dataset is None else options.dataset,
        "train_split": images.splits[0],
        "test_split": images.splits[1],
        "optimizer": protocol.optimizer,
        "learning_rate": list(protocol.learning_rates),
        "epochs": protocol.epochs,
        "warmup_epochs": protocol.warmup_epochs,
        "batch_size": protocol.batch_size,
        "per_device_batch_size": options.per_device_batch_size,
        "timestep": timestep,
        "seed": protocol.seed,
    }
    return rerun_command(COMMAND, explicit | {key: getattr(options, key) for key in taken}, [options.encoder])
