"""A tiny encoder with a fitted processor, saved as a user saves one."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ldae_hf import LDAEConfig, LDAEForPreTraining, LDAEImageProcessor


TINY = dict(
    image_size=16,
    patch_size=4,
    hidden_size=32,
    num_hidden_layers=3,
    decoder_num_hidden_layers=1,
    num_attention_heads=2,
    latent_dim=6,
)


def pictures(count: int, seed: int = 0) -> list[Image.Image]:
    """Smooth pictures of different sizes."""
    rng = np.random.default_rng(seed)
    small = [Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(count)]
    return [image.resize((20 + n % 7, 24), Image.Resampling.BICUBIC) for n, image in enumerate(small)]


def tiny_processor(seed: int = 0) -> LDAEImageProcessor:
    geometry = {key: TINY[key] for key in ("image_size", "patch_size", "latent_dim")}
    return LDAEImageProcessor(**geometry).fit(pictures(40, seed), progress=False)


def tiny_model(processor: LDAEImageProcessor) -> LDAEForPreTraining:
    """Weights of all scales, so that no part is the identity, as freshly initialised blocks are."""
    torch.manual_seed(0)
    model = LDAEForPreTraining(LDAEConfig(**TINY)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.set_processor(processor)
    return model


def save_tiny_encoder(folder: Path) -> Path:
    """A folder with an encoder and its processor."""
    processor = tiny_processor()
    tiny_model(processor).ldae.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
