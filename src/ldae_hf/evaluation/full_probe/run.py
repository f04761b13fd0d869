"""The paper's linear probe as a run: one function in stages, as pre-training: resolve, build, resume, step, report.

The encoder is frozen: a step collects the features of its images, from all processes, and then every process takes the
same step on all of them. So BatchNorm sees the whole batch, and the number of processes changes nothing.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch

from ...manifest import write_text
from ...training.checkpointing import CheckpointWriter, load_parts, save_parts
from ...training.circumstances import circumstances
from ...training.data import labelled_loader
from ...training.loop import Gradient, Loop
from ...training.metrics_log import MetricsLog, read_lines
from ...training.run_folder import check_options, newest_checkpoint
from ...training.session import Interrupted, Session, make_accelerator
from ..features import FEATURE_CACHE, Features, extract
from ..inputs import recipe_beside
from ..metrics import accuracy
from .features import choose_features
from .head import ProbeHead, make_optimizer, set_learning_rates
from .images import ProbeImages
from .protocol import CROP_SCALE, TASK, Protocol
from .report import check_same_probe, hand_over, rerun, training_of


RESULT = "result.json"


def run_full_probe(
    encoder,
    dataset=None,
    *,
    output_dir: str | Path,
    optimizer: str = "lars",
    learning_rates: Sequence[float] | None = None,
    epochs: int = 90,
    warmup_epochs: float | None = None,
    batch_size: int | None = None,
    layer: int | str = "last",
    pool: str = "mean",
    timestep: int | None = None,
    noise: str = "clean",
    dtype: str = "float32",
    floor: str | None = None,
    train_split: str | None = None,
    test_split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    processor=None,
    seed: int = 0,
    per_device_batch_size: int | None = None,
    num_workers: int = 2,
    decoded_gigabytes: float = 1.0,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    max_steps: int | None = None,
    max_minutes: float | None = None,
    cache_dir: str | Path | None = FEATURE_CACHE,
    output: str | Path | None = None,
    ledger: str | Path | None = None,
) -> dict | None:
    """The paper's linear probe of an encoder, or goes on with the one that stands in `output_dir`.

    Pooled tokens -> BatchNorm without affine -> linear, on random resized crops and flips, in batches of 16,384 images;
    tested on centre crops after every epoch, and the last one counts. `output_dir` holds `run.json`, `checkpoints/`,
    `metrics.jsonl`, `sessions.jsonl` and at the end `result.json`.

    Args:
        encoder, processor, timestep, dtype: as for [`open_encoder`].
        dataset: what [`load_images`] opens with `train_split` and `test_split`; by default the data set and the splits
            of the recipe in the encoder's folder.
        optimizer, learning_rates, epochs, warmup_epochs, batch_size: as for [`Protocol.resolve`].
        layer, pool: as for [`PooledFeatures`].
        noise: `"clean"`; `"fresh"`: noise of the timestep on each image, other in every epoch (Table 5, "noisy input"),
            and for the test frozen by sample id; `"frozen"`: by sample id in both.
        floor: a name out of [`FLOORS`], to probe that floor of the encoder in its place.
        seed: of the classifier, order, crops, noise and floor.
        per_device_batch_size: images of a forward pass, default at most 256. num_workers: processes that cut crops.
        decoded_gigabytes: memory for decoded training images, in each process.
        checkpoint_every: steps, default an epoch. max_steps, max_minutes: stop early; the same command goes on.
        cache_dir: where the test features are kept.
        output: a JSON file for the result. ledger: a JSON-lines file that it is appended to, once.

    Returns:
        The result as plain JSON values, None if the run stopped early: `top1` (from 10 classes on `top5`) in percent,
        of the first learning rate after the last step; the same of all `learning_rates`, and `best_top1`, the best of
        them on the test set, which is optimistic; `train_top1` on the last, augmented, batch; `protocol`, `rerun`, and
        the circumstances.

    Raises:
        RunError: an option is out of range, or the folder holds another run.
        ValueError: from the encoder, the processor or the data set.
    """
    options = SimpleNamespace(**locals())
    check_options(dict(checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints), "no")
    options.output_dir = Path(output_dir)
    with Session(make_accelerator(options.output_dir, "no", ()), options.output_dir) as session:
        return run(session, options)


def run(session: Session, options: SimpleNamespace) -> dict | None:
    """`run_full_probe` within a session; the options are its arguments."""
    started = time.monotonic()
    accelerator, output_dir, device = session.accelerator, options.output_dir, session.accelerator.device

    # ---- resolve: what this run is
    recipe = recipe_beside(options.encoder)
    told = {key: getattr(options, key) for key in ("train_split", "test_split", "image_column", "label_column")}
    images = session.together(lambda: ProbeImages.open(options.dataset, recipe, **told), at_once=True)
    chosen = {
        key: getattr(options, key) for key in ("processor", "timestep", "noise", "dtype", "layer", "pool", "floor")
    }
    chosen |= dict(seed=options.seed, device=device)
    features = session.together(lambda: choose_features(options.encoder, images.train, **chosen))
    values = ("optimizer", "learning_rates", "epochs", "warmup_epochs", "batch_size", "seed")
    protocol = Protocol.resolve(len(images.train), **{key: getattr(options, key) for key in values})
    plan = protocol.plan(len(images.train), accelerator.num_processes, options.per_device_batch_size)
    identity = json.loads(json.dumps({"features": features.stamp, **images.identity(), TASK: asdict(protocol)}))
    check_same_probe(output_dir, identity)

    def result() -> dict:
        row = json.loads((output_dir / RESULT).read_text())
        session.on_main(lambda: hand_over(row, options.output, options.ledger))
        return row

    if (output_dir / RESULT).is_file():
        accelerator.print(f"this probe is finished; its result is {output_dir / RESULT}")
        return result()
    session.own()
    check_same_probe(output_dir, identity)  # again: another probe may have begun here, and ended, since
    session.on_main(lambda: write_text(output_dir / "run.json", json.dumps(identity, indent=2)))
    session.begin(name=TASK, total_steps=plan.total_steps, num_workers=options.num_workers)

    # ---- build: the test's features, head, optimizer
    test: list[Features] = []  # of the main process

    def look_at_test() -> None:
        loading = dict(num_workers=options.num_workers, cache_dir=options.cache_dir)
        test.extend(extract([features.compute], images.test, features.image_size, device=device, **loading))

    session.on_main(look_at_test, at_once=True)
    head = ProbeHead(features.dim, images.num_classes, len(protocol.learning_rates), options.seed).to(device)
    optimizer = make_optimizer(head, protocol)
    parts = {"head": (head, optimizer)}

    # ---- resume: the newest checkpoint, if there is one
    found = newest_checkpoint(output_dir / "checkpoints", session)
    step = load_parts(found, parts)["step"] if found else 0
    loader = labelled_loader(
        images.train,
        image_size=features.image_size,
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.per_device_batch_size,
        num_steps=plan.total_steps,
        start_step=step,
        crop_scale=CROP_SCALE,
        seed=options.seed,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        num_workers=options.num_workers,
        decoded_bytes=round(1e9 * options.decoded_gigabytes),
        progress=accelerator.is_main_process,
    )
    log = MetricsLog(output_dir, accelerator, resume_at=step, settings={})
    accelerator.print("\n".join(protocol.lines(plan)))
    if step:
        accelerator.print(f"resuming at step {step:,} from {found}")
    writer = CheckpointWriter(output_dir / "checkpoints", options.keep_checkpoints, accelerator.is_main_process)
    batches = iter(loader)
    done = saved = step

    def save(step: int) -> None:
        nonlocal saved
        saved = step
        save_parts(writer, step, parts, {"step": step}, lambda path: None)

    @torch.no_grad()
    def collect(step: int) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Features (n,D) and labels (n,) of this process's images of a step, and the seconds of waiting for images."""
        parts, labels, waited = [], [], 0.0
        # Noise is frozen by number: other numbers in every epoch are fresh noise.
        first = 0 if options.noise != "fresh" else (1 + step // plan.steps_per_epoch) * len(images.train)
        for _ in range(plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            log.bad_images(batch["bad_images"])
            pixels = batch["pixel_values"].to(device, non_blocking=True)
            parts.append(features.compute(pixels, first + batch["sample_ids"]))
            labels.append(batch["labels"].to(device, non_blocking=True))
        return torch.cat(parts), torch.cat(labels), waited

    def take_gradient(step: int) -> Gradient:
        nonlocal done
        done = step
        collected, labels, waited = session.together(lambda: collect(step), at_once=True)
        losses, top1 = head.losses(*accelerator.gather((collected, labels)))
        losses.sum().backward()  # no classifier's gradient depends on another's loss
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in head.parameters()])
        return Gradient({"loss": losses[0].detach(), "train_top1": top1, "gradient_norm": norm}, waited)

    def apply_gradient(step: int) -> dict[str, torch.Tensor]:
        set_learning_rates(optimizer, protocol, plan.learning_rate_at(step) / plan.learning_rate)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {}

    def measure() -> list[dict]:
        return [accuracy(scores, test[0].labels) for scores in head.scores(test[0].features)]

    def evaluate(step: int) -> None:
        log.write_evaluations(step, [{f"test_{key}": value for key, value in measure()[0].items()}])

    loop = Loop(
        name="full probe",
        writer=writer,
        plan=plan,
        session=session,
        log=log,
        log_every=1,  # of so many images
        checkpoint_every=options.checkpoint_every,
        max_steps=options.max_steps,
        max_minutes=options.max_minutes,
        started=started,
    )
    try:
        step = loop.run(step, take_gradient, apply_gradient, save, lambda step: session.on_main(lambda: evaluate(step)))
    except Interrupted:
        if done > saved:  # it came while features were collected, of a step that nothing has been done of
            session.together(lambda: save(done))
            session.together(writer.wait)
        raise
    if step < plan.total_steps:
        accelerator.print(f"stopped at step {step:,} of {plan.total_steps:,}; run the same command again to go on")
        return None

    # ---- report
    def report() -> None:
        lines = [line for line in read_lines(output_dir / "metrics.jsonl") if "images_per_second" in line]
        entries = measure()
        rates = [{"learning_rate": rate} | entry for rate, entry in zip(protocol.learning_rates, entries, strict=True)]
        row = {
            **training_of(None if options.floor else options.encoder),
            "task": TASK,
            "name": features.name,
            "dim": features.dim,
            **entries[0],
            "best_top1": max(entry["top1"] for entry in entries),
            "learning_rates": rates,
            "train_top1": round(lines[-1]["train_top1"], 2),
            "seconds": round(sum(plan.global_batch_size / line["images_per_second"] for line in lines), 1),
            "floors": {},
            "protocol": {
                "features": features.stamp,
                "image_size": features.image_size,
                "preprocessing": features.preprocessing,
                **images.facts((lines[-1]["bad_images"], test[0].bad_images)),
                TASK: protocol.stamp(plan),
            },
            "rerun": rerun(options, images, protocol, features.timestep),
        }
        text = json.dumps(circumstances() | row, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
        write_text(output_dir / RESULT, text)  # first: what is there is not measured again

    session.on_main(report)
    return result()
