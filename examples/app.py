"""A page to play with a model: noise put on an image and taken off again, its PCA, its features in colour.

    make demo                              (in a clone: makes an environment of its own, then shows the page)
    python examples/app.py runs/mine       (with the extra `demo` of ldae-hf)

The model is a run's folder, a checkpoint's, a pipeline's, an encoder's, or a name on the Hub; an encoder alone shows
all but the restored image. This file is the whole of a Gradio Space: its README.md begins with `sdk: gradio`,
`python_version: "3.12"` and `app_file: app.py`, its requirements.txt names `ldae-hf[demo]` (and `diffusers` for a
pipeline or a convolutional tokenizer), and its variable LDAE_DEMO_MODEL names the model.
"""

import base64
import html
import io
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, NamedTuple

import gradio as gr
import torch
import torch.nn.functional as F
import typer
from PIL import Image, ImageDraw, ImageOps
from safetensors.torch import load_file
from transformers.utils import cached_file

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor, LDAEModel
from ldae_hf.configuration_ldae import CONVOLUTIONAL_TOKENIZERS
from ldae_hf.images import read_image
from ldae_hf.patch_tokenizers import patchify, unpatchify


CARD = Path(__file__).resolve().parents[1] / "model_cards" / "ldae-cifar10"
BOAT = [
    ("rectangle", (0, 0, 256, 160), "#9fcdf2"),
    ("ellipse", (176, 24, 224, 72), "#ffd84a"),
    ("rectangle", (0, 160, 256, 256), "#2f6690"),
    ("polygon", (122, 32, 122, 144, 44, 144), "#fafafa"),
    ("polygon", (132, 52, 132, 144, 196, 144), "#e4572e"),
    ("polygon", (32, 154, 216, 154, 184, 200, 64, 200), "#6b3e26"),
]
PER_ROW, ROWS = 16, 4  # of the picture of the directions
CSS = """
.gradio-container {width: 100%; max-width: 1100px !important; margin: auto !important}
.html-container {padding: 0 !important}
.pair {display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px}
figure {margin: 0}
figure img {display: block; width: 100%; border-radius: 4px}
.grid-container {grid-template-columns: repeat(3, minmax(0, 1fr)) !important}
.squares {image-rendering: pixelated}
.absent {display: grid; place-content: center; aspect-ratio: 1; padding: 12px; text-align: center;
    border: 1px dashed var(--body-text-color-subdued); border-radius: 4px}
figcaption {margin-top: 6px; font-size: .875em; line-height: 1.4}
.wrong {padding: 8px 12px; border-left: 4px solid #c1121f; overflow-wrap: anywhere}
@media (min-width: 768px) {#left {position: sticky; top: 16px; align-self: flex-start}}
"""
INTRODUCTION = """# What a denoising autoencoder sees
An [l-DAE](https://arxiv.org/abs/2401.14404) learns from images alone, by taking noise off them. The noise does not fall
on pixels but on *latents*: a patch is written as a sum of the main directions of a PCA, and noise is added to these few
numbers. On this page: **{name}**, an encoder of {config.num_hidden_layers} blocks of width {config.hidden_size}."""
NOISE = """## Noise on the latents
Latents z become γ z + σ ε: γ is how much is left of them, σ how strong the noise ε is, where the latents' own standard
deviation is about 1."""
FEATURES = """## Features
The encoder makes {config.hidden_size} numbers of each patch. Along the three directions in which they differ most over
this image they are painted red, green and blue: patches of one colour are alike to the encoder. Where a patch lies
is in them too, so that a plain image has colours. The colours of two images cannot be compared."""
PCA = """## Principal directions of patches
Each patch as a sum of K directions. This model was trained with K = {config.latent_dim}, and sees no others."""


def load(name: str) -> tuple[LDAEModel | LDAEForPreTraining, LDAEImageProcessor]:
    """The model in a folder or in a repository of the Hub, with its decoder if there is one, and its processor.

    Raises:
        OSError, ValueError: there is none, or its parts do not belong together.
    """

    def find(file: str) -> str | None:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)

    if Path(name, "checkpoints").is_dir():
        name = str(max(Path(name, "checkpoints").glob("step-*"), default=name))
    if find("model_index.json"):
        from ldae_hf import LDAEPipeline

        pipeline = LDAEPipeline.from_pretrained(name)
        return pipeline.model, pipeline.processor
    subfolder = "pretraining" if find("pretraining/config.json") else ""
    config = LDAEConfig.from_pretrained(name, subfolder=subfolder)
    kind = LDAEForPreTraining if LDAEForPreTraining.__name__ in (config.architectures or ()) else LDAEModel
    model = kind.from_pretrained(name, subfolder=subfolder).eval()
    if average := find(str(Path(subfolder, "training", "ema.safetensors"))):
        with torch.no_grad():
            for parameter, value in load_file(average).items():
                model.get_parameter(parameter).copy_(value)
    if config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        from ldae_hf import LearnedTokenizer

        model.set_tokenizer(LearnedTokenizer.from_pretrained(name, subfolder=str(Path(subfolder, "tokenizer"))))
    processor = LDAEImageProcessor.from_pretrained(name, subfolder=subfolder)
    model.check_processor(processor)
    return model, processor


class Picture(NamedTuple):
    """An image as the model sees it, and what no slider changes."""

    pixels: torch.Tensor  # (1,C,H,W), normalised
    coefficients: torch.Tensor  # (1,N,P) of its patches, in the whole basis
    features: torch.Tensor  # (N,D)
    colours: tuple[torch.Tensor, ...]  # of features: mean (D,), directions (D,3), middle (3,) and extent (3,)


class Viewer:
    """What a model makes of a picture, as HTML."""

    def __init__(self, model: LDAEModel | LDAEForPreTraining, processor: LDAEImageProcessor):
        self.model = model.to("cuda" if torch.cuda.is_available() else "cpu")
        self.encoder, self.schedule, self.processor = model.base_model, model.base_model.schedule, processor
        self.directions, self.mean = processor.components.float(), processor.mean.float()
        self.explained = processor.explained_variance.cumsum(0) / processor.explained_variance.sum()

    @torch.no_grad()
    def look_at(self, image: Image.Image) -> Picture:
        if min(image.size) < self.processor.patch_size:
            raise ValueError(f"The image has {image.width} × {image.height} pixels, less than one patch of the model.")
        pixels = self.processor(image, return_tensors="pt")["pixel_values"]
        coefficients = (patchify(pixels, self.processor.patch_size) - self.mean) @ self.directions.T
        features = self.encoder(pixels.to(self.encoder.device)).last_hidden_state[0].float().cpu()
        mean = features.mean(dim=0)
        axes = torch.linalg.svd(features - mean, full_matrices=False).Vh[:3].T
        axes = F.pad(axes, (0, 3 - axes.shape[1]))
        low, high = ((features - mean) @ axes).aminmax(dim=0)
        # Features have variance 1: the rounding errors of a plain map must not become colours.
        return Picture(pixels, coefficients, features, (mean, axes, (low + high) / 2, (high - low).clamp(min=0.01)))

    def original(self, picture: Picture) -> str:
        size, patch = self.processor.image_size, self.processor.patch_size
        text = f"The centre square, {size} × {size} pixels: {self.processor.num_patches} patches of {patch} × {patch}."
        return figure(self.unit(picture.pixels), "What the model is given", text)

    @torch.no_grad()
    def noise(self, picture: Picture, timestep: float, seed: int) -> tuple[str, str]:
        """The noisy image and the restored one; the features of the image and of the noisy one."""
        encoder, pixels, timestep = self.encoder, picture.pixels.to(self.encoder.device), int(timestep)
        shape = (1, encoder.config.num_patches, encoder.config.latent_dim)
        noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(pixels.device)
        if isinstance(self.model, LDAEForPreTraining):
            noisy, restored = self.model.denoise(pixels, timestep, noise)
            text = f"By encoder and decoder, in one step. {self.error(restored, picture)}"
            restored = figure(self.unit(restored), "Restored", text)
        else:
            level = torch.tensor([timestep], device=pixels.device)
            latents = self.schedule.add_noise(encoder.tokenizer.encode(pixels), noise, level)
            noisy = unpatchify(encoder.tokenizer.decode(latents), self.processor.patch_size, encoder.grid)
            text = "Restoring takes the decoder, and this is an encoder alone. Show a run, a checkpoint or a pipeline."
            restored = f'<figure><div class="absent">{text}</div></figure>'
        gamma, sigma = (table[timestep].item() for table in (self.schedule.gammas, self.schedule.sigmas))
        noisy = figure(self.unit(noisy), "Noisy", f"γ = {gamma:.2f}, σ = {sigma:.2f}. {self.error(noisy, picture)}")
        features = encoder(pixels, timesteps=timestep, noise=noise).last_hidden_state[0].float().cpu()
        alike = F.cosine_similarity(features, picture.features).mean()
        clean = figure(self.in_colour(picture.features, picture), "Of the image", "As a probe or a search uses them.")
        text = f"In the same colours. Mean cosine to the left: {alike:.2f}."
        return pair(noisy, restored), pair(clean, figure(self.in_colour(features, picture), "Of the noisy image", text))

    def pca(self, picture: Picture, count: float) -> tuple[str, str]:
        """The image as so many directions hold it, and what they miss; these directions."""
        count, patch_size = int(count), self.processor.patch_size
        patches = picture.coefficients[..., :count] @ self.directions[:count] + self.mean
        image = unpatchify(patches, patch_size, self.encoder.grid)
        text = f"They hold {self.explained[count - 1]:.1%} of the variance of the training patches."
        kept = figure(self.unit(image), f"From {count} of {len(self.directions)} directions", text)
        text = f"Grey is nothing. {self.error(image, picture)}"
        missed = figure(0.5 + (self.unit(picture.pixels) - self.unit(image)) / 2, "What they miss", text)
        shown = self.directions[: PER_ROW * ROWS]
        strength = torch.where(torch.arange(len(shown)) < count, 0.5, 0.1)[:, None]
        shown = unpatchify((0.5 + strength * shown / shown.abs().amax(1, keepdim=True))[:, None], patch_size, (1, 1))
        tiles = F.pad(shown, (0, 1, 0, 1, 0, 0, 0, -len(shown) % PER_ROW), value=1)
        mosaic = unpatchify(tiles.flatten(1)[None], patch_size + 1, (len(tiles) // PER_ROW, PER_ROW))
        text = f"The first {len(shown)} of {len(self.directions)}, by falling variance; pale where they are left out."
        return pair(kept, missed), figure(mosaic, "Directions", text)

    def unit(self, pixels: torch.Tensor) -> torch.Tensor:
        """Normalised pixels (1,C,H,W) in 0 ... 1."""
        mean, std = (torch.tensor(v)[:, None, None] for v in (self.processor.image_mean, self.processor.image_std))
        return pixels.float().cpu() * std + mean

    def error(self, image: torch.Tensor, picture: Picture) -> str:
        return f"RMS error: {(self.unit(image) - self.unit(picture.pixels)).square().mean().sqrt():.3f}."

    def in_colour(self, features: torch.Tensor, picture: Picture) -> torch.Tensor:
        """Features (N,D) as a picture (1,3,rows,columns) in 0 ... 1."""
        mean, axes, middle, extent = picture.colours
        return unpatchify(0.5 + (((features - mean) @ axes - middle) / extent)[None], 1, self.encoder.grid)


def figure(image: torch.Tensor, title: str, text: str) -> str:
    """An image (1,3,H,W) in 0 ... 1 with its caption; a small one is enlarged, each pixel to a square."""
    pixels = (image[0].nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0)
    stream = io.BytesIO()
    Image.fromarray(pixels.contiguous().numpy()).save(stream, "PNG", compress_level=1)
    source = f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"
    small = ' class="squares"' if image.shape[-1] < 200 else ""
    return f'<figure><img src="{source}" alt="{title}"{small}><figcaption><b>{title}.</b> {text}</figcaption></figure>'


def pair(left: str, right: str) -> str:
    return f'<div class="pair">{left}{right}</div>'


def drawings() -> list[Image.Image]:
    """Images to begin with: none is anybody's, and of the last one every patch is nearly the same."""
    boat = Image.new("RGB", (256, 256))
    for shape, box, colour in BOAT:
        getattr(ImageDraw.Draw(boat), shape)(box, fill=colour)
    fractal = ImageOps.colorize(Image.effect_mandelbrot((256, 256), (-2.1, -1.3, 0.5, 1.3), 60), "#14213d", "#fca311")
    plain = ImageOps.colorize(Image.linear_gradient("L"), "#7ea172", "#a9c5a0")
    return [boat, fractal, plain]


def page(viewer: Viewer, name: str) -> gr.Blocks:
    """The page: when a control is moved, what depends on it is painted anew, and nothing else."""
    config, levels = viewer.encoder.config, int((viewer.schedule.gammas > 0).sum())
    images = drawings()
    first, level = viewer.look_at(images[0]), (levels - 1) // 3

    def show(image: Callable[[], Image.Image], timestep: float, seed: int, count: float) -> list:
        """All that is painted, and room for another file; of one that is no image a sentence, and the pictures stay."""
        try:
            seen = viewer.look_at(image())
        except ValueError as error:
            text = f"{html.escape(str(error))} The pictures are still those of the image before."
            return [gr.HTML(f'<div class="wrong">{text}</div>', visible=True), None, *[gr.skip()] * 6]
        painted = viewer.original(seen), *viewer.noise(seen, timestep, seed), *viewer.pca(seen, count)
        return [gr.HTML(visible=False), None, seen, *painted]

    def show_file(file: str, *controls) -> list:
        return show(lambda: read_image(Path(file).read_bytes()), *controls)

    def show_drawing(event: gr.SelectData, *controls) -> list:
        return show(lambda: images[event.index], *controls)

    noisy, features = (gr.HTML(painted, render=False) for painted in viewer.noise(first, level, 0))
    kept, directions = (gr.HTML(painted, render=False) for painted in viewer.pca(first, config.latent_dim))
    with gr.Blocks(title="l-DAE", analytics_enabled=False, delete_cache=(3600, 3600)) as blocks:
        picture, seed = gr.State(first), gr.State(0)
        gr.Markdown(INTRODUCTION.format(name=html.escape(name), config=config))
        with gr.Row():
            with gr.Column(scale=2, min_width=280, elem_id="left"):
                file = gr.File(label="An image of yours", file_types=["image"], height=140)
                still = dict(show_label=False, allow_preview=False, interactive=False, buttons=[])
                gallery = gr.Gallery(images, columns=3, height=112, **still)
                message = gr.HTML(visible=False)
                original = gr.HTML(viewer.original(first))
            with gr.Column(scale=4, min_width=320):
                gr.Markdown(NOISE)
                timestep = gr.Slider(0, max(1, levels - 1), level, step=1, label="Level t", visible=levels > 1)
                noisy.render()
                again = gr.Button("Other noise of this level", size="sm")
                gr.Markdown(FEATURES.format(config=config))
                features.render()
                gr.Markdown(PCA.format(config=config))
                count = gr.Slider(1, len(viewer.directions), config.latent_dim, step=1, label="Directions K")
                kept.render()
                directions.render()
        controls = [timestep, seed, count]
        painted = [message, file, picture, original, noisy, features, kept, directions]
        quietly = dict(show_progress="hidden", trigger_mode="always_last", api_visibility="private")
        file.upload(show_file, [file, *controls], painted, **quietly)
        gallery.select(show_drawing, controls, painted, **quietly)
        again.click(lambda number: number + 1, seed, seed, **quietly)
        gr.on([timestep.change, seed.change], viewer.noise, [picture, timestep, seed], [noisy, features], **quietly)
        count.change(viewer.pca, [picture, count], [kept, directions], **quietly)
    return blocks


def main(
    model: Annotated[str, typer.Argument(envvar="LDAE_DEMO_MODEL", help="A folder, or a name on the Hub.")] = str(CARD),
    port: Annotated[int | None, typer.Option(help="Of the page; by default the first free one from 7860 on.")] = None,
):
    """Show a page on which a model can be played with."""
    try:
        viewer = Viewer(*load(model))
    except (OSError, ValueError) as error:
        sys.exit(f"Error: {model} is neither a folder nor a repository with a model: {' '.join(str(error).split())}")
    blocks, theme = page(viewer, "/".join(Path(model).parts[-2:])), gr.themes.Default(font=["system-ui", "sans-serif"])
    blocks.launch(server_port=port, css=CSS, theme=theme, footer_links=[], max_file_size="30mb", ssr_mode=False)


if __name__ == "__main__":
    typer.run(main)
