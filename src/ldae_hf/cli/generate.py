"""`ldae generate`, `ldae denoise`, `ldae pipeline`: images out of a model, and the model as diffusers' pipeline."""

import time
from pathlib import Path
from typing import Annotated

import typer


Source = Annotated[
    str, typer.Argument(help="A run's folder, a checkpoint, a pipeline's folder, or its name on the Hub.")
]
Weights = Annotated[str | None, typer.Option(help="ema or raw, of a run or checkpoint; default ema if it is there.")]
Dtype = Annotated[str, typer.Option(help="Precision of the model: float32 or bfloat16.")]
Picture = Annotated[Path, typer.Option(help="The picture's file.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images that are generated together.")]


def generate(
    source: Source,
    num_images: Annotated[int, typer.Option(min=1, help="How many images.")] = 64,
    steps: Annotated[int, typer.Option(help="Levels of noise that each passes through.")] = 50,
    sampler: Annotated[str, typer.Option(help="deterministic (DDIM) or ancestral (DDPM).")] = "deterministic",
    scheduler: Annotated[
        str | None, typer.Option(help="One of diffusers' instead of a sampler, e.g. DPMSolverMultistepScheduler.")
    ] = None,
    class_labels: Annotated[
        list[int] | None,
        typer.Option("--class-label", help="May be repeated: the images take them in turn; default all classes."),
    ] = None,
    no_class: Annotated[bool, typer.Option("--no-class", help="Tell a model with classes none.")] = False,
    guidance: Annotated[float, typer.Option(help="Classifier-free guidance towards the class; 1 is none.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of all noise; with its number it fixes an image.")] = 0,
    batch_size: BatchSize = 64,
    dtype: Dtype = "float32",
    weights: Weights = None,
    output: Picture = Path("samples.png"),
    strip: Annotated[Path | None, typer.Option(help="Paint the way of the first eight from noise to image.")] = None,
    images_dir: Annotated[Path | None, typer.Option(help="A new folder for each image as a PNG of its own.")] = None,
):
    """Generate images from noise, as one picture; of a model with classes, each column is a class if they fit.

    \b
    ldae generate runs/mine --output samples.png --strip strip.png
    ldae generate runs/dit --class-label 3 --guidance 2 --sampler ancestral --steps 250
    ldae generate runs/mine --scheduler DPMSolverMultistepScheduler --steps 20
    """
    from ldae_hf import LDAEScheduler
    from ldae_hf.evaluation.generators import load_generator
    from ldae_hf.evaluation.sample_pictures import (
        check_picture_file,
        image_grid,
        sample_images,
        save_picture,
        strip_picture,
    )
    from ldae_hf.evaluation.samples import SAMPLERS
    from ldae_hf.progress import bar_intervals

    if sampler not in SAMPLERS:
        raise ValueError(f"--sampler {sampler!r} is not one of {', '.join(SAMPLERS)}.")
    if class_labels and no_class:
        raise ValueError("--class-label and --no-class contradict each other; give one of them.")
    for file in (output, strip) if strip else (output,):
        check_picture_file(file)
    if images_dir is not None and images_dir.exists():
        raise ValueError(f"{images_dir} is there already; name a new folder for the images.")
    pipeline, facts, _ = load_generator(source, weights=weights, dtype=dtype)
    own = LDAEScheduler.for_model(pipeline.model.config)  # a pipeline may have been saved with another
    pipeline.scheduler = own if scheduler is None else own.to_stock(scheduler)
    pipeline.set_progress_bar_config(desc="steps", **bar_intervals())
    num_classes = pipeline.model.config.num_classes
    if no_class:
        class_labels = None
    elif not class_labels and num_classes is not None:
        class_labels = list(range(num_classes))
    options = dict(class_labels=class_labels or None, seed=seed, num_inference_steps=steps, eta=SAMPLERS[sampler])
    options |= dict(guidance_scale=guidance)

    began = time.monotonic()
    images = sample_images(pipeline, range(num_images), batch_size=batch_size, **options)
    rate = num_images / (time.monotonic() - began)
    save_picture(image_grid(images, class_labels and len(class_labels)), output)
    of = ", ".join(filter(None, (facts["recipe"], facts["weights"] and f"{facts['weights']} weights", dtype)))
    by = f"{steps} steps of {scheduler}" if scheduler else f"{steps} {sampler} steps"
    by += f", guidance {guidance:g}" if guidance != 1 else ""
    typer.echo(f"{output}: {num_images} images of {source} ({of}), {by}, seed {seed}; {rate:.1f} images/s")
    if strip is not None:
        save_picture(strip_picture(pipeline, range(min(num_images, 8)), **options), strip)
        typer.echo(f"{strip}: the way of the first {min(num_images, 8)}")
    if images_dir is not None:
        for number, image in enumerate(images):
            save_picture(image, images_dir / f"{number:06d}.png")
        typer.echo(f"{images_dir}: 000000.png ... {num_images - 1:06d}.png")


def denoise(
    source: Source,
    images: Annotated[list[Path] | None, typer.Argument(help="Image files; or give --dataset.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="A Hub name, or a folder: as given, else inside $LDAE_DATA.")
    ] = None,
    split: Annotated[str, typer.Option(help="Of the data set.")] = "test",
    num_images: Annotated[int, typer.Option(min=1, help="Of the data set, spread over it.")] = 8,
    levels: Annotated[
        list[float] | None,
        typer.Option("--level", help="Noise relative to the signal, sigma/gamma; may be repeated; default four."),
    ] = None,
    timesteps: Annotated[
        list[int] | None, typer.Option("--timestep", help="Levels as the model counts them, instead; may be repeated.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the noise.")] = 0,
    dtype: Dtype = "float32",
    weights: Weights = None,
    output: Picture = Path("denoised.png"),
):
    """Paint images, the noise that is put on them, and what the model makes of it, at several levels (Figure 8).

    The number beside a row is the noise relative to the signal; of the model's levels the nearest is taken.

    \b
    ldae denoise runs/mine --dataset cifar10
    ldae denoise runs/mine cat.jpg dog.jpg --level 0.5 --level 1
    """
    from ldae_hf.evaluation.generators import load_generator
    from ldae_hf.evaluation.sample_pictures import check_choice, check_picture_file, chosen_images, save_picture
    from ldae_hf.training.pictures import denoising_picture, watched_levels

    check_choice(images, dataset)
    if levels and timesteps:
        raise ValueError("Give either --level or --timestep, and not both.")
    if levels and not all(0 < level < float("inf") for level in levels):
        raise ValueError("--level is sigma/gamma, the noise relative to the signal: a number above 0.")
    check_picture_file(output)
    pipeline, *_ = load_generator(source, weights=weights, dtype=dtype)
    model, processor = pipeline.model, pipeline.processor
    pixels = chosen_images(images, dataset, split, num_images, processor.image_size)
    timesteps = sorted(set(timesteps or ())) or (watched_levels(model.ldae.schedule, levels) if levels else None)
    typer.echo(save_picture(denoising_picture(model, processor, pixels, seed, timesteps), output))


def pipeline(
    source: Source,
    output_dir: Annotated[Path, typer.Argument(help="A folder that is not there yet.")],
    weights: Weights = None,
):
    """Write a run's model as the folder of a diffusers pipeline, which loads by itself.

    \b
    ldae pipeline runs/mine pipelines/mine
    """
    from ldae_hf.evaluation.pipeline_folder import write_pipeline

    written = write_pipeline(source, output_dir, weights=weights)
    if len(written.model.ldae.schedule) == 1:
        use = 'pipeline.denoise(open("image.png", "rb").read(), 0).images[0].save("restored.png")'
    else:
        labels = "" if written.model.config.num_classes is None else "class_labels=[0]"
        use = f'pipeline({labels}).images[0].save("sample.png")'
    typer.echo(f"import ldae_hf\npipeline = ldae_hf.LDAEPipeline.from_pretrained({str(output_dir)!r})\n{use}")
