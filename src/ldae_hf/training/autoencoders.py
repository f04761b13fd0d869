"""What a learned tokenizer is while it is trained (section 4.2): a linear autoencoder of patches, or the
convolutional one of latent diffusion.

Both forwards take pixel_values (B,C,H,W) and standard normal noise (B,N,K). They return the terms of the loss, each a
sum over the values of a patch or of an image and a mean over those, and the reconstruction (B,C,H,W).
"""

import math

import torch
from torch import nn

from ..configuration_ldae import LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import build_autoencoder
from ..patch_tokenizers import patchify, unpatchify


def kl_to_standard_normal(mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """KL[N(mean, exp(log_variance)) ‖ N(0, 1)] of each value."""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance)


class PatchAutoencoderTraining(nn.Module):
    """‖x - UᵀVx‖² of patches without their mean, and for a VAE + kl_weight · KL[Vx ‖ N(0, 1)], whose log-variance is
    another linear map of the patch (section 4.2)."""

    def __init__(self, config: LDAEConfig, mean: torch.Tensor, kl_weight: float):
        super().__init__()
        self.patch_size, self.kl_weight = config.patch_size, kl_weight
        self.register_buffer("mean", mean.clone())
        self.encoder = nn.Linear(config.patch_dim, config.latent_dim, bias=False)  # V
        self.decoder = nn.Linear(config.latent_dim, config.patch_dim, bias=False)  # Uᵀ
        self.log_variance = nn.Linear(config.patch_dim, config.latent_dim) if config.tokenizer == "patch_vae" else None

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        with torch.autocast(pixel_values.device.type, enabled=False):
            patches = patchify(pixel_values, self.patch_size).to(self.mean) - self.mean  # (B, N, P)
            latents, terms = self.encoder(patches), {}  # (B, N, K)
            if self.log_variance is not None:
                log_variance = self.log_variance(patches).clamp(-30, 20)
                terms["kl"] = self.kl_weight * kl_to_standard_normal(latents, log_variance).sum(-1).mean()
                latents = latents + (0.5 * log_variance).exp() * noise.to(latents)
            reconstruction = self.decoder(latents)
            terms["reconstruction"] = (patches - reconstruction).square().sum(-1).mean()
        rows, columns = (side // self.patch_size for side in pixel_values.shape[-2:])
        return terms, unpatchify(reconstruction + self.mean, self.patch_size, (rows, columns))

    def buffers_for_the_model(self, processor: LDAEImageProcessor) -> dict[str, torch.Tensor]:
        """What the model's tokenizer takes: the variance of each latent is exact, V Σ Vᵀ, from the patches' PCA."""
        components, decoder_components = self.encoder.weight.detach().cpu(), self.decoder.weight.detach().cpu().T
        along = (components.double() @ processor.components.T).square()  # (K, P)
        return {
            "components": components.float(),
            "decoder_components": decoder_components.float().contiguous(),
            "mean": self.mean.cpu().float(),
            "explained_variance": (along @ processor.explained_variance).float(),
        }


class ConvolutionalTraining(nn.Module):
    """Reconstruction, absolute or squared, + kl_weight · KL + a perceptual distance, as latent diffusion weights them:
    all summed over the values of an image, the perceptual distance counted once for each."""

    def __init__(self, config: LDAEConfig, settings: dict, perceptual: nn.Module | None):
        super().__init__()
        channels = config.latent_dim // (config.patch_size // settings["stride"]) ** 2
        sizes = (config.image_size, settings["stride"], settings["base_width"], settings["residual_blocks"])
        self.autoencoder = build_autoencoder(*sizes, channels)
        self.kl_weight, self.squared = settings["kl_weight"], settings["reconstruction_loss"] == "squared"
        self._perceptual = (perceptual,)  # frozen: in a tuple it is neither trained nor saved

    def forward(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        dtype = self.autoencoder.dtype  # under autocast, that of everything but the layers
        pixel_values = pixel_values.to(dtype)
        posterior = self.autoencoder.encode(pixel_values).latent_dist
        mean, log_variance = posterior.mean.to(dtype), posterior.logvar.to(dtype)  # (B, c, h, w)
        side = math.isqrt(noise.shape[1])
        noise = unpatchify(noise.to(mean), mean.shape[-1] // side, (side, side))
        reconstruction = self.autoencoder.decode(mean + (0.5 * log_variance).exp() * noise).sample.to(dtype)
        error = pixel_values - reconstruction
        error = error.square() if self.squared else error.abs()
        terms = {
            "reconstruction": error.flatten(1).sum(-1).mean(),
            "kl": self.kl_weight * kl_to_standard_normal(mean, log_variance).flatten(1).sum(-1).mean(),
        }
        (perceptual,) = self._perceptual
        if perceptual is not None:
            terms["perceptual"] = perceptual(pixel_values, reconstruction).mean() * error[0].numel()
        return terms, reconstruction
