"""A step whose loss or gradient was not finite: what is noted of it, and how to look at it again, image by image.

What is noted is a folder with `replay.json` (step, seed, sample ids), the weights as they were before the step, recipe
and processor. Everything else of a step is a function of these.
"""

import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import nn

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS
from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import LearnedTokenizer
from ..manifest import check_folder, write_folder
from ..modeling_ldae import LDAEForPreTraining
from ..progress import progress_bar
from ..recipes import Recipe
from .checkpointing import quietly
from .data import load_images, loading_options, train_loader
from .session import RunError, Session
from .sharding import whole


REPLAY = "replay.json"


def note_failure(
    folder: Path, facts: dict, model: LDAEForPreTraining, extras: Callable[[Path], None], session: Session
) -> str:
    """Writes `folder/step-<step>`; returns a sentence that says how to use it. All processes call it.

    Args:
        facts: plain JSON values: `step` (the steps done before), `epoch`, `seed`, `reason`, `sample_ids` of the global
            batch, `dataset`, `streaming`, `num_images`, `mixed_precision`. extras: adds processor and recipe.
    """
    weights = {name: whole(value.detach()) for name, value in model.state_dict().items()}
    target = folder / f"step-{facts['step']:08d}"
    command = None if facts["streaming"] else f"ldae replay {target}"

    def write(path: Path) -> None:
        with quietly():
            model.save_pretrained(path, state_dict=weights)
        extras(path)
        # JSON has no NaN.
        plain = {key: str(value) if isinstance(value, float) else value for key, value in facts.items()}
        (path / REPLAY).write_text(json.dumps(plain | {"command": command}, indent=2))

    try:
        session.on_main(lambda: write_folder(target, write))
    except OSError as error:
        return f"It could not be noted: {error}."
    return f"`{command}` repeats it image by image." if command else f"{target} says which samples it had."


def replay(folder: Path, *, dataset=None, batch_size: int = 16, num_workers: int = 0, device=None) -> dict:
    """Computes the step's losses and gradients again, in small batches, and alone where one is not finite.

    Args:
        folder: that a run has left in `failures/`. dataset: its images, where the name that it noted no longer leads to
            them. batch_size: images at a time. device: default a GPU if there is one.

    Returns:
        `step`, `reason`, `images`, `largest_loss`, and `bad`: for each image whose own loss or gradient is not finite
        its `sample_id`, `timestep`, `loss`, `gradient_norm`, and `where` the first such number appeared.

    Raises:
        RunError: it was the step of a stream, which cannot be read again, or the images are others.
        DamagedError: a file is damaged. ValueError: from the data set.
    """
    check_folder(folder, (REPLAY,))
    facts, recipe = json.loads((folder / REPLAY).read_text()), Recipe.load(folder)
    if facts["streaming"]:
        raise RunError("The step was one of a stream, whose rows cannot be found again by their number.")
    if recipe.is_masked:
        raise RunError(f"The step was one of a masked autoencoder, which is not repeated; {REPLAY} says its samples.")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    model = LDAEForPreTraining.from_pretrained(folder).to(device).train()
    if model.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        model.set_tokenizer(LearnedTokenizer.from_pretrained(folder, subfolder="tokenizer"))
    processor = LDAEImageProcessor.from_pretrained(folder)
    columns = {key: facts[key] for key in ("image_column", "label_column", "quarantine")}
    source = load_images(dataset or facts["dataset"], recipe.data["train_split"], **columns)
    if len(source) != facts["num_images"]:
        raise RunError(f"{source.name} has {len(source)} images, the run's data set had {facts['num_images']}.")
    config, step = model.config, facts["step"]
    labelled = config.num_classes is not None
    loader = train_loader(
        source,
        num_timesteps=config.num_noise_levels,
        tokens_shape=(config.num_patches, config.latent_dim),
        timestep_block=config.timestep_block,
        global_batch_size=len(facts["sample_ids"]),
        micro_batch_size=math.gcd(len(facts["sample_ids"]), batch_size),
        start_step=step,
        num_steps=step + 1,
        label_dropout=config.class_dropout_prob if labelled else None,
        **loading_options(recipe, facts["seed"], num_workers),
    )
    names = ["pixel_values", "timesteps", "noise"] + (["labels", "dropped_labels"] if labelled else [])
    seen, bad, largest = [], [], -math.inf
    for batch in progress_bar(loader, desc="replay", unit=" batches"):
        seen += batch["sample_ids"].tolist()
        inputs = {name: batch[name].to(device) for name in names}
        inputs["pixel_values"] = processor.normalize_pixels(inputs["pixel_values"])
        loss, norm, _ = gradient_of(model, inputs, facts["mixed_precision"])
        if math.isfinite(loss) and math.isfinite(norm):
            largest = max(largest, loss)
            continue
        for row, sample_id in enumerate(batch["sample_ids"].tolist()):
            alone = {name: value[row : row + 1] for name, value in inputs.items()}
            loss, norm, where = gradient_of(model, alone, facts["mixed_precision"])
            largest = max(largest, loss) if math.isfinite(loss) else largest
            if not (math.isfinite(loss) and math.isfinite(norm)):
                found = dict(timestep=batch["timesteps"][row].tolist(), loss=loss, gradient_norm=norm, where=where)
                bad.append({"sample_id": sample_id} | found)
    if sorted(seen) != sorted(facts["sample_ids"]):
        raise RunError(f"{source.name} gives other samples at this step than the run had; give its own with --dataset.")
    return {"step": step, "reason": facts["reason"], "images": len(seen), "largest_loss": largest, "bad": bad}


def gradient_of(model: LDAEForPreTraining, inputs: dict, mixed_precision: str) -> tuple[float, float, str | None]:
    """Loss, norm of the gradient, and where the first number appeared that is not finite, None if all are.

    That is the output of a module, the loss, or the gradient of a parameter.
    """
    device = model.device.type
    model.zero_grad(set_to_none=True)
    with watching(model) as unusual:
        with torch.autocast(device, dtype=torch.bfloat16) if mixed_precision == "bf16" else nullcontext():
            loss = model(**inputs).loss
        loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    norm = torch.nn.utils.get_total_norm(list(gradients.values())).item()
    if unusual:
        where = f"the output of {unusual[0]}"
    elif not torch.isfinite(loss):
        where = "the loss"
    else:  # the backward pass comes to the last parameter first
        where = next((name for name in reversed(gradients) if not torch.isfinite(gradients[name]).all()), None)
        where = where and f"the gradient of {where}"
    return loss.item(), norm, where


@contextmanager
def watching(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules whose output is not finite, in the order in which they run."""
    unusual: list[str] = []

    def look(name: str):
        def hook(module, arguments, output) -> None:
            if isinstance(output, torch.Tensor) and not torch.isfinite(output).all():
                unusual.append(name)

        return hook

    hooks = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        yield unusual
    finally:
        for hook in hooks:
            hook.remove()


def replay_text(found: dict) -> str:
    """What `replay` found, in words."""
    lines = [f"step {found['step'] + 1}: {found['reason']}; {found['images']} images"]
    for row in found["bad"]:
        numbers = f"loss {row['loss']:g}, gradient {row['gradient_norm']:g}"
        lines.append(f"image {row['sample_id']} at t = {row['timestep']}: {numbers}; first in {row['where']}")
    if not found["bad"]:
        lines.append(
            "Every image alone has a finite loss and gradient here. It may take the run's own GPU, precision or layout."
        )
    if math.isfinite(found["largest_loss"]):
        lines.append(f"the largest finite loss: {found['largest_loss']:.4g}")
    return "\n".join(lines)
