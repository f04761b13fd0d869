"""Image to tokens and back. Every tokenizer speaks two verbs:
encode (B,C,H,W) -> (B,N,K) and decode (B,N,K) -> (B,N,P). Torch only.

They hold buffers and are not trained with the model; whatever trains them (a PCA, `training/tokenizers.py`) does it
before. The buffers are persistent, fp32, and filled by the model's `_init_weights`, since none survives a meta device.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


def patch_grid(pixel_values: torch.Tensor, patch_size: int) -> tuple[int, int]:
    """(rows, columns) of patches of images (B,C,H,W).

    Raises:
        ValueError: the image is not made of whole patches.
    """
    height, width = pixel_values.shape[2:]
    if height % patch_size or width % patch_size:
        raise ValueError(f"An image of {height}x{width} pixels is not made of whole {patch_size}x{patch_size} patches.")
    return height // patch_size, width // patch_size


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """(B,C,H,W) -> (B,N,P): the patches row by row, each in (channel, row, column) order as a convolution sees it.

    Raises:
        ValueError: the image is not made of whole patches.
    """
    (batch, channels), (rows, columns) = pixel_values.shape[:2], patch_grid(pixel_values, patch_size)
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


class Tokenizer(nn.Module):
    """What all tokenizers share: buffers, among them `explained_variance`, the variance of each unscaled latent."""

    def __init__(self, patch_size: int, num_channels: int, latent_dim: int, latent_scaling: str):
        super().__init__()
        self.patch_size, self.num_channels = patch_size, num_channels
        self.latent_dim, self.latent_scaling = latent_dim, latent_scaling
        for name, value in self.unfitted().items():
            self.register_buffer(name, value)

    @property
    def scales(self) -> torch.Tensor:
        """(K,) the factors s of encode and decode."""
        return latent_scales(self.explained_variance, self.latent_dim, self.latent_scaling)


class PatchTokenizer(Tokenizer):
    """What the patch-wise tokenizers share: z = s W (p - mean), and back p = mean + Uᵀ z / s, with s the latent scale.

    A subclass has `project`, W p, (B,N,P) -> (B,N,K), and `unproject`, Uᵀ c, (B,N,K) -> (B,N,P), both without mean and
    scale and in the buffers' precision under autocast; and `fitted`, the buffers for the PCA of the patches: components
    (P,P), mean (P,), explained variance (P,).
    """

    def unfitted(self) -> dict[str, torch.Tensor]:
        """The buffers before a fit: those of a DCT with mean 0 and all variances 1."""
        basis = dct_basis(self.patch_size, self.num_channels)
        buffers = self.fitted(basis, torch.zeros_like(basis[0]), torch.ones_like(basis[0]))
        return {name: value.float() for name, value in buffers.items()}

    def holds(self, components: torch.Tensor, mean: torch.Tensor) -> bool:
        """Whether these buffers came from a PCA with these components (P,P) and mean (P,)."""
        return torch.equal(self.mean.float().cpu(), mean.float())

    @property
    def loss_scale(self) -> torch.Tensor:
        """() the scalar that brings residues to latent units; under `whiten` too, where the tail would explode."""
        scaling = "global" if self.latent_scaling == "whiten" else self.latent_scaling
        return latent_scales(self.explained_variance, self.latent_dim, scaling)[0]

    def encode_patches(self, patches: torch.Tensor) -> torch.Tensor:
        """(B,N,P) -> (B,N,K)."""
        return self.project(patches.to(self.mean.dtype) - self.mean) * self.scales

    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,N,K)."""
        return self.encode_patches(patchify(pixel_values, self.patch_size))

    def outside(self, centred: torch.Tensor) -> torch.Tensor:
        """(B,N,P) patches without their mean -> the part of them that no latent can hold, (B,N,P)."""
        return centred - self.unproject(self.project(centred))

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,N,K) -> (B,N,P)."""
        return self.mean + self.unproject(tokens / self.scales)


class PatchPCA(PatchTokenizer):
    """Patch-wise PCA (section 4.2): W = U = V, the first K principal directions; V is (K,P) with orthonormal rows."""

    def fitted(self, components, mean, explained_variance):
        return {"components": components[: self.latent_dim], "mean": mean, "explained_variance": explained_variance}

    def holds(self, components, mean):
        kept = components[: self.latent_dim].float()
        return super().holds(components, mean) and torch.equal(self.components.float().cpu(), kept)

    def project(self, patches):
        with torch.autocast(patches.device.type, enabled=False):
            return F.linear(patches.to(self.components.dtype), self.components)

    def unproject(self, coefficients):
        with torch.autocast(coefficients.device.type, enabled=False):
            return F.linear(coefficients.to(self.components.dtype), self.components.T)


class Pixels(PatchTokenizer):
    """The "naive" tokenizer: z = s (p - mean), K = P. It is PCA at K = P up to a rotation of the latents."""

    def fitted(self, components, mean, explained_variance):
        return {"mean": mean, "explained_variance": explained_variance @ components.square()}  # of each pixel

    def project(self, patches):
        return patches.to(self.mean.dtype)

    def unproject(self, coefficients):
        return coefficients.to(self.mean.dtype)


class RandomProjection(PatchPCA):
    """A control: K random orthonormal directions, always the same ones, in the place of the principal ones."""

    def fitted(self, components, mean, explained_variance):
        with torch.device("cpu"):  # also where a model is being built on the meta device
            generator = torch.Generator().manual_seed(0)
            directions = torch.randn(len(mean), self.latent_dim, generator=generator, dtype=torch.float64)
            directions = torch.linalg.qr(directions).Q.T.to(components)  # (K, P)
        variance = (directions @ components.T).square() @ explained_variance
        return {"components": directions, "mean": mean, "explained_variance": variance}

    def holds(self, components, mean):
        return PatchTokenizer.holds(self, components, mean)


class PatchAutoencoder(PatchPCA):
    """A linear autoencoder of patches, plain or variational (of which the posterior mean is the latent; section 4.2).

    `components` W (K,P) and `decoder_components` U (K,P) are learned, without bonds between them; `set_tokenizer`
    brings them. Until then both are the first directions of the PCA.
    """

    def fitted(self, components, mean, explained_variance):
        basis = super().fitted(components, mean, explained_variance[: self.latent_dim])
        return basis | {"decoder_components": basis["components"].clone()}

    def holds(self, components, mean):
        return PatchTokenizer.holds(self, components, mean)

    def unproject(self, coefficients):
        with torch.autocast(coefficients.device.type, enabled=False):
            return F.linear(coefficients.to(self.decoder_components.dtype), self.decoder_components.T)


class ConvolutionalTokenizer(Tokenizer):
    """The autoencoder of latent diffusion: its latents (B,c,h,w), cut into DiT's patches, times the latent scale.

    K = c · (patch_size / stride)². The autoencoder (diffusers' `AutoencoderKL`, or what speaks as it does) is handed
    in by `set_tokenizer`. It is not a part of the model: not trained, not saved with the weights, not in `parameters`.
    """

    _outside: tuple[nn.Module, ...] = ()  # a module in a tuple is no submodule

    def unfitted(self) -> dict[str, torch.Tensor]:
        """The buffers before an autoencoder is there: variances (K,) of 1."""
        return {"explained_variance": torch.ones(self.latent_dim, device="cpu")}

    def fitted(self, components, mean, explained_variance) -> dict[str, torch.Tensor]:
        """The PCA of the patches says nothing about these latents."""
        return {}

    def holds(self, components: torch.Tensor, mean: torch.Tensor) -> bool:
        """Any PCA goes with it."""
        return True

    def attach(self, autoencoder: nn.Module) -> None:
        """Takes the autoencoder, whose latents' variances are in the buffer."""
        self._outside = (autoencoder.eval().requires_grad_(False),)

    def is_attached(self, autoencoder: nn.Module) -> bool:
        """Whether this very module has been taken."""
        return bool(self._outside) and self._outside[0] is autoencoder

    def autoencoder(self, device: torch.device) -> nn.Module:
        """The autoencoder, on this device.

        Raises:
            ValueError: none has been attached.
        """
        if not self._outside:
            raise ValueError(
                "This model sees the latents of a convolutional autoencoder, which does not travel inside its weights; "
                'load it, LearnedTokenizer.from_pretrained(FOLDER, subfolder="tokenizer"), and hand it to '
                "model.set_tokenizer(...)."
            )
        return self._outside[0].to(device)

    @torch.no_grad()
    def encode(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """(B,C,H,W) -> (B,N,K), the means of the posterior."""
        autoencoder, (_, columns) = self.autoencoder(pixel_values.device), patch_grid(pixel_values, self.patch_size)
        latents = autoencoder.encode(pixel_values.to(autoencoder.dtype)).latent_dist.mode()  # (B, c, h, w)
        return patchify(latents.to(self.explained_variance.dtype), latents.shape[-1] // columns) * self.scales

    def decode(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B,N,K) -> (B,N,P), of square images.

        Raises:
            ValueError: the tokens do not fill a square.
        """
        autoencoder, side = self.autoencoder(tokens.device), math.isqrt(tokens.shape[1])
        if side**2 != tokens.shape[1]:
            raise ValueError(f"A convolutional tokenizer decodes square images only, not {tokens.shape[1]} tokens.")
        channels = autoencoder.config.latent_channels
        latents = unpatchify(tokens / self.scales, math.isqrt(self.latent_dim // channels), (side, side))
        return patchify(autoencoder.decode(latents.to(autoencoder.dtype)).sample.to(tokens.dtype), self.patch_size)


TOKENIZERS = {
    "vqgan": ConvolutionalTokenizer,
    "conv_vae": ConvolutionalTokenizer,
    "patch_vae": PatchAutoencoder,
    "patch_ae": PatchAutoencoder,
    "patch_pca": PatchPCA,
    "pixels": Pixels,
    "random_projection": RandomProjection,
}
