"""Pre-training, one function in stages: resolve, build, resume, step, report, save.

Every random choice of the data (order, crop, timestep, noise) is a pure function of seed, epoch and sample, so the state
of a run is its step, its weights and its optimizer; running the same command again goes on where the last checkpoint
stands.
"""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm
from transformers import AutoModelForPreTraining

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEForPreTraining
from ..recipes import Recipe, load_recipe
from .checkpointing import checkpoints, load_checkpoint, save_checkpoint, write_folder
from .data import load_images, train_loader
from .fit_pca import fit_processor
from .metrics_log import MetricsLog
from .optimization import ExponentialMovingAverage, Plan, adamw, training_flops_per_image


# Called with the unwrapped model (in eval mode) and the processor; returns numbers for the log.
Evaluation = Callable[[LDAEForPreTraining, LDAEImageProcessor], dict[str, float]]


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


def pretrain(
    recipe: str = "l_dae",
    *,
    output_dir: str | Path,
    tier: str | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    dataset=None,
    streaming: bool = False,
    image_column: str | None = None,
    label_column: str | None = None,
    processor: str | Path | None = None,
    seed: int = 0,
    per_device_batch_size: int | None = None,
    num_workers: int = 2,
    mixed_precision: str = "bf16",
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    log_every: int = 20,
    evaluate_every: int | None = None,
    evaluations: tuple[Evaluation, ...] | list[Evaluation] = (),
    report_to: tuple[str, ...] | list[str] = (),
    max_steps: int | None = None,
    max_minutes: float | None = None,
) -> Path | None:
    """Pre-trains l-DAE, or goes on with a run that stands in `output_dir`.

    Writes into `output_dir`: `recipe.json`, `processor/`, `checkpoints/step-…/`, `metrics.jsonl`, `bad_images.jsonl`
    (if there are any) and at the end `encoder/`, which `AutoModel.from_pretrained` loads.

    Args:
        recipe, tier, overrides: as in [`load_recipe`].
        dataset: images instead of the recipe's data set: a Hub name, a folder, or a loaded `datasets.Dataset`.
        streaming: read a data set from the Hub without downloading it first.
        image_column, label_column: names of the columns, detected if not given.
        processor: a folder with a fitted processor; by default one is fitted to the training crops.
        seed: of initialisation, order, crops, timesteps and noise.
        per_device_batch_size: images of one forward pass; the rest of the global batch is accumulated.
        num_workers: processes that decode images.
        mixed_precision: `"bf16"` or `"no"`. The PCA, the tables and the loss are fp32 in either.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`; default SDPA on a GPU and eager on a CPU,
            where SDPA's backward is slow at short sequences.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        compile: `torch.compile` the model.
        checkpoint_every: steps between checkpoints, default one epoch. keep_checkpoints: how many stay.
        log_every: steps between lines of `metrics.jsonl`. evaluate_every: steps between evaluations, default an epoch.
        report_to: accelerate's trackers beside the log, for example `"tensorboard"`.
        max_steps, max_minutes: stop early, with a checkpoint; the same command goes on from there.

    Returns:
        The encoder's folder, or None if the run stopped early.

    Raises:
        RunError: the folder holds another run, or the loss is not finite.
        ValueError: from the recipe, the data or the plan.
    """
    started = time.monotonic()
    output_dir = Path(output_dir)

    # ---- resolve: what this run is
    recipe: Recipe = load_recipe(recipe, tier, overrides)
    accelerator = Accelerator(mixed_precision=mixed_precision, log_with=list(report_to) or None, project_dir=output_dir)
    data = recipe.data
    source = load_images(
        data["dataset"] if dataset is None else dataset,
        data["train_split"],
        streaming=streaming,
        image_column=image_column,
        label_column=label_column,
    )
    plan = Plan.derive(recipe, len(source), accelerator.num_processes, per_device_batch_size)
    config = recipe.model_config()
    if accelerator.is_main_process:
        claim_folder(output_dir, recipe, seed)
    accelerator.wait_for_everyone()

    # ---- build: processor, model, optimizer
    loading = dict(
        image_size=config.image_size,
        crop=data["crop"],
        crop_scale=data["crop_scale"],
        flip=data["flip"],
        seed=seed,
        num_workers=num_workers,
    )
    processor = fit_processor(output_dir / "processor", processor, config, source, recipe, accelerator, loading)
    torch.manual_seed(seed)
    if attn_implementation is None:
        attn_implementation = "eager" if accelerator.device.type == "cpu" else "sdpa"
    model = AutoModelForPreTraining.from_config(config, attn_implementation=attn_implementation)
    model.set_processor(processor)
    if gradient_checkpointing:
        model.gradient_checkpointing_enable()
    model.to(accelerator.device).train()
    optimizer = adamw(model, recipe)
    ema = None if plan.ema_decay is None else ExponentialMovingAverage(model, plan.ema_decay)

    # ---- resume: the newest checkpoint, if there is one
    step = 0
    folder = output_dir / "checkpoints"
    if found := checkpoints(folder):
        step = load_checkpoint(found[-1], model, optimizer, ema)["step"]
    log = MetricsLog(output_dir, accelerator, resume_at=step)
    accelerator.print("\n".join([f"{recipe.title}: {recipe.why}", *plan.lines()]))
    if step:
        accelerator.print(f"resuming at step {step:,} from {found[-1]}")

    if compile:
        model.compile()
    wrapped = accelerator.prepare(model)
    loader = iter(
        train_loader(
            source,
            num_timesteps=config.num_noise_levels,
            tokens_shape=(config.num_patches, config.latent_dim),
            global_batch_size=plan.global_batch_size,
            micro_batch_size=plan.per_device_batch_size,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            start_step=step,
            num_steps=plan.total_steps,
            **loading,
        )
    )

    def save_state() -> None:
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            state = {"step": step, "seed": seed, "recipe": recipe.title, "images_seen": step * plan.global_batch_size}
            save_checkpoint(folder, step, model, optimizer, ema, state, add_processor_and_recipe, keep_checkpoints)
        accelerator.wait_for_everyone()

    def evaluate() -> None:
        if accelerator.is_main_process:
            model.eval()
            for evaluation in evaluations:
                log.write_evaluation(step, evaluation(model, processor))
            model.train()
        accelerator.wait_for_everyone()

    def add_processor_and_recipe(path: Path) -> None:
        processor.save_pretrained(path)
        recipe.save(path)

    last_step = plan.total_steps if max_steps is None else min(max_steps, plan.total_steps)
    checkpoint_every = checkpoint_every or plan.steps_per_epoch
    evaluate_every = evaluate_every or plan.steps_per_epoch
    bar = tqdm(
        total=plan.total_steps * plan.global_batch_size,
        initial=step * plan.global_batch_size,
        unit=" images",
        unit_scale=True,
        desc=recipe.title,
        disable=not accelerator.is_main_process,
    )
    while step < last_step:  # one global batch each
        # ---- step
        total_loss, waited, began = 0.0, 0.0, time.monotonic()
        for micro_step in range(plan.accumulation):
            wait_began = time.monotonic()
            batch = next(loader)
            waited += time.monotonic() - wait_began
            log.bad_images(batch["bad_images"])
            pixels = batch["pixel_values"].to(accelerator.device, non_blocking=True)
            is_last = micro_step == plan.accumulation - 1
            with accelerator.autocast(), _no_sync(accelerator, wrapped, is_last):
                loss = wrapped(
                    processor.normalize_pixels(pixels),
                    timesteps=batch["timesteps"].to(accelerator.device, non_blocking=True),
                    noise=batch["noise"].to(accelerator.device, non_blocking=True),
                ).loss / plan.accumulation
                accelerator.backward(loss)
            total_loss = total_loss + loss.detach()
        learning_rate = plan.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in model.parameters()])
        if recipe.train["max_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.train["max_grad_norm"], norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if ema is not None:
            ema.update(model)
        step += 1

        # ---- report
        bar.update(plan.global_batch_size)
        log.add(total_loss, norm, waited, time.monotonic() - began, plan.global_batch_size)
        out_of_time = _agreed(accelerator, max_minutes is not None and time.monotonic() - started > 60 * max_minutes)
        is_end = step == last_step or out_of_time
        saves = step % checkpoint_every == 0 or is_end
        if step % log_every == 0 or saves:
            line = log.write(step, epoch=step / plan.steps_per_epoch, learning_rate=learning_rate)
            if not math.isfinite(line["loss"]):
                raise RunError(
                    f"The loss is {line['loss']} at step {step}; the last checkpoint in {folder} is intact: "
                    "start again with a smaller train.base_learning_rate or without mixed precision."
                )
            bar.set_postfix(loss=f"{line['loss']:.4f}", wait=f"{line['data_wait']:.0%}", lr=f"{learning_rate:.1e}")

        # ---- save
        if saves:
            save_state()
        if evaluations and (step % evaluate_every == 0 or step == plan.total_steps):
            evaluate()
        if is_end:
            break
    bar.close()
    log.close()

    if step < plan.total_steps:
        accelerator.print(f"stopped at step {step:,} of {plan.total_steps:,}; run the same command again to go on")
        return None
    if accelerator.is_main_process:
        save_encoder(output_dir / "encoder", model, ema, add_processor_and_recipe)
        flops = training_flops_per_image(config)
        rate = log.images_per_second()
        if rate:
            accelerator.print(f"{rate:,.1f} images/s · {rate * flops / 1e12:.2f} TFLOP/s in the model's matrix products")
        accelerator.print(f"encoder: {output_dir / 'encoder'}")
    accelerator.wait_for_everyone()
    return output_dir / "encoder"


def claim_folder(output_dir: Path, recipe: Recipe, seed: int) -> None:
    """Writes the run's recipe and seed, or compares them with those of the run that the folder holds.

    Raises:
        RunError: the folder holds another run.
    """
    file = output_dir / "run.json"
    run = json.loads(json.dumps({"seed": seed, "recipe": recipe.to_dict()}))
    if not file.exists():
        output_dir.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(run, indent=2))
        return
    before = json.loads(file.read_text())
    for section in ("model", "tokenizer", "data", "train"):
        for key, value in run["recipe"][section].items():
            if before["recipe"][section].get(key) != value:
                raise RunError(
                    f"{output_dir} holds a run with {section}.{key}={before['recipe'][section].get(key)!r}, not {value!r}; "
                    "choose another --output-dir, or the values of that run to go on with it."
                )
    if before["seed"] != seed:
        raise RunError(f"{output_dir} holds a run with seed {before['seed']}; choose another --output-dir.")


def save_encoder(folder: Path, model: LDAEForPreTraining, ema: ExponentialMovingAverage | None, extras) -> None:
    """The encoder as a model repository, from the EMA weights where there are any."""
    encoder = model.ldae
    weights = dict(encoder.state_dict())
    if ema is not None:
        weights |= {name.removeprefix("ldae."): value for name, value in ema.average.items() if name.startswith("ldae.")}

    def write(path: Path) -> None:
        encoder.save_pretrained(path, state_dict=weights)
        extras(path)

    write_folder(folder, write)


def _no_sync(accelerator: Accelerator, model, is_last: bool):
    """Gradients are exchanged between processes in the last pass of an accumulation only."""
    return torch.enable_grad() if is_last else accelerator.no_sync(model)


def _agreed(accelerator: Accelerator, flag: bool) -> bool:
    """Whether any process says so."""
    if accelerator.num_processes == 1:
        return flag
    return bool(accelerator.reduce(torch.tensor(float(flag), device=accelerator.device)).item())
