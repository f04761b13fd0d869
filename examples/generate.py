"""Images from noise, and a noisy image restored, with a model of yours.

    python examples/generate.py runs/mine
    python examples/generate.py pipelines/mine --image cat.jpg --output-dir pictures

The first argument is a run's folder, a checkpoint's, or one that `ldae pipeline` wrote. The same from the command line:
ldae generate, ldae denoise.
"""

from pathlib import Path

import torch
import typer
from diffusers import DPMSolverMultistepScheduler
from PIL import Image

from ldae_hf.evaluation.generators import load_generator
from ldae_hf.evaluation.sample_pictures import image_grid


def generate(source: str, image: Path | None = None, output_dir: Path = Path("pictures"), count: int = 16):
    """Generate a grid, restore an image (by default the first of the grid), and generate again with DPM-Solver."""
    pipeline = load_generator(source).pipeline  # of a pipeline's folder, LDAEPipeline.from_pretrained does it too
    num_classes = pipeline.model.config.num_classes
    options = {} if num_classes is None else {"class_labels": [number % num_classes for number in range(count)]}
    output_dir.mkdir(parents=True, exist_ok=True)

    # 50 steps of the model's own scheduler, without fresh noise on the way (DDIM); eta=1.0 for DDPM.
    images = pipeline(count, generator=torch.Generator().manual_seed(0), **options).images
    image_grid(images, num_classes).save(output_dir / "samples.png")

    # As much noise as signal is put on an image, and taken off it again in one step.
    schedule = pipeline.model.ldae.schedule
    timestep = int((schedule.sigmas / schedule.gammas - 1).abs().argmin())
    original = images[0] if image is None else Image.open(image)
    denoised = pipeline.denoise(original, timestep, generator=torch.Generator().manual_seed(0))
    denoised.noisy_images[0].save(output_dir / "noisy.png")
    denoised.images[0].save(output_dir / "restored.png")

    # The same network and noise, by another of diffusers' schedulers in 20 steps.
    pipeline.scheduler = pipeline.scheduler.to_stock(DPMSolverMultistepScheduler)
    generator = torch.Generator().manual_seed(0)
    images = pipeline(count, generator=generator, num_inference_steps=20, **options).images
    image_grid(images, num_classes).save(output_dir / "samples_dpm_solver.png")

    typer.echo(f"{output_dir}: samples.png, noisy.png, restored.png, samples_dpm_solver.png")


if __name__ == "__main__":
    typer.run(generate)
