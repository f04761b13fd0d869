"""What a fine-tuned model is worth, and how it is kept."""

import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.func import functional_call
from transformers import PreTrainedModel

from ...export.transformers_vit import stock_processor
from ...image_processing_ldae import LDAEImageProcessor
from ...manifest import write_folder, write_text
from ...progress import progress_bar, quietly
from ...training.circumstances import circumstances
from ...training.data import ImageSource, eval_loader
from ..full_probe.images import ProbeImages
from ..full_probe.report import training_of
from ..metrics import accuracy
from ..rerun import rerun_command
from .classifiers import Classifier
from .folder import RESULT, TASK
from .recipe import BETAS, FineTuningPlan, FineTuningRecipe


BATCH_SIZE = 256


@torch.no_grad()
def test_accuracy(
    model: PreTrainedModel,
    weights: dict[str, dict[str, torch.Tensor] | None],
    processor: LDAEImageProcessor,
    source: ImageSource,
    num_workers: int = 0,
    progress: bool = True,
) -> dict[str, dict]:
    """`top1`, and from 10 classes on `top5`, in percent, of centre crops in the weights' own precision, and the number
    of `bad_images`, which are left out.

    Args:
        weights: parameters by name, by what the caller calls them; None for the model's own. All see the same images.
    """
    scores, labels, bad_images = {which: [] for which in weights}, [], 0
    was_training = model.training
    model.eval()
    batches = eval_loader(source, processor.image_size, BATCH_SIZE, num_workers)
    for batch in progress_bar(batches, desc=f"test on {source.name}", disable=not progress):
        unreadable = torch.tensor([bad["index"] for bad in batch["bad_images"]], dtype=torch.int64)
        good = ~torch.isin(batch["sample_ids"], unreadable)
        pixels = processor.normalize_pixels(batch["pixel_values"].to(model.device)).to(model.dtype)
        for which, parameters in weights.items():
            output = model(pixels) if parameters is None else functional_call(model, parameters, (pixels,))
            scores[which].append(output.logits.float().cpu()[good])
        labels.append(batch["labels"][good])
        bad_images += int((~good).sum())
    model.train(was_training)
    found = {which: accuracy(torch.cat(parts), torch.cat(labels)) for which, parts in scores.items()}
    return {which: values | {"bad_images": bad_images} for which, values in found.items()}


def save_model(folder: Path, model: PreTrainedModel, processor: LDAEImageProcessor, run: dict) -> None:
    """As a folder that transformers loads alone, with its image processor, and how it came about."""

    def write(path: Path) -> None:
        with quietly():
            model.save_pretrained(path)
        stock_processor(processor).save_pretrained(path)
        (path / "finetuning.json").write_text(json.dumps(run, indent=2) + "\n")

    write_folder(folder, write)


def result_row(
    options: SimpleNamespace,
    encoder_facts: dict,
    name: str,
    classifier: Classifier,
    images: ProbeImages,
    recipe: FineTuningRecipe,
    plan: FineTuningPlan,
    scores: dict,
    bad_images: int,
) -> dict:
    """The result as plain JSON values.

    Args:
        encoder_facts, name: of the encoder that it began with. scores: of [`test_accuracy`]. bad_images: for training.
    """
    processor = classifier.processor
    return {
        **training_of(options.encoder),
        "task": TASK,
        "name": f"{name}, from scratch" if options.from_scratch else name,
        "dim": classifier.dim,
        **{key: value for key, value in scores.items() if key != "bad_images"},
        "floors": {},
        "model": {
            "class": type(classifier.model).__name__,
            "head": classifier.head,
            "start": "new weights" if options.from_scratch else "the encoder's weights",
        },
        "protocol": {
            "features": encoder_facts | {"layer": "last", "pool": "trained"},
            "image_size": processor.image_size,
            "preprocessing": f"centre crop, bicubic; mean {processor.image_mean}, std {processor.image_std}",
            **images.facts((bad_images, scores["bad_images"])),
            "floors_seed": options.seed,
            TASK: {
                "optimizer": f"AdamW, betas {BETAS}; no weight decay on biases, norms, tokens and positions",
                **json.loads(json.dumps(asdict(recipe))),
                "steps": plan.total_steps,
                "seed": options.seed,
                "mixed_precision": options.mixed_precision,
                "keep_projection": options.keep_projection,
            },
        },
        "rerun": rerun(options, encoder_facts, images, recipe),
    }


def rerun(options: SimpleNamespace, encoder_facts: dict, images: ProbeImages, recipe: FineTuningRecipe) -> str | None:
    """The command that gives this again, but for the folder that it is done in."""
    keys = "image_column label_column from_scratch keep_projection seed mixed_precision per_device_batch_size"
    train_split, test_split = images.splits
    explicit = {
        "dataset": images.train.name if options.dataset is None else options.dataset,
        "train_split": train_split,
        "test_split": test_split,
        "timestep": encoder_facts["timestep"],
        **{key: getattr(options, key) for key in keys.split()},
        **asdict(recipe),
    }
    explicit["crop_scale"] = ",".join(map(str, recipe.crop_scale))
    explicit["no_flip"] = not explicit.pop("flip")
    return rerun_command("finetune", explicit, [options.encoder])


def write_result(row: dict, output_dir: Path) -> None:
    """In the run's folder: what is there is not measured again."""
    text = json.dumps(circumstances() | row, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(output_dir / RESULT, text)
