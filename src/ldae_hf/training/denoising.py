"""l-DAE and every step of its path in the trainer: what it is fitted to, built of, shown and saved with."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoModelForPreTraining

from ..configuration_ldae import LEARNED_TOKENIZERS
from ..modeling_ldae import LDAEForPreTraining
from ..recipes import Recipe
from .costs import training_flops_per_image
from .fit_pca import fit_processor
from .pictures import denoising_picture
from .publishing import save_encoder
from .run_tokenizer import check_given, tokenizer_for_run
from .session import RunError, Session
from .sources import ImageSource
from .token_cache import TokenCache, cache_tokens, check_cacheable
from .tokenizers import check_trainable


# Of a run, which its tokenizer's training shares.
TOKENIZER_OPTIONS = (
    "dataset image_column label_column perceptual_weights quarantine seed num_workers mixed_precision log_every"
)


class Denoising:
    """What the trainer asks of a method. The stages call it in this order: `check`, `prepare`, `build`,
    `cache_inputs`, then for every step `draws` and `input_names`, and for what is saved `add_parts` and `save_encoder`.

    Attributes:
        config: of the model. processor: what normalises images, once prepared.
        draws: what a data loader draws for each sample, as arguments of [`train_loader`].
        input_names: of a batch, what the model is called with.
        flops_per_image: of a training step.
    """

    def __init__(self, recipe: Recipe, options: SimpleNamespace):
        self.recipe, self.options, self.config = recipe, options, recipe.model_config()
        self.processor = self.tokenizer = self.cache = None
        self.labelled = self.config.num_classes is not None
        self.draws = dict(
            num_timesteps=self.config.num_noise_levels,
            tokens_shape=(self.config.num_patches, self.config.latent_dim),
            timestep_block=self.config.timestep_block,
            label_dropout=self.config.class_dropout_prob if self.labelled else None,
        )
        self.flops_per_image = training_flops_per_image(self.config)

    @property
    def input_names(self) -> list[str]:
        names = ["pixel_values" if self.cache is None else "tokens", "timesteps", "noise"]
        return names + (["labels", "dropped_labels"] if self.labelled else [])

    def check(self, source: ImageSource) -> None:
        """Raises RunError for images that it cannot be trained on, before anything is built."""
        options = self.options
        check_labels(self.config.num_classes, source)
        if not check_given(options.tokenizer, options.output_dir, self.recipe, self.config):
            check_trainable(self.recipe, self.config, source, options.perceptual_weights)
        if options.cache_latents:
            check_cacheable(self.config, self.recipe.data, source)

    def prepare(self, source: ImageSource, session: Session, loading: dict, minutes: float | None) -> bool:
        """Fits the PCA and trains the tokenizer, or takes what is given or there already; whether the time sufficed.

        Args:
            loading: image size, crop and seed, as for `train_loader`. minutes: that are left; None for no limit.
        """
        options, folder, began = self.options, self.options.output_dir, time.monotonic()
        given = options.processor
        if given is None and options.tokenizer is not None:
            beside_tokenizer = Path(options.tokenizer) / "processor"
            given = beside_tokenizer if beside_tokenizer.is_dir() else None
        self.processor = fit_processor(folder / "processor", given, self.config, source, self.recipe, session, loading)
        training = {key: getattr(options, key) for key in TOKENIZER_OPTIONS.split()}
        training["max_minutes"] = None if minutes is None else minutes - (time.monotonic() - began) / 60
        self.tokenizer = tokenizer_for_run(
            folder, options.tokenizer, self.recipe, self.config, self.processor, session, training
        )
        return self.tokenizer is not None or self.config.tokenizer not in LEARNED_TOKENIZERS

    def build(self, session: Session, attention: str) -> LDAEForPreTraining:
        """The model with new weights, drawn from torch's generator, on the device."""
        model = AutoModelForPreTraining.from_config(self.config, attn_implementation=attention)
        model.to(session.accelerator.device, torch.get_default_dtype()).train()
        model.set_processor(self.processor)
        if self.tokenizer is not None:
            model.set_tokenizer(self.tokenizer)
        return model

    def cache_inputs(
        self, model: LDAEForPreTraining, source: ImageSource, session: Session, loading: dict
    ) -> TokenCache | None:
        """Latents in place of images, if they are asked for."""
        if self.options.cache_latents:
            folder = self.options.output_dir / "latents"
            self.cache = cache_tokens(folder, model, self.processor, source, session, loading)
        return self.cache

    def blank_inputs(self, batch_size: int, device: torch.device) -> dict[str, torch.Tensor]:
        """A batch of zeros."""
        config = self.config
        latents = (batch_size, config.num_patches, config.latent_dim)
        pixels = (batch_size, config.num_channels, config.image_size, config.image_size)
        shapes = {"pixel_values": pixels, "tokens": latents, "noise": latents}
        shapes["timesteps"] = (batch_size, *config.timesteps_shape)
        kinds = {"timesteps": torch.int64, "labels": torch.int64, "dropped_labels": torch.bool}
        return {
            name: torch.zeros(shapes.get(name, batch_size), dtype=kinds.get(name, torch.float32), device=device)
            for name in self.input_names
        }

    def picture(self, model: LDAEForPreTraining, pixels: torch.Tensor):
        """What the model makes of a few images."""
        return denoising_picture(model, self.processor, pixels)

    def add_parts(self, folder: Path) -> None:
        """What belongs to a checkpoint beside its weights."""
        self.processor.save_pretrained(folder)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder / "tokenizer")

    def save_encoder(self, folder: Path, model: nn.Module, extras: Callable[[Path], None]) -> None:
        """The encoder as a model repository."""
        save_encoder(folder, model, extras)


def check_labels(num_classes: int | None, source: ImageSource) -> None:
    """Raises RunError if a model with class labels meets images without, or with another number of classes."""
    if num_classes is None:
        return
    if source.label_column is None:
        raise RunError(
            f"The recipe conditions on class labels, but {source.name} has none; name its label column, or train "
            "remove_class_labels."
        )
    if source.label_names is None and source.streaming:
        return  # nobody knows
    if source.num_classes != num_classes:
        raise RunError(
            f"The recipe has {num_classes} classes, {source.name} has {source.num_classes}; "
            f"give --set model.num_classes={source.num_classes}."
        )
