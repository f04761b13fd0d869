"""Fine-tuning as a run, one function in stages as pre-training: resolve, build, resume, step, report, save.

Every random choice is a function of the seed and, for order, crop and augmentation, of epoch and sample, for mixing and
dropped paths of the step. So the state of a run is its step, its weights, their optimizer and their average.
"""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from ...manifest import write_text
from ...training.checkpointing import CheckpointWriter, load_checkpoint, save_checkpoint
from ...training.data_parallel import settle_buckets
from ...training.loop import Gradient, Loop
from ...training.memory import attention_of
from ...training.metrics_log import MetricsLog
from ...training.optimization import ExponentialMovingAverage, update
from ...training.run_folder import check_options, check_same_run, identity, newest_checkpoint
from ...training.session import RunError, Session, make_accelerator
from ..encoders import open_encoder
from ..full_probe.images import ProbeImages
from ..full_probe.report import hand_over
from ..inputs import recipe_beside
from .batches import training_batches
from .classifiers import build_classifier
from .drop_path import DropPath
from .folder import RESULT, TASK, check_task, run_facts
from .layer_decay import layered_adamw
from .mixing import Mixing
from .recipe import BETAS, FineTuningPlan, FineTuningRecipe
from .result import result_row, save_model, test_accuracy, write_result


PRETRAINED = FineTuningRecipe()


def finetune(
    encoder: str | Path,
    dataset=None,
    *,
    output_dir: str | Path,
    recipe: FineTuningRecipe = PRETRAINED,
    from_scratch: bool = False,
    keep_projection: bool = False,
    timestep: int | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    seed: int = 0,
    per_device_batch_size: int | None = None,
    num_workers: int = 2,
    decoded_gigabytes: float = 1.0,
    mixed_precision: str = "bf16",
    checkpoint_every: int | None = None,
    evaluate_every: int | None = None,
    keep_checkpoints: int = 2,
    log_every: int = 20,
    report_to: Sequence[str] = (),
    max_steps: int | None = None,
    max_minutes: float | None = None,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
) -> dict | None:
    """Fine-tunes all weights of an encoder for the classes of a data set, or goes on with the run in `output_dir`.

    Average-pooled features -> LayerNorm -> linear (which class, and in which order, see `classifiers`). An l-DAE starts
    folded: as the same function, but of all values of a patch, which are trained from then on. The test images are
    looked at after every epoch, with the weights and with their average; the result is that of the last epoch, with the
    average if there is one.

    `output_dir` holds `run.json`, `checkpoints/`, `metrics.jsonl`, `sessions.jsonl`, and at the end `model/`, which
    `AutoModelForImageClassification` loads without this package, and `result.json`.

    Args:
        encoder: what [`open_encoder`] opens: of l-DAE, transformers (ViT, MAE, I-JEPA, DINOv2) or timm.
        dataset: what [`load_images`] opens with both splits; by default that of the recipe beside the encoder.
        recipe: of the training; default the paper's for ImageNet.
        from_scratch: train the same network from new weights, the floor of fine-tuning. (A layer decay of 1 suits it:
            its lower layers hold nothing worth keeping.)
        keep_projection: an ablation for l-DAE: its patch embedding stays in the subspace that it was pre-trained on.
        timestep: of an l-DAE; default its `feature_timestep`.
        seed: of head, order, crops, augmentation, mixing and dropped paths.
        per_device_batch_size: images of one forward pass; the rest of the global batch is accumulated.
        num_workers: processes that cut and augment crops. decoded_gigabytes: memory of each process for decoded images.
        mixed_precision: `"bf16"` or `"no"`; tests are in fp32 in either.
        checkpoint_every, evaluate_every: steps, default an epoch. keep_checkpoints, log_every, report_to, max_steps,
            max_minutes: as for [`pretrain`].
        output: a JSON file for the result. ledger: a JSON-lines file that it is appended to.

    Returns:
        The result as plain JSON values: `top1` (from 10 classes on `top5`) in percent, `protocol`, and the
        circumstances; None if the run stopped early.

    Raises:
        RunError: an option is out of range, or the folder holds another run or is in use by one.
        ValueError: from the encoder or the data set.
        Interrupted: by a signal, with all that had been done saved; a SystemExit of code 75.
    """
    options = SimpleNamespace(**locals())
    at_least_one = ("checkpoint_every", "evaluate_every", "keep_checkpoints", "log_every")
    check_options({name: getattr(options, name) for name in at_least_one}, mixed_precision)
    options.output_dir = Path(output_dir)
    accelerator = make_accelerator(options.output_dir, mixed_precision, report_to)
    if accelerator.is_fsdp2:
        raise RunError("Fine-tuning is not sharded; configure accelerate for DDP.")
    with Session(accelerator, options.output_dir) as session:
        return run(session, options)


def run(session: Session, options: SimpleNamespace) -> dict | None:
    """[`finetune`] within a session; the options are its arguments."""
    started = time.monotonic()

    # ---- resolve: what this run is
    accelerator, output_dir, seed = session.accelerator, options.output_dir, options.seed
    device = accelerator.device
    check_task(output_dir)
    told = {key: getattr(options, key) for key in ("train_split", "test_split", "image_column", "label_column")}
    images = session.together(
        lambda: ProbeImages.open(options.dataset, recipe_beside(options.encoder), **told), at_once=True
    )
    encoder = open_encoder(options.encoder, timestep=options.timestep, device="cpu")
    recipe = options.recipe.for_width(encoder.dim)
    plan = FineTuningPlan.of(recipe, len(images.train), accelerator.num_processes, options.per_device_batch_size)
    run = run_facts(options, encoder, images, recipe)
    check_same_run(output_dir, run)

    def result() -> dict:
        row = json.loads((output_dir / RESULT).read_text())
        session.on_main(lambda: hand_over(row, options.output, options.ledger))
        return row

    if (output_dir / RESULT).is_file():
        accelerator.print(
            f"this run is finished; its result is {output_dir / RESULT}, its model {output_dir / 'model'}"
        )
        return result()
    session.own()
    check_task(output_dir)
    check_same_run(output_dir, run)  # again: another run may have begun here, and ended, since
    session.on_main(lambda: write_text(output_dir / "run.json", json.dumps(run, indent=2)))
    session.begin(name=TASK, total_steps=plan.total_steps, num_workers=options.num_workers)

    # ---- build: classifier, optimizer, average
    names = images.train.label_names or [str(number) for number in range(images.num_classes)]
    attention = attention_of(device.type, options.mixed_precision)
    classifier = build_classifier(encoder, names, seed=seed, from_scratch=options.from_scratch, attention=attention)
    if options.keep_projection and classifier.projector is None:
        raise RunError(f"{options.encoder} is no l-DAE and has no projection to keep; leave --keep-projection out.")
    model, processor = classifier.model.to(device).train(), classifier.processor
    drop_path = DropPath(classifier.branch_ends(), recipe.drop_path, seed)
    optimizer = layered_adamw(model, classifier.blocks, recipe.layer_decay, recipe.weight_decay, BETAS)
    wrapped, _ = accelerator.prepare(model, optimizer)
    ema = None if plan.ema_decay is None else ExponentialMovingAverage(model, plan.ema_decay)

    # ---- resume: the newest checkpoint, if there is one
    found = newest_checkpoint(output_dir / "checkpoints", session)
    step = load_checkpoint(found, model, optimizer, ema)["step"] if found else 0
    batches = iter(training_batches(images.train, processor.image_size, recipe, plan, step, options, accelerator))
    mixing = Mixing(images.num_classes, recipe.mixup, recipe.cutmix, recipe.cutmix_share, recipe.label_smoothing, seed)
    log = MetricsLog(output_dir, accelerator, resume_at=step, settings=identity(run))
    accelerator.print("\n".join([f"fine-tuning {encoder.name} as {type(model).__name__}", *plan.lines()]))
    if step:
        accelerator.print(f"resuming at step {step:,} from {found}")
    writer = CheckpointWriter(output_dir / "checkpoints", options.keep_checkpoints, accelerator.is_main_process)
    blank = torch.zeros(plan.per_device_batch_size, 3, *[processor.image_size] * 2, device=device)
    settle_buckets(wrapped, lambda: wrapped(blank).logits.sum())

    def measure(progress: bool) -> dict[str, dict]:
        averages = {"": None} if ema is None else {"": None, "_ema": ema.average}
        return test_accuracy(model, averages, processor, images.test, options.num_workers, progress)

    def evaluate(step: int) -> None:
        def look() -> None:
            with session.signals.breaking_off():
                found = measure(progress=False)
            named = [(f"test_{key}{which}", value) for which, scores in found.items() for key, value in scores.items()]
            log.write_evaluations(step, [{name: value for name, value in named if "bad_images" not in name}])

        session.on_main(look)

    def save(step: int) -> None:
        state = {"step": step, "seed": seed, "task": TASK}
        save_checkpoint(writer, step, model, optimizer, ema, state, lambda path: None)

    def take_gradient(step: int) -> Gradient:
        """The gradient of one global batch, in parts."""
        waited, loss = 0.0, 0.0
        for part in range(plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            log.bad_images(batch["bad_images"])
            pixels = processor.normalize_pixels(batch["pixel_values"].to(device, non_blocking=True))
            pixels = pixels.to(torch.get_default_dtype())
            pixels, targets = mixing(pixels, batch["labels"].to(device, non_blocking=True), step)
            first = (accelerator.process_index * plan.accumulation + part) * plan.per_device_batch_size
            places = range(first, first + plan.per_device_batch_size)
            drop_path.draw(step, places, plan.global_batch_size, device)
            # Processes exchange gradients in the last part only.
            with nullcontext() if part == plan.accumulation - 1 else accelerator.no_sync(wrapped):
                with accelerator.autocast():
                    logits = wrapped(pixels).logits
                part_loss = F.cross_entropy(logits.to(targets.dtype), targets) / plan.accumulation
                accelerator.backward(part_loss)
            loss = loss + part_loss.detach()
        gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
        return Gradient({"loss": loss, "gradient_norm": torch.nn.utils.get_total_norm(gradients)}, waited)

    def apply_gradient(step: int) -> dict[str, torch.Tensor]:
        update(optimizer, plan.learning_rate_at(step))
        if options.keep_projection:
            classifier.project_patch_embedding()
        if ema is not None:
            ema.update(model)
        return {}

    loop = Loop(
        name="fine-tuning",
        writer=writer,
        plan=plan,
        session=session,
        log=log,
        log_every=options.log_every,
        checkpoint_every=options.checkpoint_every,
        evaluate_every=options.evaluate_every,
        max_steps=options.max_steps,
        max_minutes=options.max_minutes,
        started=started,
    )
    step = loop.run(step, take_gradient, apply_gradient, save, evaluate)
    if step < plan.total_steps:
        accelerator.print(f"stopped at step {step:,} of {plan.total_steps:,}; run the same command again to go on")
        return None

    def report() -> None:
        with nullcontext() if ema is None else ema.in_place_of_parameters(model):
            [scores] = test_accuracy(model, {"": None}, processor, images.test, options.num_workers, True).values()
            save_model(output_dir / "model", model, processor, run)
        row = result_row(
            options, encoder.facts, encoder.name, classifier, images, recipe, plan, scores, len(log.seen_bad)
        )
        write_result(row, output_dir)

    session.on_main(report)
    accelerator.print(f"model: {output_dir / 'model'}")
    return result()
