"""l-DAE from patches to loss ("Deconstructing Denoising Diffusion Models for Self-Supervised Learning", 2401.14404).

B images · C channels · H, W pixels · N tokens · P = patch_size² · C values of a patch · K latent values of a token
D width · T noise levels · V the first K principal directions of patches · s the latent scale

    patches p -> latents z = s V (p - mean) -> noisy latents z_t = gamma_t z + sigma_t eps
    -> image x_t = mean + Vᵀ z_t / s -> ViT encoder -> ViT decoder
    -> restored image, compared with p in the PCA space (Eq. 4).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling, ImageClassifierOutput
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .configuration_ldae import LDAEConfig
from .layers_ldae import (
    LDAEAttention,
    LDAEDecoder,
    LDAEGlobalTokens,
    LDAELabelEmbedding,
    LDAELayer,
    LDAETimestepEmbedding,
    NoGlobalTokens,
    NoLabels,
    sincos_positions,
)
from .loading_ldae import SafeLoading
from .noise_schedules import NoiseSchedule
from .patch_tokenizers import TOKENIZERS, Tokenizer, patchify, unpatchify
from .prediction_targets import NETWORK_INPUTS, PREDICTIONS, clean_latents, clean_patches


@dataclass
class LDAEForPreTrainingOutput(ModelOutput):
    """Output of [`LDAEForPreTraining`].

    loss: () mean over images and tokens of lambda_t / K · Σ_i w_i r_i².
    prediction: (B,N,P) or, where the network answers in latents, (B,N,K).
    noisy_tokens: (B,N,K) the latents that the network was shown. timesteps: (B,) or (B,N), their noise levels.
    """

    loss: torch.Tensor | None = None
    prediction: torch.Tensor | None = None
    noisy_tokens: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None


# Keywords that transformers hands to every forward, beside our own.
COMMON_KEYWORDS = {
    "interpolate_pos_encoding",
    "num_items_in_batch",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
    "use_cache",
}


def refuse_unknown(keywords: dict) -> None:
    """Raises TypeError for a keyword that no forward knows: `timestep=3` must not give the default's features."""
    if unknown := sorted(keywords.keys() - COMMON_KEYWORDS):
        raise TypeError(f"forward() has no argument {unknown[0]!r}; it takes pixel_values, timesteps and noise.")


class LDAEPreTrainedModel(SafeLoading, PreTrainedModel):
    """What the three models share: initialisation, loading that never invents weights, the PCA basis."""

    config_class = LDAEConfig
    base_model_prefix = "ldae"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["LDAELayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {"hidden_states": LDAELayer, "attentions": LDAEAttention}
    _keep_in_fp32_modules_strict = ["tokenizer", "schedule"]

    def __init__(self, config: LDAEConfig, *args, **kwargs):
        config.validate_values()  # again: a configuration can be changed after its own check
        config.validate_pairs()
        super().__init__(config, *args, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        """As DiT: linear layers Xavier-uniform with zero bias; the timestep MLP normal with std 0.02; the last layer of
        every modulation and the decoder's head zero, so that each block starts as the identity and the model answers 0;
        the table of classes and global tokens normal with std 0.02.
        Buffers: the DCT basis, the noise tables, the sine-cosine positions (none of them survives a meta device).
        """
        if isinstance(module, nn.Linear):
            if hasattr(module, "initial_std"):
                init.normal_(module.weight, std=module.initial_std)
            else:
                init.xavier_uniform_(module.weight)
            init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding | LDAEGlobalTokens):
            init.normal_(module.weight, std=0.02)
        elif isinstance(module, Tokenizer):
            for name, value in module.unfitted().items():
                init.copy_(getattr(module, name), value)
        elif isinstance(module, NoiseSchedule):
            for buffer, value in zip((module.gammas, module.sigmas), module.tables(), strict=True):
                init.copy_(buffer, value)
        elif isinstance(module, LDAEModel):
            init.copy_(module.position_embeddings, sincos_positions(self.config.hidden_size, module.grid))
        elif isinstance(module, nn.BatchNorm1d):
            super()._init_weights(module)

    @torch.no_grad()
    def set_processor(self, processor) -> None:
        """Copies the PCA basis of a fitted [`LDAEImageProcessor`] into the model and its fingerprint into the config.

        Raises:
            ValueError: the processor is not fitted, it was made for another patch, latent size or latent scaling, or
                the model has its learned tokenizer already.
        """
        if not processor.fitted:
            raise ValueError("This processor has no PCA basis yet; call processor.fit(images) first.")
        if self.config.tokenizer_fingerprint is not None:
            raise ValueError(
                "This model has its learned tokenizer already, which the basis of a processor would replace; "
                "call model.set_processor(processor) before model.set_tokenizer(...)."
            )
        self._check_processor_geometry(processor)
        tokenizer = self.base_model.tokenizer
        for name, value in tokenizer.fitted(*processor.basis).items():
            getattr(tokenizer, name).copy_(value)
        self.config.processor_fingerprint = processor.fingerprint

    @torch.no_grad()
    def set_tokenizer(self, learned) -> None:
        """Takes a trained [`LearnedTokenizer`] and puts its fingerprint into the config, after `set_processor`.

        A patch-wise one is copied into the weights. A convolutional one is kept beside them: a model that was loaded
        needs it handed in again.

        Raises:
            ValueError: the tokenizer is of another kind, patch or latent size, was trained with another processor, or
                is not the one that the model was trained with.
        """
        for key in ("tokenizer", "patch_size", "latent_dim"):
            ours, theirs = getattr(self.config, key), getattr(learned, key)
            if ours != theirs:
                raise ValueError(f"The model has {key}={ours!r} but the learned tokenizer has {key}={theirs!r}.")
        if learned.processor_fingerprint not in (None, self.config.processor_fingerprint):
            raise ValueError(
                f"The tokenizer was trained with the processor {learned.processor_fingerprint[:12]}, the model has "
                f"{(self.config.processor_fingerprint or 'none yet')[:12]}; call model.set_processor(processor) first, "
                "with the processor in the tokenizer's folder."
            )
        if self.config.tokenizer_fingerprint not in (None, learned.fingerprint):
            raise ValueError(
                f"The model was trained with the tokenizer {self.config.tokenizer_fingerprint[:12]}, not with "
                f"{learned.fingerprint[:12]}; load the one in the model's own folder."
            )
        tokenizer = self.base_model.tokenizer
        for name, value in learned.buffers.items():
            getattr(tokenizer, name).copy_(value)
        if learned.autoencoder is not None:
            tokenizer.attach(learned.autoencoder)
        self.config.tokenizer_fingerprint = learned.fingerprint

    def check_processor(self, processor) -> None:
        """Raises ValueError unless this model's PCA basis came from this processor."""
        self._check_processor_geometry(processor)
        if processor.fingerprint != self.config.processor_fingerprint:
            raise ValueError(
                f"The processor's PCA basis ({processor.fingerprint[:12]}) is not the one this model was built with "
                f"({(self.config.processor_fingerprint or 'none yet')[:12]}); load both from the same folder, "
                "or call model.set_processor(processor) before training."
            )
        # A model made from a saved configuration alone has the fingerprint, but not the basis.
        if not self.base_model.tokenizer.holds(processor.components, processor.mean):
            raise ValueError(
                f"The model's configuration names this processor ({processor.fingerprint[:12]}), but its weights hold "
                "another PCA basis; load the weights too, or call model.set_processor(processor) before training."
            )

    def _check_processor_geometry(self, processor) -> None:
        for key in ("patch_size", "patch_dim", "latent_dim", "latent_scaling"):
            ours, theirs = getattr(self.config, key), getattr(processor, key)
            if ours != theirs:
                raise ValueError(f"The model has {key}={ours!r} but the processor has {key}={theirs!r}.")


class LDAEModel(LDAEPreTrainedModel):
    """The encoder: images in, one feature vector per patch out. Deterministic: no noise, no masking, all tokens.

    An image is first projected on the K latent directions that the encoder was trained on (its other input weights
    were hardly trained), then encoded at `config.feature_timestep`, and as "no class" where there are class labels.
    """

    _keys_to_ignore_on_load_unexpected = [r"^decoder\.", r"^batch_norm\.", r"^classifier\."]

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        tokenizer = TOKENIZERS[config.tokenizer]
        self.tokenizer = tokenizer(config.patch_size, config.num_channels, config.latent_dim, config.latent_scaling)
        self.schedule = NoiseSchedule(
            config.noise_schedule, config.num_train_timesteps, config.sigma_max, config.timestep_block
        )
        self.network_input = NETWORK_INPUTS[config.input_space]
        input_dim = config.latent_dim if config.input_space == "latent" else config.patch_dim
        self.patch_embedding = nn.Linear(input_dim, config.hidden_size)
        self.register_buffer("position_embeddings", sincos_positions(config.hidden_size, self.grid))
        self.timestep_embedding = LDAETimestepEmbedding(config)
        self.label_embedding = NoLabels() if config.num_classes is None else LDAELabelEmbedding(config)
        self.global_tokens = LDAEGlobalTokens(config) if config.num_global_tokens else NoGlobalTokens()
        self.layers = nn.ModuleList([LDAELayer(config, config.hidden_size) for _ in range(config.num_hidden_layers)])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """What transformers calls so; accelerate asks for it when it shards a model."""
        return self.patch_embedding

    @property
    def grid(self) -> tuple[int, int]:
        """Patches of a training image, (rows, columns)."""
        return (self.config.image_size // self.config.patch_size,) * 2

    def positions(self, grid: tuple[int, int]) -> torch.Tensor:
        """(1,N,D) positions of a grid of patches; bicubically resized where it is not the training grid."""
        if grid == self.grid:
            return self.position_embeddings
        table = self.position_embeddings.unflatten(1, self.grid).permute(0, 3, 1, 2)
        table = F.interpolate(table, size=grid, mode="bicubic", align_corners=False)
        return table.flatten(2).transpose(1, 2)

    def encode(self, tokens: torch.Tensor, conditioning: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        """What the network is shown, (B,N,K) or (B,N,P), through the blocks: (B,G+N,D), before any final norm."""
        dtype = self.patch_embedding.weight.dtype  # fp32 under autocast, so that the residual stream is fp32 too
        hidden_states = self.patch_embedding(tokens.to(dtype)) + self.positions(grid).to(dtype)
        hidden_states = self.global_tokens(hidden_states, conditioning)
        for layer in self.layers:
            hidden_states = layer(hidden_states, conditioning)
        return hidden_states

    def grid_of(self, pixel_values: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of patches of these images.

        Raises:
            ValueError: no images, or not a batch of floating-point images with the right number of channels.
        """
        if pixel_values is None:
            raise ValueError("There are no pixel_values.")
        if not pixel_values.is_floating_point():
            raise ValueError(f"pixel_values must be normalised by the processor, not {pixel_values.dtype}.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"pixel_values must be (batch, {self.config.num_channels}, height, width), "
                f"not {tuple(pixel_values.shape)}."
            )
        return pixel_values.shape[2] // self.config.patch_size, pixel_values.shape[3] // self.config.patch_size

    @merge_with_config_defaults
    @capture_outputs(tie_last_hidden_states=False)
    def forward(
        self,
        pixel_values: torch.Tensor,
        timesteps: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """Features of images.

        Args:
            pixel_values: (B,C,H,W), normalised by the processor; H and W multiples of the patch size.
            timesteps: the condition, one integer, (B,) or (B,N); default `config.feature_timestep`.
            noise: (B,N,K) standard normal noise to add at `timesteps` (Table 5, "noisy input"); default none.

        Returns:
            `last_hidden_state` (B,N,D), layer-normalised without parameters, as the decoder's first block sees it;
            `pooler_output` (B,D), its mean over tokens; on request `hidden_states`, the raw residual stream before
            the first block and after each (B,G+N,D), and `attentions` (with `attn_implementation="eager"`).

        Raises:
            ValueError: wrong image shape or type, or timesteps or noise that do not fit.
        """
        refuse_unknown(kwargs)
        grid = self.grid_of(pixel_values)
        tokens = self.tokenizer.encode(pixel_values)  # (B, N, K)
        timesteps = self.config.feature_timestep if timesteps is None else timesteps
        timesteps = self.schedule.as_timesteps(timesteps, tokens.device, *tokens.shape[:2])  # (1,), (B,) or (B, N)
        if noise is not None:
            tokens = self.schedule.add_noise(tokens, noise.to(tokens), timesteps)
        conditioning = self.label_embedding(self.timestep_embedding(timesteps))
        hidden_states = self.encode(self.network_input(self.tokenizer, tokens), conditioning, grid)
        hidden_states = hidden_states[:, self.global_tokens.count :]  # (B, N, D)
        features = F.layer_norm(hidden_states, hidden_states.shape[-1:], eps=self.config.layer_norm_eps)
        return BaseModelOutputWithPooling(last_hidden_state=features, pooler_output=features.mean(dim=1))


class LDAEForPreTraining(LDAEPreTrainedModel):
    """The denoising autoencoder: corrupts images in the latent space and learns to restore them."""

    # It records nothing, but once the encoder has been asked for hidden states, its hooks compile only under a
    # `capture_outputs`.
    _can_record_outputs = {}

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.ldae = LDAEModel(config)
        self.prediction_target = PREDICTIONS[config.input_space, config.prediction_target](config)
        output_dim = config.latent_dim if self.prediction_target.answers_in_latents else config.patch_dim
        self.decoder = LDAEDecoder(config, output_dim)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        timesteps: int | torch.Tensor | None = None,
        noise: torch.Tensor | None = None,
        dropped_labels: torch.Tensor | None = None,
        tokens: torch.Tensor | None = None,
        **kwargs,
    ) -> LDAEForPreTrainingOutput:
        """One denoising step.

        Args:
            pixel_values: (B,C,H,W), normalised by the processor.
            labels: (B,) classes, for a model with `num_classes`; without them every image is of "no class".
            timesteps: (B,) in 0 ... T-1, (B,N) for each token its own, or one integer; drawn uniformly if not given.
            noise: (B,N,K) standard normal; drawn if not given.
            dropped_labels: (B,) bool, whose label is replaced by "no class"; in training drawn if not given.
            tokens: (B,N,K) what the tokenizer makes of the images, in their place where they are cached: of square
                images, and for targets in latents.

        Raises:
            ValueError: an input does not fit the model.
        """
        refuse_unknown(kwargs)
        if pixel_values is None and tokens is None:
            raise ValueError("forward() needs pixel_values, or tokens in their place.")
        grid = self.ldae.grid_of(pixel_values) if tokens is None else self.square_grid(tokens)
        tokens = self.ldae.tokenizer.encode(pixel_values) if tokens is None else tokens  # (B, N, K)
        timesteps, noise = self.ldae.schedule.sample(tokens, timesteps, noise, grid)
        noisy_tokens = self.ldae.schedule.add_noise(tokens, noise, timesteps)  # gamma_t z + sigma_t eps
        labels = self.ldae.label_embedding.drop(labels, dropped_labels)
        prediction = self.predict(noisy_tokens, timesteps, labels, grid)
        loss = self.loss(prediction, pixel_values, tokens, noise, timesteps)
        return LDAEForPreTrainingOutput(loss, prediction, noisy_tokens, timesteps)

    def predict(
        self,
        noisy_tokens: torch.Tensor,
        timesteps: torch.Tensor,
        labels: torch.Tensor | None = None,
        grid: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The network's answer to noisy latents (B,N,K): (B,N,K) or (B,N,P), whatever its target is.

        Args:
            timesteps: (B,), (B,N), or (1,) for all. labels: (B,) classes, None for "no class".
            grid: (rows, columns) of the tokens; default that of the training images.
        """
        conditioning = self.ldae.label_embedding(self.ldae.timestep_embedding(timesteps), labels)  # (B, 1, D)
        shown = self.ldae.network_input(self.ldae.tokenizer, noisy_tokens)  # (B, N, K) or (B, N, P)
        hidden_states = self.ldae.encode(shown, conditioning, grid or self.ldae.grid)  # (B, G + N, D)
        return self.decoder(hidden_states, conditioning).to(noisy_tokens.dtype)

    def square_grid(self, tokens: torch.Tensor) -> tuple[int, int]:
        """(rows, columns) of cached tokens (B,N,K).

        Raises:
            ValueError: they do not fill a square, are not K values each, or the target needs the images themselves.
        """
        if not self.prediction_target.answers_in_latents:
            raise ValueError("Cached tokens can stand for images only where the target is latents, not pixels.")
        side = math.isqrt(tokens.shape[1])
        if tokens.shape[1:] != (side**2, self.config.latent_dim):
            raise ValueError(
                f"tokens must be (batch, N, {self.config.latent_dim}) with N a square, not {tuple(tokens.shape)}."
            )
        return side, side

    def loss(self, prediction, pixel_values, tokens, noise, timesteps) -> torch.Tensor:
        """() lambda_t / K · Σ_i w_i r_i² (Eq. 4), mean over images and tokens. Targets in latents need no pixels."""
        patches = None if pixel_values is None else patchify(pixel_values, self.config.patch_size).to(tokens.dtype)
        squared_error = self.prediction_target.squared_error(self.ldae.tokenizer, prediction, patches, tokens, noise)
        gammas, sigmas = self.ldae.schedule.levels(timesteps)
        weights = self.prediction_target.loss_weight(gammas, sigmas).squeeze(-1)  # (B, 1 or N)
        return (weights * squared_error).mean() / self.config.latent_dim

    def denoise(
        self,
        pixel_values: torch.Tensor,
        timesteps: int | torch.Tensor,
        noise: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noisy images and the model's restorations of them, each (B,C,H,W) in the processor's normalisation.

        What the noisy image shows is mean + Vᵀ z_t / s, whatever space the network itself sees.

        Raises:
            ValueError: the model predicts noise, and a level holds no signal to find.
        """
        output = self(pixel_values, labels=labels, timesteps=timesteps, noise=noise)
        target, tokenizer, noisy_tokens = self.prediction_target, self.ldae.tokenizer, output.noisy_tokens
        levels = self.ldae.schedule.levels(output.timesteps)
        if target.predicts_noise and not levels[0].all():
            raise ValueError("At gamma = 0 nothing of the image is left, and a model of the noise cannot restore it.")
        latents = clean_latents(target, tokenizer, output.prediction, noisy_tokens, *levels)
        noisy, clean = tokenizer.decode(noisy_tokens), clean_patches(target, tokenizer, output.prediction, latents)
        grid = self.ldae.grid_of(pixel_values)
        return tuple(unpatchify(patches, self.config.patch_size, grid) for patches in (noisy, clean))


class LDAEForImageClassification(LDAEPreTrainedModel):
    """The encoder with the paper's linear head: mean over tokens -> BatchNorm without affine -> linear."""

    _keys_to_ignore_on_load_unexpected = [r"^decoder\."]
    _keys_that_may_be_new = ("batch_norm.", "classifier.")

    def __init__(self, config: LDAEConfig):
        super().__init__(config)
        self.ldae = LDAEModel(config)
        self.batch_norm = nn.BatchNorm1d(config.hidden_size, affine=False, eps=1e-6)
        self.classifier = nn.Linear(config.hidden_size, config.num_labels)
        self.post_init()

    @can_return_tuple
    def forward(
        self, pixel_values: torch.Tensor, labels: torch.Tensor | None = None, **kwargs
    ) -> ImageClassifierOutput:
        """Class scores `logits` (B,num_labels) of images (B,C,H,W), and the loss where `labels` (B,) are given.

        Further arguments (`timesteps`, `noise`, `output_hidden_states`, …) go to [`LDAEModel`].
        """
        outputs = self.ldae(pixel_values, return_dict=True, **kwargs)
        logits = self.classifier(self.batch_norm(outputs.pooler_output))
        # The keywords carry Trainer's `num_items_in_batch`: with it the loss is right under gradient accumulation.
        loss = None if labels is None else self.loss_function(labels, logits, self.config, **kwargs)
        return ImageClassifierOutput(loss, logits, outputs.hidden_states, outputs.attentions)


__all__ = ["LDAEModel", "LDAEForPreTraining", "LDAEForImageClassification", "LDAEPreTrainedModel"]
