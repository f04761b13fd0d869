"""Golden features: what an encoder made of a few fixed images when it was saved, to compare with ever after."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .modeling_ldae import LDAEModel


GOLDEN_FEATURES = "golden_features.safetensors"


def golden_pixels(image_size: int, num_channels: int) -> torch.Tensor:
    """(2,C,H,W) uint8: coarse noise with fine noise upon it, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 192, (2, num_channels, 4, 4), generator=generator, dtype=torch.uint8)
    rows = torch.arange(image_size) * 4 // image_size
    fine = torch.randint(0, 64, (2, num_channels, image_size, image_size), generator=generator, dtype=torch.uint8)
    return coarse[:, :, rows][:, :, :, rows] + fine


@torch.no_grad()
def golden_features(encoder: LDAEModel, pixels: torch.Tensor) -> torch.Tensor:
    """(2,N,D) fp32 `last_hidden_state` of pixels that stand for [-1, 1]."""
    pixel_values = pixels.to(encoder.device, encoder.dtype) / 127.5 - 1
    return encoder(pixel_values).last_hidden_state.float().cpu()


def write_golden_features(folder: Path, encoder: LDAEModel) -> None:
    """Writes images and features into an encoder's folder; the encoder is in eval mode, in the weights' precision."""
    pixels = golden_pixels(encoder.config.image_size, encoder.config.num_channels)
    tensors = {"pixels": pixels, "last_hidden_state": golden_features(encoder, pixels)}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / GOLDEN_FEATURES)


def golden_difference(folder: Path, encoder: LDAEModel) -> float:
    """The largest difference between an encoder's features and the golden ones, over the largest golden one.

    Raises:
        OSError: the folder has none. KeyError: the file holds something else.
    """
    golden = load_file(folder / GOLDEN_FEATURES)
    expected = golden["last_hidden_state"]
    found = golden_features(encoder, golden["pixels"])
    return ((found - expected).abs().max() / expected.abs().max()).item()
