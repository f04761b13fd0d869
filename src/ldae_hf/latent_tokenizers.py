"""Learned tokenizers as they lie on a disk or the Hub, and the autoencoder of latent diffusion from diffusers.

A folder holds `ldae_tokenizer.json` (what it is), `ldae_tokenizer.safetensors` (what the model's tokenizer module takes
as buffers) and, of a convolutional one, an `AutoencoderKL` as diffusers saves it.
"""

import json
import math
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file
from transformers.utils.hub import resolve_revision

from .configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LEARNED_TOKENIZERS
from .patch_tokenizers import TOKENIZERS


CONFIG_NAME = "ldae_tokenizer.json"
WEIGHTS_NAME = "ldae_tokenizer.safetensors"
# The keys of an AutoencoderKL's configuration that its forward pass depends on.
_SHAPING = (
    "act_fn block_out_channels down_block_types in_channels latent_channels layers_per_block mid_block_add_attention "
    "norm_num_groups out_channels up_block_types use_post_quant_conv use_quant_conv"
).split()
_STATED = {"tokenizer": str, "patch_size": int, "latent_dim": int, "fingerprint": str, "training": dict}


@dataclass
class LearnedTokenizer:
    """A trained tokenizer, for `model.set_tokenizer`.

    Args:
        tokenizer: `"vqgan"`, `"conv_vae"`, `"patch_vae"` or `"patch_ae"`.
        patch_size: side of the square of pixels that one token stands for. latent_dim: K, values of a token.
        buffers: of the model's tokenizer module, fp32: `explained_variance` (K,), measured on training crops, and of a
            patch-wise one `components`, `decoder_components` (K,P) and `mean` (P,).
        autoencoder: of a convolutional one, diffusers' `AutoencoderKL`.
        processor_fingerprint: of the processor that was there in the training; None for a released autoencoder.
        training: how it came to be, for people.

    Raises:
        ValueError: an unknown kind, buffers that are not those of the kind, or sizes that do not go together.
    """

    tokenizer: str
    patch_size: int
    latent_dim: int
    buffers: dict[str, torch.Tensor]
    autoencoder: AutoencoderKL | None = None
    processor_fingerprint: str | None = None
    training: dict = field(default_factory=dict)

    def __post_init__(self):
        if self.tokenizer not in LEARNED_TOKENIZERS:
            raise ValueError(f"tokenizer={self.tokenizer!r} is not one of {', '.join(LEARNED_TOKENIZERS)}.")
        patch_dim = 3 * self.patch_size**2
        if self.patch_size < 1 or not 1 <= self.latent_dim <= patch_dim:
            raise ValueError(
                f"latent_dim={self.latent_dim} must lie in 1 ... {patch_dim}, the values of a patch of "
                f"{self.patch_size} pixels."
            )
        expected = {"explained_variance": (self.latent_dim,)}
        if self.tokenizer not in CONVOLUTIONAL_TOKENIZERS:
            expected |= dict.fromkeys(("components", "decoder_components"), (self.latent_dim, patch_dim))
            expected["mean"] = (patch_dim,)
        found = {name: tuple(value.shape) for name, value in self.buffers.items()}
        if found != expected:
            raise ValueError(f"A {self.tokenizer} tokenizer of this size has the tensors {expected}, not {found}.")
        if not all(value.isfinite().all() for value in self.buffers.values()):
            raise ValueError("The tokenizer's tensors hold values that are not finite; train it again.")
        if not (self.buffers["explained_variance"] > 0).all():
            raise ValueError("A latent of the tokenizer has no variance: it says nothing; train it again.")
        if (self.tokenizer in CONVOLUTIONAL_TOKENIZERS) != (self.autoencoder is not None):
            raise ValueError(
                f"tokenizer={self.tokenizer!r} {'needs an' if self.autoencoder is None else 'has no'} autoencoder."
            )
        if self.autoencoder is not None:
            check_geometry(self.autoencoder, self.patch_size, self.latent_dim)

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of the kind, of all tensors in fp32, and of what the autoencoder makes of them."""
        digest = sha256(f"{self.tokenizer} {self.patch_size} {self.latent_dim} ".encode())
        tensors = dict(self.buffers)
        if self.autoencoder is not None:
            shaping = {key: self.autoencoder.config[key] for key in _SHAPING}
            digest.update(json.dumps(shaping, sort_keys=True).encode())
            tensors |= {f"autoencoder.{name}": value for name, value in self.autoencoder.state_dict().items()}
        for name, value in sorted(tensors.items()):
            digest.update(f"{name} {tuple(value.shape)} ".encode())
            digest.update(value.detach().cpu().float().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def module(self, latent_scaling: str = "global") -> torch.nn.Module:
        """The tokenizer as a module of its own, with `encode` and `decode`."""
        module = TOKENIZERS[self.tokenizer](self.patch_size, 3, self.latent_dim, latent_scaling)
        module.load_state_dict(self.buffers)
        if self.autoencoder is not None:
            module.attach(self.autoencoder)
        return module

    def save_pretrained(self, folder: str | Path) -> None:
        """Writes the folder that `from_pretrained` reads."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        if self.autoencoder is not None:
            self.autoencoder.save_pretrained(folder)
            config = json.loads((folder / "config.json").read_text())
            config.pop("_name_or_path", None)  # where it was loaded from is nobody's business
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        buffers = {name: value.cpu().contiguous().clone() for name, value in self.buffers.items()}  # U may be V
        save_file(buffers, folder / WEIGHTS_NAME)
        stated = {
            "tokenizer": self.tokenizer,
            "patch_size": self.patch_size,
            "latent_dim": self.latent_dim,
            "processor_fingerprint": self.processor_fingerprint,
            "fingerprint": self.fingerprint,
            "training": self.training,
        }
        (folder / CONFIG_NAME).write_text(json.dumps(stated, indent=2) + "\n")

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, *, subfolder: str = "", revision: str = "main"
    ) -> "LearnedTokenizer":
        """Loads from a folder or the Hub, `subfolder="tokenizer"` of an encoder's repository for example.

        Raises:
            ValueError: there is no tokenizer, it is damaged, or its tensors are not those that its JSON names.
        """
        where = dict(subfolder=subfolder, revision=resolve_revision(pretrained_model_name_or_path, revision))
        named = f"{pretrained_model_name_or_path}{f' (subfolder {subfolder})' if subfolder else ''}"
        try:
            files = [
                cached_file(pretrained_model_name_or_path, name, _raise_exceptions_for_missing_entries=False, **where)
                for name in (CONFIG_NAME, WEIGHTS_NAME)
            ]
        except OSError as error:
            raise ValueError(f"There is no learned tokenizer at {named}: {_in_one_line(error)}") from error
        if None in files:
            raise ValueError(f"{named} holds no learned tokenizer: {CONFIG_NAME} and {WEIGHTS_NAME} belong there.")
        try:
            stated = json.loads(Path(files[0]).read_text())
            buffers = load_file(files[1])
        except (ValueError, SafetensorError) as error:
            raise ValueError(f"The tokenizer in {named} is damaged ({error}); copy or download it again.") from error
        processor = stated.pop("processor_fingerprint", None) if isinstance(stated, dict) else None
        if (
            not isinstance(stated, dict)
            or {name: type(value) for name, value in stated.items()} != _STATED
            or type(processor) not in (str, type(None))
        ):
            raise ValueError(f"{CONFIG_NAME} in {named} does not say what it has to: {', '.join(_STATED)}.")
        fingerprint = stated.pop("fingerprint")
        convolutional = stated["tokenizer"] in CONVOLUTIONAL_TOKENIZERS
        autoencoder = load_autoencoder(pretrained_model_name_or_path, **where) if convolutional else None
        learned = cls(**stated, buffers=buffers, autoencoder=autoencoder, processor_fingerprint=processor)
        if learned.fingerprint != fingerprint:
            raise ValueError(
                f"The tensors of the tokenizer in {named} do not have the fingerprint that {CONFIG_NAME} names: a file "
                "was damaged or exchanged; copy or download it again."
            )
        return learned


def build_autoencoder(
    image_size: int, stride: int, base_width: int, residual_blocks: int, latent_channels: int
) -> AutoencoderKL:
    """Latent diffusion's KL autoencoder with new weights: widths 1, 2, 4, 4, … times `base_width`, halving each time.

    Args:
        stride: pixels of the image per place of the latents, a power of two. latent_channels: c.
    """
    levels = int(math.log2(stride)) + 1
    return AutoencoderKL(
        sample_size=image_size,
        latent_channels=latent_channels,
        block_out_channels=[base_width * min(2**level, 4) for level in range(levels)],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=residual_blocks,
        norm_num_groups=min(32, max(1, base_width // 4)),
    )


def load_autoencoder(name_or_path: str | Path, **where) -> AutoencoderKL:
    """A released `AutoencoderKL`, from safetensors only.

    Raises:
        ValueError: it is not there, or not in that form.
    """
    options = dict(use_safetensors=True, output_loading_info=True) | where
    try:
        autoencoder, info = AutoencoderKL.from_pretrained(name_or_path, **options)
    # diffusers' and torch's own, for files that are missing, broken or at odds, and configurations of nothing.
    except (OSError, ValueError, TypeError, ArithmeticError, LookupError, RuntimeError, AttributeError) as error:
        raise ValueError(
            f"There is no AutoencoderKL in safetensors at {name_or_path}: {_in_one_line(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):  # left without values
        raise ValueError(f"The AutoencoderKL at {name_or_path} lacks weights, the first is {missing[0]!r}.")
    return autoencoder


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def autoencoder_stride(autoencoder: AutoencoderKL) -> int:
    """Pixels of the image per place of the latents."""
    return 2 ** (len(autoencoder.config.block_out_channels) - 1)


def check_geometry(autoencoder: AutoencoderKL, patch_size: int, latent_dim: int) -> None:
    """Raises ValueError unless the autoencoder takes colour images and its latents make tokens of this size."""
    stride, channels = autoencoder_stride(autoencoder), autoencoder.config.latent_channels
    if autoencoder.config.in_channels != 3 or autoencoder.config.out_channels != 3:
        raise ValueError(
            f"The autoencoder turns {autoencoder.config.in_channels} channels into {autoencoder.config.out_channels}; "
            "it has to take and give colour images, of 3."
        )
    if patch_size % stride or (patch_size // stride) ** 2 * channels != latent_dim:
        raise ValueError(
            f"The autoencoder has stride {stride} and {channels} channels: a patch of {patch_size} pixels makes "
            f"{patch_size / stride:g}² x {channels} latent values, not latent_dim={latent_dim}."
        )


__all__ = ["LearnedTokenizer"]
