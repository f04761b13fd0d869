"""Pre-training, one function in stages: resolve, build, resume, step, report, save.

Every random choice of the data (order, crop, timestep, noise) is a pure function of seed, epoch and sample, so the
state of a run is its step, its weights and its optimizer, and for a stream its position; running the same command again
goes on where the last checkpoint stands.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs, gather_object
from tqdm import tqdm
from transformers import AutoModelForPreTraining

from ..image_processing_ldae import LDAEImageProcessor
from ..modeling_ldae import LDAEForPreTraining
from ..recipes import Recipe, load_recipe
from .checkpointing import (
    MANIFEST,
    checkpoints,
    load_checkpoint,
    quietly,
    save_checkpoint,
    write_folder,
    write_text,
)
from .data import load_images, train_loader
from .fit_pca import fit_processor
from .metrics_log import MetricsLog
from .optimization import ExponentialMovingAverage, Plan, adamw, training_flops_per_image


# Called with the unwrapped model (in eval mode, with the EMA's weights if there is one) and the processor; returns
# numbers for the log.
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
    num_images: int | None = None,
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

    Writes into `output_dir`: `run.json`, `processor/`, `checkpoints/step-…/`, `metrics.jsonl`, `bad_images.jsonl` (if
    there are any) and at the end `encoder/`, which `AutoModel.from_pretrained` loads; of an EMA's weights, if there is
    one. Weights are kept in torch's default dtype.

    Args:
        recipe, tier, overrides: as in [`load_recipe`].
        dataset: images instead of the recipe's data set: a Hub name, a folder, or a loaded `datasets.Dataset`.
        streaming: read a data set from the Hub without downloading it first. It can be resumed only with the same
            number of processes, workers and images per forward pass.
        num_images: of an epoch, for a stream that does not say it.
        image_column, label_column: names of the columns, detected if not given.
        processor: a folder with a fitted processor of the same image size, patch and latents; by default one is fitted
            to the training crops.
        seed: of initialisation, order, crops, timesteps and noise.
        per_device_batch_size: images of one forward pass; the rest of the global batch is accumulated.
        num_workers: processes that decode images.
        mixed_precision: `"bf16"` or `"no"`. The PCA, the tables and the loss are fp32 in either.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`; default SDPA, and eager for bf16 on a CPU,
            where SDPA's backward is slow.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        compile: `torch.compile` the model.
        checkpoint_every: steps between checkpoints, default one epoch. keep_checkpoints: how many stay.
        log_every: steps between lines of `metrics.jsonl`.
        evaluations: callables, each with the model and the processor, that return numbers for the log.
        evaluate_every: steps between evaluations, default an epoch.
        report_to: accelerate's trackers beside the log, for example `"tensorboard"`.
        max_steps, max_minutes: stop early, with a checkpoint; the same command goes on from there.

    Returns:
        The encoder's folder, or None if the run stopped early.

    Raises:
        RunError: an option is out of range, the folder holds another run, or the loss is not finite.
        CheckpointError: the newest checkpoint is damaged.
        ValueError: from the recipe, the data, the processor or the plan.
    """
    started = time.monotonic()
    output_dir = Path(output_dir)

    # ---- resolve: what this run is
    at_least_one = dict(
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        log_every=log_every,
        evaluate_every=evaluate_every,
    )
    check_options(at_least_one, mixed_precision)
    recipe: Recipe = load_recipe(recipe, tier, overrides)
    config, data = recipe.model_config(), recipe.data
    accelerator = make_accelerator(output_dir, mixed_precision, report_to)
    run = {"seed": seed, "recipe": recipe.to_dict()}
    check_same_run(output_dir, run)
    encoder = output_dir / "encoder"
    if (encoder / MANIFEST).is_file():
        accelerator.print(f"this run is finished; encoder: {encoder}")
        accelerator.end_training()
        return encoder
    source = load_images(
        data["dataset"] if dataset is None else dataset,
        data["train_split"],
        streaming=streaming,
        image_column=image_column,
        label_column=label_column,
        num_images=num_images,
    )
    plan = Plan.derive(recipe, len(source), accelerator.num_processes, per_device_batch_size)
    run |= {"num_images": plan.num_images, "streaming": source.streaming}
    check_same_run(output_dir, run)
    if accelerator.is_main_process:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_text(output_dir / "run.json", json.dumps(run, indent=2))

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
        slow_backward = accelerator.device.type == "cpu" and mixed_precision == "bf16"
        attn_implementation = "eager" if slow_backward else "sdpa"
    model = AutoModelForPreTraining.from_config(config, attn_implementation=attn_implementation)
    model.to(accelerator.device, torch.get_default_dtype()).train()
    model.set_processor(processor)
    if gradient_checkpointing:
        model.activation_checkpointing_enable()
    optimizer = adamw(model, recipe)
    ema = None if plan.ema_decay is None else ExponentialMovingAverage(model, plan.ema_decay)

    # ---- resume: the newest checkpoint, if there is one
    folder = output_dir / "checkpoints"
    found = checkpoints(folder)
    resumed = load_checkpoint(found[-1], model, optimizer, ema) if found else {"step": 0}
    step = resumed["step"]
    loader = train_loader(
        source,
        num_timesteps=config.num_noise_levels,
        tokens_shape=(config.num_patches, config.latent_dim),
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.per_device_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=step,
        num_steps=plan.total_steps,
        state=stream_position(resumed, accelerator),
        **loading,
    )
    log = MetricsLog(output_dir, accelerator, resume_at=step, settings=identity(run))
    accelerator.print("\n".join([f"{recipe.title}: {recipe.why}", *plan.lines()]))
    if step:
        accelerator.print(f"resuming at step {step:,} from {found[-1]}")
    if compile:
        model.compile()  # inside DDP: accumulation and activation checkpointing then compile as they do without it
    wrapped = accelerator.prepare(model)

    def add_what_belongs_to_it(path: Path) -> None:
        processor.save_pretrained(path)
        recipe.save(path)
        training = {"seed": seed, "steps": step, "images_seen": step * plan.global_batch_size}
        write_text(path / "training.json", json.dumps(training, indent=2))

    def evaluate() -> None:
        model.eval()
        with ema.in_place_of_parameters(model) if ema is not None else nullcontext():
            for evaluation in evaluations:
                log.write_evaluation(step, evaluation(model, processor))
        model.train()

    def save() -> None:
        images_seen = step * plan.global_batch_size
        state = {"step": step, "seed": seed, "recipe": recipe.title, "images_seen": images_seen}
        if source.streaming:
            state["stream"] = gather_object([loader.state_dict()])  # one of each process
        if accelerator.is_main_process:
            save_checkpoint(folder, step, model, optimizer, ema, state, add_what_belongs_to_it, keep_checkpoints)

    last_step = plan.total_steps if max_steps is None else min(max_steps, plan.total_steps)
    checkpoint_every = checkpoint_every or plan.steps_per_epoch
    evaluate_every = evaluate_every or plan.steps_per_epoch
    batches, stops = iter(loader), step >= last_step
    bar = tqdm(
        total=plan.total_steps * plan.global_batch_size,
        initial=step * plan.global_batch_size,
        unit=" images",
        unit_scale=True,
        desc=recipe.name,
        mininterval=0.1 if sys.stderr.isatty() else 30,  # a log file would get ten lines a second
        disable=not accelerator.is_main_process,
    )
    with bar:
        while not stops:
            # ---- step: the gradient of one global batch, in parts, then AdamW
            began, waited, loss = time.monotonic(), 0.0, 0.0
            for part in range(plan.accumulation):
                asked = time.monotonic()
                batch = next(batches)
                waited += time.monotonic() - asked
                log.bad_images(batch["bad_images"])
                pixels, timesteps, noise = (
                    batch[name].to(accelerator.device, non_blocking=True)
                    for name in ("pixel_values", "timesteps", "noise")
                )
                # Processes exchange gradients in the last part only.
                is_last = part == plan.accumulation - 1
                with nullcontext() if is_last else accelerator.no_sync(wrapped):
                    output = wrapped(processor.normalize_pixels(pixels), timesteps=timesteps, noise=noise)
                    accelerator.backward(output.loss / plan.accumulation)
                loss = loss + output.loss.detach() / plan.accumulation
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
            log.add(loss, norm, waited, time.monotonic() - began, plan.global_batch_size)
            stops = step == last_step or is_over(max_minutes, started, accelerator)
            saves = stops or step % checkpoint_every == 0
            if saves or step % log_every == 0:
                line = log.summary(step, epoch=step / plan.steps_per_epoch, learning_rate=learning_rate)
                check_finite(line, folder)
                log.write(line)
                shown = dict(loss=f"{line['loss']:.4f}", wait=f"{line['data_wait']:.0%}", lr=f"{learning_rate:.1e}")
                bar.set_postfix(shown, refresh=False)

            # ---- save: after the evaluation, so that none is missing if the run dies between the two
            if evaluations and (step % evaluate_every == 0 or step == plan.total_steps):
                if accelerator.is_main_process:
                    evaluate()
                accelerator.wait_for_everyone()
            if saves:
                save()
                accelerator.wait_for_everyone()

    if step < plan.total_steps:
        accelerator.print(f"stopped at step {step:,} of {plan.total_steps:,}; run the same command again to go on")
    elif accelerator.is_main_process:
        with ema.in_place_of_parameters(model) if ema is not None else nullcontext():
            save_encoder(encoder, model, add_what_belongs_to_it)
        if rate := log.images_per_second():
            flops = rate * training_flops_per_image(config)
            accelerator.print(f"{rate:,.1f} images/s · {flops / 1e12:.2f} TFLOP/s in the model's matrix products")
        accelerator.print(f"encoder: {encoder}")
    accelerator.wait_for_everyone()
    # DDP goes before its process group: if it held the last reference, the group would end its threads while the
    # interpreter is locked, and now and then wait for one of them for ever.
    output = loss = wrapped = None
    accelerator.free_memory()
    accelerator.end_training()
    return encoder if step == plan.total_steps else None


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


def stream_position(state: dict, accelerator: Accelerator) -> dict | None:
    """Where this process stands in a stream, None in other data.

    Raises:
        RunError: the checkpoint was saved by another number of processes.
    """
    positions = state.get("stream")
    if positions is None:
        return None
    if len(positions) != accelerator.num_processes:
        raise RunError(
            f"The stream's position was saved by {len(positions)} processes, not {accelerator.num_processes}; "
            "a stream can only be resumed on the layout that saved it."
        )
    return positions[accelerator.process_index]


def check_finite(line: dict, folder: Path) -> None:
    """Raises RunError, before anything is saved, if the loss or the gradient of a report is not finite."""
    if math.isfinite(line["loss"]) and math.isfinite(line["gradient_norm"]):
        return
    found = checkpoints(folder)
    raise RunError(
        f"The loss is {line['loss']} and the gradient's norm {line['gradient_norm']} at step {line['step']}; "
        f"{f'{found[-1]} is intact' if found else 'nothing has been saved'}, and another --output-dir with a smaller "
        "train.base_learning_rate or train.max_grad_norm may go further."
    )


def is_over(max_minutes: float | None, started: float, accelerator: Accelerator) -> bool:
    """Whether the time is up in any process."""
    if max_minutes is None:
        return False
    over = torch.tensor(float(time.monotonic() - started > 60 * max_minutes), device=accelerator.device)
    return bool(accelerator.reduce(over).item())


def save_encoder(folder: Path, model: LDAEForPreTraining, extras: Callable[[Path], None]) -> None:
    """The encoder as a model repository."""

    def write(path: Path) -> None:
        with quietly():
            model.ldae.save_pretrained(path)
        extras(path)

    write_folder(folder, write)
