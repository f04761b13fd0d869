"""What a model costs, whatever trains it: parameters and FLOPs."""

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForPreTraining

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from ..layers_ldae import LDAETimestepEmbedding
from ..recipes import Recipe


@dataclass(frozen=True)
class Parameters:
    """How many there are: of `encoder` and `decoder`, of one `block` of the encoder, in all `blocks`, and those in
    `matrices`, which bf16 copies."""

    encoder: int
    decoder: int
    block: int
    blocks: int
    matrices: int

    @property
    def total(self) -> int:
        return self.encoder + self.decoder


def count_parameters(config: LDAEConfig) -> Parameters:
    """Counts those of the real model, which is built without memory for them."""
    with torch.device("meta"):
        model = AutoModelForPreTraining.from_config(config)
    encoder, decoder, block, *blocks = (
        sum(parameter.numel() for parameter in module.parameters())
        for module in (model.ldae, model.decoder, model.ldae.layers[0], model.ldae.layers, model.decoder.layers)
    )
    matrices = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    return Parameters(encoder, decoder, block, sum(blocks), matrices)


# ---- FLOPs


def ends(config: LDAEConfig) -> tuple[int, int]:
    """Values per token that the network is shown, and that it answers: K or P each."""
    latents_in = config.input_space == "latent"
    latents_out = latents_in or config.prediction_target == "latent"
    return tuple(config.latent_dim if latents else config.patch_dim for latents in (latents_in, latents_out))


def forward_flops_per_image(config: LDAEConfig) -> float:
    """FLOPs of a forward pass: the blocks, their attention, the patch embedding and the head, at 2 per multiply-add.

    The MLPs on an image's timestep, the tokenizer and all elementwise work are left out, so that the number is a model
    property and MFU is honest. Where each token has its own timestep, its MLPs are as large as a block and counted.
    """
    tokens = config.num_patches + config.num_global_tokens

    def blocks(count: int, width: int) -> int:  # multiply-adds per token
        linear = width * (4 * width + 2 * int(width * config.mlp_ratio))  # qkv, projection and MLP
        return count * (linear + 2 * tokens * width)  # Q Kᵀ and the weighted sum

    encoder, decoder = config.hidden_size, config.decoder_width
    network = blocks(config.num_hidden_layers, encoder) + blocks(config.decoder_num_hidden_layers, decoder)
    network += encoder * decoder if decoder != encoder else 0
    shown, answered = ends(config)
    linear = config.num_patches * (encoder * shown + decoder * answered)
    timesteps = sum(config.timesteps_shape)  # N of (N,), none of ()
    return 2 * (tokens * network + linear + timesteps * conditioning_multiply_adds(config))


def conditioning_multiply_adds(config: LDAEConfig) -> int:
    """Of one timestep: its embedding and the MLP of every block and of the decoder's last norm."""
    width, hidden, decoder = config.hidden_size, config.conditioning_hidden_size, config.decoder_width
    embedding = width * (LDAETimestepEmbedding.num_frequencies + width)
    mlps = config.num_hidden_layers + config.decoder_num_hidden_layers + 1
    first = 0 if hidden is None else mlps * width * hidden
    modulated = 6 * config.num_hidden_layers * width + (6 * config.decoder_num_hidden_layers + 2) * decoder
    return embedding + first + (hidden or width) * modulated


def training_flops_per_image(config: LDAEConfig) -> float:
    """FLOPs of one training step per image: three forward passes, since the backward pass is two."""
    return 3 * forward_flops_per_image(config)


def recipe_flops_per_image(recipe: Recipe) -> float:
    """FLOPs of one training step per image, of an l-DAE or of the baseline."""
    if recipe.is_masked:
        from .masking import mae_config, mae_flops_per_image

        return mae_flops_per_image(mae_config(recipe))
    return training_flops_per_image(recipe.model_config())


def tokenizer_flops_per_image(config: LDAEConfig, settings: dict) -> float:
    """FLOPs of the encoder of a convolutional tokenizer on one image, counted; 0 for patch-wise ones.

    Args:
        settings: the tokenizer section of a recipe.
    """
    if config.tokenizer not in CONVOLUTIONAL_TOKENIZERS:
        return 0.0
    with torch.device("meta"), FlopCounterMode(display=False) as counter, torch.no_grad():
        untrained_autoencoder(config, settings).encode(torch.empty(1, 3, config.image_size, config.image_size))
    return float(counter.get_total_flops())


def untrained_autoencoder(config: LDAEConfig, settings: dict) -> torch.nn.Module:
    """The autoencoder of a convolutional tokenizer with new weights: as slow as a trained one."""
    from ..latent_tokenizers import build_autoencoder  # it needs diffusers

    channels = config.latent_dim // (config.patch_size // settings["stride"]) ** 2
    sizes = (config.image_size, settings["stride"], settings["base_width"], settings["residual_blocks"])
    return build_autoencoder(*sizes, channels)
