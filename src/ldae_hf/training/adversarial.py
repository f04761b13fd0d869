"""The adversarial loss of the convolutional autoencoder (latent diffusion's "VQGAN", section 4.2 of the paper), after
Esser et al. 2021, "Taming Transformers", section 3.1 and their code."""

import math

import torch
import torch.nn.functional as F
from torch import nn


class PatchDiscriminator(nn.Module):
    """Judges patches as real or reconstructed: pix2pix's `NLayerDiscriminator` (Isola et al. 2017).

    4x4 convolutions: `num_layers` of stride 2, then two of stride 1, with LeakyReLU(0.2) between. A logit sees 16, 34
    or 70 pixels for 1, 2 or 3 layers.

    Args:
        num_layers: convolutions of stride 2; [`discriminator_layers`] fits them to an image size.
        width: channels of the first convolution, doubled by each one up to eight times that.
        num_channels: of the images.

    Raises:
        ValueError: an argument is not positive.
    """

    def __init__(self, num_layers: int = 3, width: int = 64, num_channels: int = 3):
        super().__init__()
        if min(num_layers, width, num_channels) < 1:
            raise ValueError(
                "PatchDiscriminator needs positive num_layers, width and num_channels, "
                f"not {num_layers}, {width} and {num_channels}."
            )
        widths = [width * min(2**i, 8) for i in range(num_layers + 1)]
        layers = [nn.Conv2d(num_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for i in range(1, num_layers + 1):
            layers += [
                nn.Conv2d(widths[i - 1], widths[i], 4, stride=2 if i < num_layers else 1, padding=1, bias=False),
                # Not latent diffusion's BatchNorm: its statistics are those of one process's micro-batch, so that
                # logits would depend on accumulation and on the number of processes, and it keeps running buffers.
                nn.GroupNorm(math.gcd(32, widths[i]), widths[i]),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, padding=1))
        for layer in self.layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.normal_(layer.weight, 0.0, 0.02)
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)
            elif isinstance(layer, nn.GroupNorm):
                nn.init.normal_(layer.weight, 1.0, 0.02)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) in [-1, 1] -> logits (B,1,h,w) with h = H / 2^num_layers - 2, large where it looks real."""
        return self.layers(pixel_values)


def discriminator_layers(image_size: int) -> int:
    """`num_layers` for images of this side in pixels: the largest of 1, 2, 3 that leaves a map of 4x4 logits or more,
    else 1. 32 pixels have 2, 48 and more have 3.

    Raises:
        ValueError: the image is so small that there is no logit at all.
    """
    if image_size < 6:
        raise ValueError(f"A patch discriminator needs images of at least 6 pixels, not {image_size}.")
    return max(layers for layers in (1, 2, 3) if layers == 1 or image_size // 2**layers - 2 >= 4)


def hinge_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """The discriminator's loss, a scalar: half of mean max(0, 1 - real) + mean max(0, 1 + fake)."""
    return (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean()) / 2


def generator_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """The autoencoder's loss, a scalar: minus the mean logit of its reconstructions."""
    return -fake_logits.mean()


def adaptive_weight(
    reconstruction_loss: torch.Tensor, generator_loss: torch.Tensor, last_layer: torch.Tensor
) -> torch.Tensor:
    """The weight of the adversarial loss, a scalar in 0 ... 1e4 without gradient, with which both losses pull equally
    at the decoder's last layer: the quotient of their gradients' norms (Esser et al. 2021, Eq. 7).

    Each process has its own, from its own images. Both graphs are kept for the backward pass that follows.

    Args:
        reconstruction_loss: scalar, with the perceptual part. generator_loss: scalar, as above.
        last_layer: the weight that both depend on.
    """
    (reconstruction,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (adversarial,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    return (reconstruction.float().norm() / (adversarial.float().norm() + 1e-4)).clamp(0, 1e4).detach()
