"""The learned tokenizers of section 4.2, trained as a run of their own: order, log, checkpoints and resume are those of
pre-training. A patch-wise one is two matrices; a convolutional one is latent diffusion's KL autoencoder.
"""

import json
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType
from torch import nn

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LEARNED_TOKENIZERS, LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import CONFIG_NAME, LearnedTokenizer, autoencoder_stride, check_geometry, load_autoencoder
from ..manifest import write_folder, write_text
from ..patch_tokenizers import patchify
from ..recipes import Recipe, load_recipe
from .adversarial import PatchDiscriminator, adaptive_weight, discriminator_layers, generator_loss, hinge_loss
from .autoencoders import ConvolutionalTraining, PatchAutoencoderTraining
from .checkpointing import CheckpointWriter, load_parts, save_parts
from .data import ImageSource, crop_loader, load_images, loading_options, train_loader
from .data_parallel import settle_buckets
from .fit_pca import fit_processor
from .loop import Gradient, Loop
from .metrics_log import MetricsLog
from .optimization import Plan, adamw, update
from .perceptual import LPIPS, LabelFeatures, train_label_features
from .pictures import mosaic, watched_images
from .run_folder import check_options, check_same_run, identity, newest_checkpoint
from .sampling import epoch_order
from .session import RunError, Session, make_accelerator


# Of the network of a perceptual loss: few enough images to train it within the time for which processes wait.
LABEL_FEATURES_EPOCHS, LABEL_FEATURES_BATCH, LABEL_FEATURES_IMAGES = 3, 64, 200_000


def train_tokenizer(
    recipe: str = "patch_ae",
    *,
    output_dir: str | Path,
    tier: str | None = None,
    overrides: tuple[str, ...] | list[str] = (),
    dataset=None,
    image_column: str | None = None,
    label_column: str | None = None,
    processor: str | Path | None = None,
    perceptual_weights: str | Path | None = None,
    quarantine: str | Path | None = None,
    seed: int = 0,
    per_device_batch_size: int | None = None,
    num_workers: int = 2,
    mixed_precision: str = "bf16",
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    log_every: int = 20,
    report_to: tuple[str, ...] | list[str] = (),
    max_steps: int | None = None,
    max_minutes: float | None = None,
) -> Path | None:
    """Trains the learned tokenizer of a recipe, or goes on with a run that stands in `output_dir`.

    Writes into `output_dir`: `run.json`, `processor/`, `checkpoints/step-…/`, `metrics.jsonl`, `reconstructions/` (a
    picture an epoch), `perceptual/` where a network is trained for the perceptual loss, and at the end `tokenizer/`,
    which [`LearnedTokenizer.from_pretrained`] loads.

    Args:
        recipe, tier, overrides: as in [`load_recipe`]; the recipe's `tokenizer` section says how it is trained. One
            that names a released autoencoder is measured and written, not trained.
        perceptual_weights: a folder with the weights of LPIPS, where the recipe asks for it; see [`LPIPS`].
        mixed_precision: `"bf16"` or `"no"`; patch-wise tokenizers compute in fp32 in either.
        The others are those of [`pretrain`].

    Returns:
        The tokenizer's folder, or None if the run stopped early.

    Raises:
        RunError: the recipe's tokenizer is not a learned one, an option is out of range, the folder holds another run,
            or the loss is not finite.
        CheckpointError: the newest checkpoint is damaged.
        ValueError: from the recipe, the data, the processor or the plan.
    """
    check_options(
        dict(checkpoint_every=checkpoint_every, keep_checkpoints=keep_checkpoints, log_every=log_every), mixed_precision
    )
    recipe = load_recipe(recipe, tier, overrides)
    with Session(make_accelerator(Path(output_dir), mixed_precision, report_to), Path(output_dir)) as session:
        return train_with(
            session,
            recipe,
            dataset=dataset,
            image_column=image_column,
            label_column=label_column,
            processor=processor,
            perceptual_weights=perceptual_weights,
            quarantine=quarantine,
            seed=seed,
            per_device_batch_size=per_device_batch_size,
            num_workers=num_workers,
            checkpoint_every=checkpoint_every,
            keep_checkpoints=keep_checkpoints,
            log_every=log_every,
            max_steps=max_steps,
            max_minutes=max_minutes,
        )


def train_with(
    session: Session,
    recipe: Recipe,
    *,
    dataset,
    image_column: str | None,
    label_column: str | None,
    processor: str | Path | None,
    perceptual_weights: str | Path | None,
    quarantine: str | Path | None,
    seed: int,
    per_device_batch_size: int | None = None,
    num_workers: int = 2,
    checkpoint_every: int | None = None,
    keep_checkpoints: int = 2,
    log_every: int = 20,
    max_steps: int | None = None,
    max_minutes: float | None = None,
) -> Path | None:
    """`train_tokenizer` within a session, in whose folder it trains."""
    started = time.monotonic()
    accelerator, output_dir = session.accelerator, session.folder

    # ---- resolve: what this run is
    config, data, settings = recipe.model_config(), recipe.data, recipe.tokenizer
    convolutional = config.tokenizer in CONVOLUTIONAL_TOKENIZERS
    if config.tokenizer not in LEARNED_TOKENIZERS:
        raise RunError(
            f"{recipe.title} has the tokenizer {config.tokenizer}, which is not trained: `ldae pretrain` fits the PCA "
            f"itself. Learned tokenizers are {', '.join(LEARNED_TOKENIZERS)}."
        )
    if accelerator.distributed_type == DistributedType.FSDP:
        raise RunError(
            "A tokenizer is small and not trained under FSDP: train it with `ldae tokenizer train`, on one GPU or with "
            "DDP, and give it with --tokenizer."
        )
    run = {"seed": seed, "recipe": recipe.to_dict()}
    check_same_run(output_dir, run)
    folder = output_dir / "tokenizer"
    if (folder / CONFIG_NAME).is_file():
        accelerator.print(f"this run is finished; tokenizer: {folder}")
        return folder
    told = dict(image_column=image_column, label_column=label_column, quarantine=quarantine)
    dataset = data["dataset"] if dataset is None else dataset
    source = session.together(lambda: load_images(dataset, data["train_split"], **told), at_once=True)
    check_trainable(recipe, config, source, perceptual_weights)
    largest = max(1, 2**20 // config.image_size**2) if convolutional else 256  # activations at full resolution
    layout = accelerator.num_processes, per_device_batch_size
    plan = Plan.derive(recipe, len(source), *layout, section="tokenizer", largest=min(256, largest))
    run |= {"num_images": plan.num_images, "left_out": source.left_out}
    check_same_run(output_dir, run)
    session.own()
    check_same_run(output_dir, run)  # again: another run may have begun here, and ended, since
    session.on_main(lambda: write_text(output_dir / "run.json", json.dumps(run, indent=2)))
    session.begin(name=f"{recipe.title}, its tokenizer", total_steps=plan.total_steps, num_workers=num_workers)

    # ---- build: processor, autoencoder, discriminator, optimizers
    loading = loading_options(recipe, seed, num_workers)
    processor = fit_processor(output_dir / "processor", processor, config, source, recipe, session, loading)
    accelerator.print(f"{recipe.title}: {recipe.why}")
    if settings["pretrained"] is not None:
        learned = released_tokenizer(config, settings, source, processor, accelerator, loading)
        return finish(folder, learned, session)
    perceptual = perceptual_network(
        output_dir / "perceptual", config, settings, source, session, perceptual_weights, loading
    )
    watched = watched_images(source, config.image_size, 16)
    torch.manual_seed(seed)
    if convolutional:
        module = ConvolutionalTraining(config, settings, perceptual)
    else:
        module = PatchAutoencoderTraining(config, processor.mean.float(), settings["kl_weight"])
    module.to(accelerator.device, torch.get_default_dtype()).train()
    optimizer = adamw(module, settings["betas"])
    parts = {"autoencoder": (module, optimizer)}
    discriminator = None
    if convolutional and settings["adversarial_weight"]:
        discriminator = PatchDiscriminator(discriminator_layers(config.image_size))
        discriminator.to(accelerator.device, torch.get_default_dtype()).train()
        discriminator_optimizer = adamw(discriminator, settings["betas"])
        parts["discriminator"] = (discriminator, discriminator_optimizer)
    adversarial_start = round(settings["adversarial_start_epochs"] * plan.steps_per_epoch)

    # ---- resume: the newest checkpoint, if there is one
    found = newest_checkpoint(output_dir / "checkpoints", session)
    step = load_parts(found, parts)["step"] if found else 0
    loader = train_loader(
        source,
        num_timesteps=1,
        tokens_shape=(config.num_patches, config.latent_dim),
        global_batch_size=plan.global_batch_size,
        micro_batch_size=plan.per_device_batch_size,
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        start_step=step,
        num_steps=plan.total_steps,
        **loading,
    )
    log = MetricsLog(output_dir, accelerator, resume_at=step, settings=identity(run))
    accelerator.print("\n".join(plan.lines()))
    if step:
        accelerator.print(f"resuming at step {step:,} from {found}")
    wrapped = accelerator.prepare(module)
    judge = None if discriminator is None else accelerator.prepare(discriminator)
    writer = CheckpointWriter(output_dir / "checkpoints", keep_checkpoints, accelerator.is_main_process)
    blank = torch.zeros(
        plan.per_device_batch_size, config.num_channels, *[config.image_size] * 2, device=accelerator.device
    )
    no_noise = torch.zeros(len(blank), config.num_patches, config.latent_dim, device=accelerator.device)
    settle_buckets(wrapped, lambda: sum(wrapped(blank, no_noise)[0].values()))
    if judge is not None:
        settle_buckets(judge, lambda: judge(torch.cat([blank, blank])).sum())
    batches = iter(loader)
    pairs = []  # of a step: originals and reconstructions, for the discriminator

    def save(step: int) -> None:
        save_parts(writer, step, parts, {"step": step, "seed": seed, "recipe": recipe.title}, recipe.save)

    def take_gradient(step: int) -> Gradient:
        """The gradient of one global batch, in parts."""
        waited, numbers = 0.0, {}
        pairs.clear()
        adversarial = discriminator is not None and step >= adversarial_start
        for part in range(plan.accumulation):
            asked = time.monotonic()
            batch = next(batches)
            waited += time.monotonic() - asked
            log.bad_images(batch["bad_images"])
            pixels = processor.normalize_pixels(batch["pixel_values"].to(accelerator.device, non_blocking=True))
            is_last = part == plan.accumulation - 1
            with nullcontext() if is_last else accelerator.no_sync(wrapped):
                terms, reconstruction = wrapped(pixels, batch["noise"].to(accelerator.device, non_blocking=True))
                if adversarial:
                    terms["adversarial"] = adversarial_term(terms, reconstruction)
                    pairs.append((pixels, reconstruction.detach()))
                loss = sum(terms.values())
                accelerator.backward(loss / plan.accumulation)
            squared_error = (pixels - reconstruction.detach()).square().mean()
            for name, value in (terms | {"loss": loss, "squared_error": squared_error}).items():
                numbers[name] = numbers.get(name, 0) + value.detach() / plan.accumulation
        numbers["gradient_norm"] = torch.nn.utils.get_total_norm([parameter.grad for parameter in module.parameters()])
        return Gradient(numbers, waited)

    def apply_gradient(step: int) -> dict[str, torch.Tensor]:
        """AdamW, and once it has begun, the discriminator's turn."""
        update(optimizer, plan.learning_rate_at(step))
        return {"discriminator": train_discriminator(pairs, plan.learning_rate_at(step))} if pairs else {}

    def adversarial_term(terms: dict[str, torch.Tensor], reconstruction: torch.Tensor) -> torch.Tensor:
        """The generator's loss, brought to the size of the reconstruction's gradient (VQGAN, Eq. 7)."""
        discriminator.requires_grad_(False)
        with accelerator.autocast():
            generator = generator_loss(discriminator(reconstruction).float())
        discriminator.requires_grad_(True)
        nll = terms["reconstruction"] + terms.get("perceptual", 0)
        weight = adaptive_weight(nll, generator, module.autoencoder.decoder.conv_out.weight)
        return settings["adversarial_weight"] * weight * generator

    def train_discriminator(pairs: list[tuple[torch.Tensor, torch.Tensor]], learning_rate: float) -> torch.Tensor:
        total = 0
        for number, (real, fake) in enumerate(pairs, start=1):
            with nullcontext() if number == len(pairs) else accelerator.no_sync(judge):
                # Both in one pass: DDP allows one forward for each backward.
                real_logits, fake_logits = judge(torch.cat([real, fake])).float().chunk(2)
                loss = hinge_loss(real_logits, fake_logits)
                accelerator.backward(loss / len(pairs))
            total = total + loss.detach() / len(pairs)
        update(discriminator_optimizer, learning_rate)
        return total

    def evaluate(step: int) -> None:
        """A picture of the same images every epoch: originals above, reconstructions of their posterior mean below."""
        with torch.no_grad():
            pixels = processor.normalize_pixels(watched.to(accelerator.device))
            noise = torch.zeros(len(pixels), config.num_patches, config.latent_dim, device=accelerator.device)
            _, reconstruction = module(pixels, noise)
        error = (pixels - reconstruction).square().mean().item()
        pictures = output_dir / "reconstructions"
        pictures.mkdir(exist_ok=True)
        rows = [("original", pixels), ("restored", reconstruction)]
        mosaic(rows, processor).save(pictures / f"step-{step:08d}.png")
        log.write_evaluations(step, [{"watched_squared_error": error}])

    loop = Loop(
        name=f"{recipe.name} tokenizer",
        writer=writer,
        plan=plan,
        session=session,
        log=log,
        log_every=log_every,
        checkpoint_every=checkpoint_every,
        max_steps=max_steps,
        max_minutes=max_minutes,
        started=started,
    )
    step = loop.run(step, take_gradient, apply_gradient, save, lambda step: session.on_main(lambda: evaluate(step)))
    if step < plan.total_steps:
        accelerator.print(f"stopped at step {step:,} of {plan.total_steps:,}; run the same command again to go on")
        return None

    # ---- save: the tokenizer, with the variances of its latents
    training = {
        "recipe": recipe.name,
        "tier": recipe.tier,
        "overrides": recipe.overrides,
        "seed": seed,
        "steps": step,
        "images_seen": step * plan.global_batch_size,
        "perceptual_loss": settings["perceptual_loss"],
        "adversarial_weight": settings["adversarial_weight"],
    }
    module.eval()
    if convolutional:
        variance = latent_variance(module.autoencoder, config, settings, source, processor, accelerator, loading)
        module.autoencoder.register_to_config(scaling_factor=variance.mean().rsqrt().item())
        buffers, autoencoder = {"explained_variance": variance}, module.autoencoder.cpu().float()
    else:
        buffers, autoencoder = module.buffers_for_the_model(processor), None
    learned = LearnedTokenizer(
        tokenizer=config.tokenizer,
        patch_size=config.patch_size,
        latent_dim=config.latent_dim,
        buffers=buffers,
        autoencoder=autoencoder,
        processor_fingerprint=processor.fingerprint,
        training=training,
    )
    return finish(folder, learned, session)


def finish(folder: Path, learned: LearnedTokenizer, session: Session) -> Path:
    """Writes the tokenizer's folder, in one move."""
    session.on_main(lambda: write_folder(folder, learned.save_pretrained))
    session.accelerator.print(f"tokenizer: {folder}")
    return folder


@torch.no_grad()
def latent_variance(
    autoencoder: nn.Module,
    config: LDAEConfig,
    settings: dict,
    source: ImageSource,
    processor: LDAEImageProcessor,
    accelerator: Accelerator,
    loading: dict,
) -> torch.Tensor:
    """(K,) fp32 variance of each latent over about `fit_patches` tokens of training crops, by all processes.

    Of images drawn by the seed: rows may be sorted by class.
    """
    stride = autoencoder_stride(autoencoder)
    sums = torch.zeros(3, config.latent_dim, dtype=torch.float64, device=accelerator.device)
    wanted = max(accelerator.num_processes, -(-settings["fit_patches"] // config.num_patches))
    chosen = sorted(epoch_order(loading["seed"], 0, len(source))[:wanted].tolist())
    source = replace(source, dataset=source.dataset.select(chosen), num_images=len(chosen))
    rank, world = accelerator.process_index, accelerator.num_processes
    for crops in crop_loader(source, rank=rank, world_size=world, **loading):
        pixels = processor.normalize_pixels(crops.to(accelerator.device)).to(autoencoder.dtype)
        latents = autoencoder.encode(pixels).latent_dist.mode()
        tokens = patchify(latents, config.patch_size // stride).flatten(0, 1).double()
        sums += torch.stack([torch.ones_like(tokens[0]) * len(tokens), tokens.sum(0), tokens.square().sum(0)])
    count, total, squares = accelerator.reduce(sums).cpu()
    return ((squares - total.square() / count) / (count - 1)).float()


def released_tokenizer(
    config: LDAEConfig,
    settings: dict,
    source: ImageSource,
    processor: LDAEImageProcessor,
    accelerator: Accelerator,
    loading: dict,
) -> LearnedTokenizer:
    """A released autoencoder, with the variances of its latents on this data set.

    Raises:
        ValueError: it is not there, or its latents do not make tokens of the recipe's size.
    """
    autoencoder = load_autoencoder(settings["pretrained"]).eval()
    check_geometry(autoencoder, config.patch_size, config.latent_dim)
    autoencoder.to(accelerator.device)
    variance = latent_variance(autoencoder, config, settings, source, processor, accelerator, loading)
    return LearnedTokenizer(
        tokenizer=config.tokenizer,
        patch_size=config.patch_size,
        latent_dim=config.latent_dim,
        buffers={"explained_variance": variance},
        autoencoder=autoencoder.cpu(),
        training={"pretrained": settings["pretrained"]},
    )


def check_trainable(recipe: Recipe, config: LDAEConfig, source: ImageSource, weights: str | Path | None) -> None:
    """Raises RunError if the tokenizer of a recipe cannot be trained on these images, before any work is done."""
    if source.streaming:
        raise RunError(
            "A tokenizer is not trained on a stream; train it first, with `ldae tokenizer train`, and give it with "
            "--tokenizer."
        )
    kind = recipe.tokenizer["perceptual_loss"]
    if config.tokenizer not in CONVOLUTIONAL_TOKENIZERS or recipe.tokenizer["pretrained"] is not None or kind is None:
        return
    if kind == "lpips" and weights is None:
        raise RunError(
            "The recipe's perceptual loss is LPIPS, whose weights are not ours to ship: give the folder that holds "
            "vgg16.safetensors and lpips.safetensors with --perceptual-weights (`ldae weights convert --help` says "
            "where they come from), or train with --set tokenizer.perceptual_loss=labels."
        )
    if kind != "lpips" and source.label_column is None:
        raise RunError(f"{source.name} has no labels to train the network of the perceptual loss on.")


def perceptual_network(
    folder: Path,
    config: LDAEConfig,
    settings: dict,
    source: ImageSource,
    session: Session,
    weights: str | Path | None,
    loading: dict,
) -> nn.Module | None:
    """The frozen network of the perceptual loss, None if there is none.

    `lpips` is read from `weights`; `labels` and `random_labels` are trained here on the data set's labels, or on ones
    that say nothing, and kept in `folder`.
    """
    kind, device = settings["perceptual_loss"], session.accelerator.device
    if kind is None or config.tokenizer not in CONVOLUTIONAL_TOKENIZERS:
        return None
    if kind == "lpips":
        return LPIPS.from_folder(weights).to(device)
    batch_size = min(LABEL_FEATURES_BATCH, len(source))
    batches_per_epoch = min(LABEL_FEATURES_IMAGES, len(source)) // batch_size

    def loader_of_epoch(epoch: int) -> Iterator[dict]:
        return train_loader(
            source,
            num_timesteps=1,
            tokens_shape=(1, 1),
            global_batch_size=batch_size,
            micro_batch_size=batch_size,
            start_step=epoch * batches_per_epoch,
            num_steps=(epoch + 1) * batches_per_epoch,
            **loading,
        )

    def train_and_write() -> None:
        if folder.is_dir():
            return
        network, figures = train_label_features(
            loader_of_epoch,
            source.num_classes,
            epochs=LABEL_FEATURES_EPOCHS,
            device=device,
            random_labels=kind == "random_labels",
            seed=loading["seed"],
        )

        def write(path: Path) -> None:
            network.save(path)
            (path / "training.json").write_text(json.dumps({"perceptual_loss": kind} | figures, indent=2))

        write_folder(folder, write)

    session.on_main(train_and_write, at_once=True)  # it takes minutes, and begins anew
    return LabelFeatures.load(folder).to(device)
