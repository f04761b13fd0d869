"""Image to tokens and back, patch by patch. Every tokenizer speaks two verbs:
encode (B,C,H,W) -> (B,N,K) and decode (B,N,K) -> (B,N,P). Torch only.
"""

import torch
import torch.nn.functional as F
from torch import nn


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B,C,H,W) -> (B,N,P): the patches row by row, each in (channel, row, column) order as a convolution sees it.

    Raises:
        ValueError: the image is not made of whole patches.
    """
    batch, channels, height, width = pixel_values.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"An image of {height}x{width} pixels is not made of whole {patch_size}x{patch_size} patches.")
    rows, columns = height // patch_size, width // patch_size
    patches = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * patch_size**2)


def unpatchify(patches: torch.Tensor, patch_size: int, grid: tuple[int, int]) -> torch.Tensor:
    """(B,N,P) -> (B,C,H,W) for a grid of (rows, columns) patches: the inverse of `patchify`."""
    batch, (rows, columns) = patches.shape[0], grid
    pixels = patches.reshape(batch, rows, columns, -1, patch_size, patch_size)
    return pixels.permute(0, 3, 1, 4, 2, 5).reshape(batch, -1, rows * patch_size, columns * patch_size)


def dct_basis(patch_size: int, num_channels: int) -> torch.Tensor:
    """(P,P) orthonormal 2-D DCT of a patch, rows from low to high frequency: the basis before any is fitted."""
    with torch.device("cpu"):  # also where a model is being built on the meta device
        index = torch.arange(patch_size, dtype=torch.float64)
        cosines = torch.cos(torch.pi / patch_size * (index[None] + 0.5) * index[:, None])
        cosines = cosines * (torch.where(index == 0, 1.0, 2.0) / patch_size).sqrt()[:, None]
        basis = torch.einsum("cd,iy,jx->ijcdyx", torch.eye(num_channels, dtype=torch.float64), cosines, cosines)
        frequency = (index[:, None] + index[None, :]).flatten().argsort(stable=True)
        size = patch_size**2
        return basis.reshape(size, num_channels, num_channels * size)[frequency].reshape(-1, num_channels * size)


def latent_scales(explained_variance: torch.Tensor, latent_dim: int, latent_scaling: str) -> torch.Tensor:
    """(K,) factors s that bring the first K latents to unit variance (lambda_t presumes it).

    `global`: one factor, so that their mean variance is 1; `whiten`: one each; `none`: ones.
    """
    kept = explained_variance[:latent_dim]
    if latent_scaling == "whiten":
        return kept.rsqrt()
    if latent_scaling == "none":
        return torch.ones_like(kept)
    return kept.mean().rsqrt().expand(latent_dim)


class PatchPCA(nn.Module):
    """Patch-wise PCA: z = s V (p - mean), and back p = mean + Vᵀ z / s. V is (K,P) with orthonormal rows.

    V, the mean and the variances are persistent fp32 buffers, filled by the model's `_init_weights` with a DCT basis
    and by `model.set_processor` with a fitted one. Both projections compute in the buffers' precision under autocast.
    """

    def __init__(self, patch_size: int, num_channels: int, latent_dim: int, latent_scaling: str):
        super().__init__()
        self.patch_size, self.num_channels = patch_size, num_channels
        self.latent_dim, self.latent_scaling = latent_dim, latent_scaling
        components, mean, explained_variance = self.unfitted()
        self.register_buffer("components", components)
        self.register_buffer("mean", mean)
        self.register_buffer("explained_variance", explained_variance)

    def unfitted(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Components (K,P), mean (P,) and explained variance (P,) before a fit: DCT, zeros and ones, in fp32."""
        basis = dct_basis(self.patch_size, self.num_channels).float()
        return basis[: self.latent_dim], torch.zeros_like(basis[0]), torch.ones_like(basis[0])

    @property
    def scales(self) -> torch.Tensor:
        """(K,) the factors s of encode and decode."""
        return latent_scales(self.explained_variance, self.latent_dim, self.latent_scaling)

    @property
    def loss_scale(self) -> torch.Tensor:
        """() the scalar that brings residues to latent units; under `whiten` too, where the tail would explode."""
        scaling = "global" if self.latent_scaling == "whiten" else self.latent_scaling
        return latent_scales(self.explained_variance, self.latent_dim, scaling)[0]

    def project(self, patches: torch.Tensor) -> torch.Tensor:
        """V p, (B,N,P) -> (B,N,K): no mean, no scale."""
        with torch.autocast(patches.device.type, enabled=False):
            return F.linear(patches.to(self.components.dtype), self.components)

    def unproject(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Vᵀ c, (B,N,K) -> (B,N,P): no mean, no scale."""
        with torch.autocast(coefficients.device.type, enabled=False):
            return F.linear(coefficients.to(self.components.dtype), self.components.T)

    def encode_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """(B,N,P) -> (B,N,K)."""
        return self.project(patches.to(self.mean.dtype) - self.mean) * self.scales

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,N,K)."""
        return self.encode_patches(patchify(pixel_values, self.patch_size))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,N,K) -> (B,N,P)."""
        return self.mean + self.unproject(tokens / self.scales)
