"""The folder of a run: whether it is this one's."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

from ...training.session import RunError
from ..encoders import Encoder
from ..full_probe.images import ProbeImages
from .recipe import FineTuningRecipe


TASK, RESULT = "fine_tune", "result.json"


def run_facts(options: SimpleNamespace, encoder: Encoder, images: ProbeImages, recipe: FineTuningRecipe) -> dict:
    """What must be equal for a run to be the same, as its `run.json` holds it, in the form of pre-training's."""
    chosen = {key: getattr(options, key) for key in ("from_scratch", "keep_projection")}
    origin = {key: encoder.facts[key] for key in ("encoder", "timestep")}
    counts = {"num_test_images": len(images.test), "num_classes": images.num_classes}
    sections = {
        "model": chosen | origin,
        "tokenizer": {},
        "data": {"dataset": Path(images.train.name).name, "splits": images.splits} | counts,  # wherever it stands
        "train": asdict(recipe),
    }
    facts = {"task": TASK, "seed": options.seed, "num_images": len(images.train), "recipe": sections}
    return json.loads(json.dumps(facts))  # as the file gives it back


def check_task(output_dir: Path) -> None:
    """Raises RunError if the folder holds a run of another kind."""
    file = output_dir / "run.json"
    if file.is_file() and f'"task": "{TASK}"' not in file.read_text():
        raise RunError(f"{output_dir} holds a run that is no fine-tuning; choose another --output-dir.")
