"""MAE, the baseline: transformers' masked autoencoder in the trainer of l-DAE ("Masked Autoencoders Are Scalable Vision
Learners", arXiv 2111.06377).

A share of the patches is left out, a ViT encodes the others, and a smaller one restores the pixels of those that were
left out, each patch normalised by its own mean and deviation. Images, crops, order and seeds are those of an l-DAE with
the same data; which patches are left out is a function of seed, epoch and sample, too.
"""

import copy
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import ViTMAEConfig, ViTMAEForPreTraining, ViTMAEModel
from transformers.models.vit_mae.modeling_vit_mae import ViTMAEForPreTrainingOutput

from ..configuration_ldae import SIZES
from ..export.transformers_vit import stock_processor
from ..image_processing_ldae import LDAEImageProcessor
from ..layers_ldae import sincos_positions
from ..manifest import write_folder
from ..progress import quietly
from ..recipes import Recipe
from .pictures import mosaic
from .session import RunError, Session
from .sources import ImageSource


# Width, blocks and heads of the decoder, by the size of the encoder, which is l-DAE's: MAE's 512 wide and 8 blocks deep
# where the paper's sizes are; half as wide as the encoder, and two thirds as deep, where they are shrunk.
DECODERS = {
    "l": (512, 8, 16),
    "half_l": (512, 8, 16),
    "b": (512, 8, 16),
    "s": (256, 8, 8),
    "desk_l": (128, 4, 4),
    "desk_half_l": (128, 4, 4),
    "desk_b": (96, 4, 3),
    "cpu_l": (64, 2, 4),
    "cpu_half_l": (64, 2, 4),
    "cpu_b": (48, 2, 3),
    "cifar10": (96, 2, 3),
    "quickstart": (64, 1, 4),
}


def mae_config(recipe: Recipe) -> ViTMAEConfig:
    """The model of a recipe with a `mask_ratio`: l-DAE's encoder size, and a decoder of MAE's.

    Raises:
        ValueError: an unknown size, or an image that no whole patches make up.
    """
    size, keys = recipe.model["size"], {key: recipe.model[key] for key in ("image_size", "patch_size", "mask_ratio")}
    if size not in DECODERS:
        raise ValueError(f"{recipe.title}: model.size {size!r} is unknown; choose one of {', '.join(DECODERS)}.")
    if keys["image_size"] % keys["patch_size"]:
        raise ValueError(f"{recipe.title}: model.image_size is not a multiple of model.patch_size.")
    encoder, (width, blocks, heads) = SIZES[size], DECODERS[size]
    return ViTMAEConfig(
        **keys,
        hidden_size=encoder["hidden_size"],
        num_hidden_layers=encoder["num_hidden_layers"],
        num_attention_heads=encoder["num_attention_heads"],
        intermediate_size=4 * encoder["hidden_size"],
        layer_norm_eps=1e-6,
        decoder_hidden_size=width,
        decoder_num_hidden_layers=blocks,
        decoder_num_attention_heads=heads,
        decoder_intermediate_size=4 * width,
        norm_pix_loss=True,
    )


def mae_flops_per_image(config: ViTMAEConfig) -> float:
    """FLOPs of a training step per image, of the products that [`forward_flops_per_image`] counts of an l-DAE."""
    patches = (config.image_size // config.patch_size) ** 2
    seen, places = int(patches * (1 - config.mask_ratio)) + 1, patches + 1  # with the class token
    width, narrow, values = config.hidden_size, config.decoder_hidden_size, config.num_channels * config.patch_size**2
    encoder = config.num_hidden_layers * seen * (12 * width**2 + 2 * seen * width)
    decoder = config.decoder_num_hidden_layers * places * (12 * narrow**2 + 2 * places * narrow)
    ends = patches * values * width + seen * width * narrow + places * narrow * values
    return 3 * 2 * (encoder + decoder + ends)


class MaskedAutoencoder(ViTMAEForPreTraining):
    """transformers' model, called with the `noise` (B,N,1) that orders the patches."""

    def forward(
        self, pixel_values: torch.Tensor, noise: torch.Tensor | None = None, **kwargs
    ) -> ViTMAEForPreTrainingOutput:
        """Images (B,C,H,W); the patches where `noise` is smallest are seen."""
        return super().forward(pixel_values, noise=None if noise is None else noise.flatten(1), **kwargs)

    @torch.no_grad()
    def initialize_as_mae(self) -> None:
        """Linear layers, and the patch embedding as one, Xavier-uniform with zero bias; class and mask token normal
        with std 0.02; fixed sine-cosine positions, zero for the class token. Queries, keys and values are drawn each as
        a layer of its own, as in ViT's JAX code, which MAE follows; MAE's PyTorch code, like l-DAE, draws the three as
        one, with weights smaller by the root of 2.

        transformers' own leaves all positions at zero, and draws linear layers from a normal distribution: it is meant
        for weights that are loaded over it.
        """
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                nn.init.zeros_(module.bias)
        embeddings, decoder = self.vit.embeddings, self.decoder
        for token in (embeddings.cls_token, decoder.mask_token):
            nn.init.normal_(token, std=0.02)
        side = self.config.image_size // self.config.patch_size
        for positions in (embeddings.position_embeddings, decoder.decoder_pos_embed):
            positions.zero_()
            positions[:, 1:] = sincos_positions(positions.shape[-1], (side, side))


UNUSED = ("processor", "tokenizer", "start_from", "cache_latents", "push_to_hub")


class Masking:
    """What the trainer asks of a method, for MAE; see [`Denoising`]."""

    input_names = ["pixel_values", "noise"]
    tokenizer = cache = None

    def __init__(self, recipe: Recipe, options: SimpleNamespace):
        unused = [key for key in UNUSED if getattr(options, key)]
        if unused:
            raise RunError(f"A masked autoencoder is trained without {unused[0]}; leave it out.")
        if recipe.model["num_classes"] is not None:
            raise RunError("A masked autoencoder sees no class labels; leave model.num_classes null.")
        self.config, self.output_dir = mae_config(recipe), options.output_dir
        self.processor = LDAEImageProcessor(recipe.model["image_size"], recipe.model["patch_size"], latent_dim=1)
        self.num_patches = (self.config.image_size // self.config.patch_size) ** 2
        self.draws = dict(num_timesteps=1, tokens_shape=(self.num_patches, 1))
        self.flops_per_image = mae_flops_per_image(self.config)

    def check(self, source: ImageSource) -> None:
        """Any images will do."""

    def prepare(self, source: ImageSource, session: Session, loading: dict, minutes: float | None) -> bool:
        """Nothing is fitted first; the processor is in the run's folder, as l-DAE's."""
        folder = self.output_dir / "processor"
        if not (folder / "preprocessor_config.json").is_file():
            session.on_main(lambda: write_folder(folder, self.save_processor))
        return True

    def build(self, session: Session, attention: str) -> MaskedAutoencoder:
        model = MaskedAutoencoder._from_config(self.config, attn_implementation=attention)
        model.initialize_as_mae()
        return model.to(session.accelerator.device, torch.get_default_dtype()).train()

    def cache_inputs(self, model: nn.Module, source: ImageSource, session: Session, loading: dict) -> None:
        """MAE reads images."""

    def blank_inputs(self, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
        """A batch of zeros."""
        pixels = (batch_size, self.config.num_channels, self.config.image_size, self.config.image_size)
        return {
            "pixel_values": torch.zeros(pixels, device=device),
            "noise": torch.zeros(batch_size, self.num_patches, 1, device=device),
        }

    @torch.no_grad()
    def picture(self, model: MaskedAutoencoder, pixels: torch.Tensor):
        """Images, what is seen of them, and with it the patches that are restored, in each patch's own contrast."""
        images = self.processor.normalize_pixels(pixels.to(model.device))
        noise = torch.rand(len(images), self.num_patches, 1, generator=torch.Generator().manual_seed(0))
        output = model(images, noise=noise.to(images))
        patches, hidden = model.patchify(images), output.mask[:, :, None].bool()
        mean, variance = patches.mean(-1, keepdim=True), patches.var(-1, keepdim=True)
        restored = output.logits.float() * (variance + 1e-6).sqrt() + mean
        rows = [("seen", torch.zeros_like(patches)), ("restored", restored)]
        rows = [(name, model.unpatchify(torch.where(hidden, filling, patches))) for name, filling in rows]
        return mosaic([("original", images), *rows], self.processor)

    def save_processor(self, folder: Path) -> None:
        """As transformers' own, for those who load the encoder without this package."""
        stock_processor(self.processor).save_pretrained(folder)

    def add_parts(self, folder: Path) -> None:
        """What belongs to a checkpoint beside its weights."""
        self.save_processor(folder)

    def save_encoder(self, folder: Path, model: MaskedAutoencoder, extras: Callable[[Path], None]) -> None:
        """As transformers' `ViTMAEModel`, which sees all patches: its mask ratio is 0."""
        config = copy.deepcopy(model.config)
        config.mask_ratio, config.dtype = 0.0, torch.get_default_dtype()
        with torch.device("meta"):
            encoder = ViTMAEModel(config)
        encoder.load_state_dict(model.vit.state_dict(), assign=True)

        def write(path: Path) -> None:
            with quietly():
                encoder.save_pretrained(path)
            extras(path)

        write_folder(folder, write)
