"""Pre-training, one function in stages: resolve, build, resume, step, report, save.

Every random choice of the data (order, crop, timestep, noise) is a pure function of seed, epoch and sample, so the
state of a run is its step, its weights and its optimizer, and for a stream its position; running the same command again
goes on where the last checkpoint stands, on this layout of processes and workers or another.
"""

import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel

from ..image_processing_ldae import LDAEImageProcessor
from ..manifest import MANIFEST, write_text
from ..recipes import load_recipe
from .checkpointing import CheckpointWriter, checkpoints, load_checkpoint, save_checkpoint
from .circumstances import commit, machine
from .data import load_images, loading_options, train_loader
from .data_parallel import settle_buckets
from .denoising import Denoising
from .hardware import peak_flops
from .hub_push import BackgroundPush
from .loop import Gradient, Loop
from .masking import Masking
from .memory import attention_of
from .metrics_log import MetricsLog
from .optimization import ExponentialMovingAverage, Plan, adamw, update
from .pictures import watched_images
from .publishing import published
from .replay import note_failure
from .run_folder import check_options, check_same_run, check_start_fits, identity, newest_checkpoint
from .session import RunError, Session, make_accelerator
from .sharding import whole
from .starting_point import StartingPoint, check_start


PICTURES = 100  # of a run: those of 1,600 epochs would take gigabytes

# Called with the unwrapped model, an `LDAEForPreTraining` or the baseline's `MaskedAutoencoder` (in eval mode, with the
# EMA's weights if there is one), and the processor; returns numbers for the log.
Evaluation = Callable[[PreTrainedModel, LDAEImageProcessor], dict[str, float]]


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
    tokenizer: str | Path | None = None,
    start_from: str | Path | None = None,
    perceptual_weights: str | Path | None = None,
    cache_latents: bool = False,
    quarantine: str | Path | None = None,
    seed: int = 0,
    per_device_batch_size: int | None = None,
    num_workers: int = 2,
    mixed_precision: str = "bf16",
    deterministic: bool = False,
    attn_implementation: str | None = None,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    log_every: int = 20,
    evaluate_every: int | None = None,
    evaluations: tuple[Evaluation, ...] | list[Evaluation] = (),
    watched: int = 8,
    report_to: tuple[str, ...] | list[str] = (),
    max_steps: int | None = None,
    max_minutes: float | None = None,
    push_to_hub: str | None = None,
    hub_private: bool = False,
    hub_pictures: bool = True,
) -> Path | None:
    """Pre-trains l-DAE, or goes on with a run that stands in `output_dir`.

    Writes into `output_dir`: `run.json`, `processor/`, `tokenizer/` (if it is a learned one), `checkpoints/step-…/`,
    `metrics.jsonl`, `sessions.jsonl` (when it ran, where, and why it ended), `pictures/`, `bad_images.jsonl` (if there
    are any), `failures/` (if the loss was not finite) and at the end `encoder/`, which `AutoModel.from_pretrained`
    loads; of an EMA's weights, if there is one. Weights are kept in torch's default dtype.

    Args:
        recipe, tier, overrides: as in [`load_recipe`].
        dataset: images instead of the recipe's data set: a Hub name, a folder, or a loaded `datasets.Dataset`.
        streaming: read a data set from the Hub without downloading it first. It can be resumed only with the same
            number of processes, workers and images per forward pass.
        num_images: of an epoch, for a stream that does not say it.
        image_column, label_column: names of the columns, detected if not given.
        processor: a folder with a fitted processor of the same image size, patch and latents; by default one is fitted
            to the training crops.
        tokenizer: a folder that [`train_tokenizer`] wrote, for a recipe with a learned tokenizer; by default it is
            trained first, in `output_dir`. Its processor is used if no other is given.
        start_from: another training's weights to begin with, instead of new ones: a run's folder, a checkpoint's, or a
            published repository's, by its folder or its name on the Hub. Its processor and its tokenizer come with it.
            A run that has a checkpoint goes on from that, and its source may have changed or gone.
        perceptual_weights: as in [`train_tokenizer`].
        cache_latents: encode every image once, in fp32, and train on what is kept; for latent targets and centre crops.
            (Without it images are encoded under the precision of the run.)
        quarantine: a file that `ldae data check` wrote, of images to leave out.
        seed: of initialisation, order, crops, timesteps and noise.
        per_device_batch_size: images of one forward pass; the rest of the global batch is accumulated.
        num_workers: processes that decode images.
        mixed_precision: `"bf16"` or `"no"`. The PCA, the tables and the loss are fp32 in either.
        deterministic: the same bits in every run on the same kind of GPU, at some cost; a CPU gives them anyway.
        attn_implementation: `"sdpa"`, `"eager"`, `"flash_attention_2"`; default SDPA, and eager for bf16 on a CPU,
            where SDPA's backward is slow.
        gradient_checkpointing: recompute activations in the backward pass, for memory.
        compile: `torch.compile` the model.
        checkpoint_every: steps between checkpoints, default one epoch. keep_checkpoints: how many stay.
        log_every: steps between lines of `metrics.jsonl`.
        evaluations: callables, each with the model and the processor, that return numbers for the log.
        evaluate_every: steps between evaluations, default an epoch.
        watched: images of which a picture is painted at evaluations, a hundred times in a run at most; 0 for none.
        report_to: accelerate's trackers beside the log, for example `"tensorboard"`.
        max_steps, max_minutes: stop early, with a checkpoint; the same command goes on from there.
        push_to_hub: `owner/name` on the Hub, to which the run is pushed after each checkpoint and at its end, by a
            process of its own (`push.log`) that cannot disturb it. hub_private: of a repository that is made for it.
            hub_pictures: with the newest picture of the run, which shows images of the data set.

    Returns:
        The encoder's folder, or None if the run stopped early.

    Raises:
        RunError: an option is out of range, the folder holds another run or is in use by one, a checkpoint cannot be
            written, or the loss is not finite.
        DamagedError: all checkpoints are damaged.
        ValueError: from the recipe, the data, the processor or the plan.
        Interrupted: by SIGTERM, SIGINT, SIGUSR1 or SIGHUP, with all that had been done saved; a SystemExit of code 75.
    """
    options = SimpleNamespace(**locals())
    at_least_one = dict(
        checkpoint_every=checkpoint_every,
        keep_checkpoints=keep_checkpoints,
        log_every=log_every,
        evaluate_every=evaluate_every,
    )
    check_options(at_least_one, mixed_precision)
    options.recipe = load_recipe(recipe, tier, overrides)
    options.output_dir = Path(output_dir)
    accelerator = make_accelerator(options.output_dir, mixed_precision, report_to, deterministic)
    with Session(accelerator, options.output_dir) as session:
        return run(session, options)


def run(session: Session, options: SimpleNamespace) -> Path | None:
    """[`pretrain`] within a session; the options are its arguments."""
    started = time.monotonic()

    # ---- resolve: what this run is
    accelerator, output_dir, recipe, seed = session.accelerator, options.output_dir, options.recipe, options.seed
    method, data = (Masking if recipe.is_masked else Denoising)(recipe, options), recipe.data
    run = {"seed": seed, "recipe": recipe.to_dict()}
    check_same_run(output_dir, run)
    encoder = output_dir / "encoder"
    push = BackgroundPush(output_dir, options.push_to_hub, options.hub_private, options.hub_pictures, session)
    if (encoder / MANIFEST).is_file():
        accelerator.print(f"this run is finished; encoder: {encoder}")
        push.finish()
        return encoder
    check_start(options.start_from, options.processor, options.tokenizer)
    has_begun = (output_dir / "run.json").is_file() and checkpoints(output_dir / "checkpoints")
    begun = json.loads((output_dir / "run.json").read_text()) if has_begun else None
    # Of a run that has begun it is in the checkpoints, wherever its source has gone since.
    start = None if options.start_from is None or begun else StartingPoint(options.start_from, session)
    if start is not None:
        options.processor, options.tokenizer = start.folder, start.tokenizer
        if other := check_start_fits(start, method.config):
            accelerator.print(f"warning: {start.source} was trained for another task: {'; '.join(other)}")
    dataset = data["dataset"] if options.dataset is None else options.dataset
    told = {
        key: getattr(options, key) for key in ("streaming", "image_column", "label_column", "num_images", "quarantine")
    }
    source = session.together(lambda: load_images(dataset, data["train_split"], **told), at_once=True)
    method.check(source)
    plan = Plan.derive(recipe, len(source), accelerator.num_processes, options.per_device_batch_size)
    run |= {"num_images": plan.num_images, "streaming": source.streaming, "left_out": source.left_out}
    run |= {"start_from": begun.get("start_from") if begun else start and start.fingerprint}
    check_same_run(output_dir, run)
    session.own()
    check_same_run(output_dir, run)  # again: another run may have begun here, and ended, since
    session.on_main(lambda: write_text(output_dir / "run.json", json.dumps(run, indent=2)))
    layout = {"per_device_batch_size": plan.per_device_batch_size, "accumulation": plan.accumulation}
    session.begin(name=recipe.title, total_steps=plan.total_steps, num_workers=options.num_workers, **layout)

    # ---- build: processor, tokenizer, model, optimizer
    loading = loading_options(recipe, seed, options.num_workers)
    left = None if options.max_minutes is None else options.max_minutes - (time.monotonic() - started) / 60
    if not method.prepare(source, session, loading, left):  # the time is over
        session.stopped_by_limit = True
        return None
    session.leave_if_asked()
    torch.manual_seed(seed)
    attention = options.attn_implementation or attention_of(accelerator.device.type, options.mixed_precision)
    model = method.build(session, attention)
    if start is not None:
        start.load_into(model)
    if options.gradient_checkpointing:
        model.activation_checkpointing_enable()
    if options.compile:
        model.compile()  # inside DDP: accumulation and activation checkpointing then compile as they do without it
    optimizer = adamw(model, recipe.train["betas"], recipe.train["weight_decay"])
    if accelerator.is_fsdp2:
        # Autocast as without sharding: FSDP's own policy would round pixels and noise to bf16 too.
        accelerator.state.fsdp_plugin.mixed_precision_policy = None
    wrapped, _ = accelerator.prepare(model, optimizer)  # FSDP2 shards the parameters, in the optimizer too
    ema = None if plan.ema_decay is None else ExponentialMovingAverage(model, plan.ema_decay)
    if start is not None:
        start.load_average(ema)

    # ---- resume: the newest checkpoint, if there is one
    found = newest_checkpoint(output_dir / "checkpoints", session)
    resumed = load_checkpoint(found, model, optimizer, ema) if found else {"step": 0}
    step = resumed["step"]
    cached = method.cache_inputs(model, source, session, loading)
    loader = train_loader(
        source,
        **method.draws,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.per_device_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=step,
        num_steps=plan.total_steps,
        state=stream_position(resumed, accelerator),
        cached_tokens=cached,
        **loading,
    )
    log = MetricsLog(output_dir, accelerator, resume_at=step, settings=identity(run))
    log.bad_images(cached.bad_images if cached is not None and accelerator.is_main_process else [])
    accelerator.print("\n".join([f"{recipe.title}: {recipe.why}", *plan.lines()]))
    if step:
        accelerator.print(f"resuming at step {step:,} from {found}")
    writer = CheckpointWriter(
        output_dir / "checkpoints", options.keep_checkpoints, accelerator.is_main_process, written=push.begin
    )
    evaluate_every = options.evaluate_every or plan.steps_per_epoch
    paint_every = evaluate_every * -(-plan.total_steps // (evaluate_every * PICTURES))
    watched = None
    if options.watched and accelerator.is_main_process:
        watched = watched_images(source, method.config.image_size, options.watched)
    batches, sample_ids = iter(loader), []  # the latter of one step
    settle_buckets(wrapped, lambda: wrapped(**method.blank_inputs(plan.per_device_batch_size, accelerator.device)).loss)

    told_of_training = {
        # Where somebody's folders are is nobody's business.
        "dataset": f"path/to/{Path(source.name).name}" if Path(source.name).is_dir() else source.name,
        "start_from": run["start_from"],
        "mixed_precision": options.mixed_precision,
        "processes": accelerator.num_processes,
        "machine": machine(),
        "commit": commit(),
    }

    def add_what_belongs_to_it(path: Path, step: int) -> None:
        method.add_parts(path)
        recipe.save(path)
        facts = {"seed": seed, "steps": step, "images_seen": step * plan.global_batch_size} | told_of_training
        write_text(path / "training.json", json.dumps(facts, indent=2))

    def evaluate(step: int) -> None:
        with published(model, ema, session) as shown:
            session.on_main(lambda: look_at(shown, step))

    def look_at(shown: PreTrainedModel, step: int) -> None:
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices), session.signals.breaking_off():
            torch.manual_seed(seed + step)  # what it draws is a function of these, whatever has been evaluated before
            if watched is not None and (step % paint_every == 0 or step == plan.total_steps):
                (output_dir / "pictures").mkdir(exist_ok=True)
                method.picture(shown, watched).save(output_dir / "pictures" / f"step-{step:08d}.png")
            found = [evaluation(shown, method.processor) for evaluation in options.evaluations]
        if found:
            log.write_evaluations(step, found)

    def save(step: int) -> None:
        images_seen = step * plan.global_batch_size
        state = {"step": step, "seed": seed, "recipe": recipe.title, "images_seen": images_seen}
        if source.streaming:
            state["stream"] = gather_object([loader.state_dict()])  # one of each process
        save_checkpoint(writer, step, model, optimizer, ema, state, partial(add_what_belongs_to_it, step=step))

    def take_gradient(step: int) -> Gradient:
        """The gradient of one global batch, in parts."""
        waited, loss = 0.0, 0.0
        sample_ids.clear()
        for part in range(plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            log.bad_images(batch["bad_images"])
            sample_ids.append(batch["sample_ids"])
            inputs = {name: batch[name].to(accelerator.device, non_blocking=True) for name in method.input_names}
            if "pixel_values" in inputs:
                inputs["pixel_values"] = method.processor.normalize_pixels(inputs["pixel_values"])
            # Processes exchange gradients in the last part only.
            is_last = part == plan.accumulation - 1
            with nullcontext() if is_last else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    output = wrapped(**inputs)
                accelerator.backward(output.loss / plan.accumulation)
            loss = loss + output.loss.detach() / plan.accumulation
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        norm = torch.nn.utils.get_total_norm(gradients)
        if recipe.train["max_grad_norm"] is not None:
            torch.nn.utils.clip_grads_with_norm_(model.parameters(), recipe.train["max_grad_norm"], norm)
        return Gradient({"loss": loss, "gradient_norm": whole(norm)}, waited)

    def apply_gradient(step: int) -> dict[str, torch.Tensor]:
        update(optimizer, plan.learning_rate_at(step))
        if ema is not None:
            ema.update(model)
        return {}

    def explain(step: int, reason: str, numbers: dict[str, float]) -> str:
        facts = dict(reason=reason, step=step, epoch=step // plan.steps_per_epoch, seed=seed, **numbers)
        facts |= dict(dataset=source.name, streaming=source.streaming, num_images=plan.num_images)
        facts |= {key: getattr(options, key) for key in ("image_column", "label_column", "mixed_precision")}
        facts["quarantine"] = options.quarantine and str(options.quarantine)
        facts["sample_ids"] = sum(gather_object([torch.cat(sample_ids).tolist()]), [])
        extras = partial(add_what_belongs_to_it, step=step)
        return note_failure(output_dir / "failures", facts, model, extras, session)

    loop = Loop(
        name=recipe.name,
        writer=writer,
        plan=plan,
        session=session,
        log=log,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        evaluate_every=evaluate_every,
        max_steps=options.max_steps,
        max_minutes=options.max_minutes,
        started=started,
        flops_per_image=method.flops_per_image,
        peak_flops=peak_flops(accelerator.device, options.mixed_precision),
    )
    looks = options.watched or options.evaluations
    step = loop.run(step, take_gradient, apply_gradient, save, evaluate if looks else None, explain)

    if step < plan.total_steps:
        accelerator.print(f"stopped at step {step:,} of {plan.total_steps:,}; run the same command again to go on")
        push.finish()
        return None
    with published(model, ema, session) as shown:
        session.on_main(lambda: method.save_encoder(encoder, shown, partial(add_what_belongs_to_it, step=step)))
    if rate := log.images_per_second():
        flops = rate * method.flops_per_image
        accelerator.print(f"{rate:,.1f} images/s · {flops / 1e12:.2f} TFLOP/s in the model's matrix products")
    accelerator.print(f"encoder: {encoder}")
    push.finish()
    return encoder


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
