"""l-DAE's own encoder: its processor, its learned tokenizer, its timestep and noise."""

from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from ...configuration_ldae import CONVOLUTIONAL_TOKENIZERS
from ...image_processing_ldae import LDAEImageProcessor
from ...latent_tokenizers import LearnedTokenizer
from ...modeling_ldae import LDAEModel, LDAEPreTrainedModel
from ...progress import quietly
from ...training.sampling import random_generator
from ..feature_maps import state_fingerprint
from .base import NOISES, Encoder


def load_ldae(
    encoder: str | Path | LDAEPreTrainedModel,
    processor: str | Path | LDAEImageProcessor | None = None,
    device: str | torch.device | None = None,
) -> tuple[LDAEModel, LDAEImageProcessor]:
    """An encoder and its processor, whose PCA basis is compared with the encoder's; with it a convolutional tokenizer.

    Args:
        encoder: a folder, a name on the Hub, or a model; of a head the encoder is taken.
        processor: the same for the processor; by default it is loaded from where the encoder is.
        device: where to put the encoder; by default a model stays where it is, a loaded one goes to the GPU if there
            is one.

    Raises:
        ValueError: the fingerprints differ, a model comes without a processor, or a folder without its tokenizer.
    """
    if isinstance(encoder, LDAEPreTrainedModel):
        if processor is None:
            raise ValueError("A loaded model needs its processor too; load both from the same folder and give both.")
        model = encoder.base_model
    else:
        processor = encoder if processor is None else processor
        with quietly():
            model = LDAEModel.from_pretrained(encoder)
        if model.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
            model.set_tokenizer(LearnedTokenizer.from_pretrained(encoder, subfolder="tokenizer"))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(processor, LDAEImageProcessor):
        processor = LDAEImageProcessor.from_pretrained(processor)
    model.check_processor(processor)
    return (model if device is None else model.to(device)), processor


class LDAEEncoder(Encoder):
    """The l-DAE encoder; its final norm is a LayerNorm without affine, as the decoder's first block sees its tokens.

    Args:
        model, processor: as [`load_ldae`] gives them.
        timestep: the condition, and with noise its level; default `config.feature_timestep`.
        noise: `"clean"`, or `"frozen"`: each image always with the same noise, drawn from seed and sample id.
        seed: of the frozen noise.
        image_size: of the crops; default the processor's.

    Raises:
        ValueError: an unknown noise protocol or dtype, or a timestep outside the schedule.
    """

    def __init__(
        self,
        model: LDAEModel,
        processor: LDAEImageProcessor,
        name: str = "encoder",
        *,
        timestep: int | None = None,
        noise: str = "clean",
        seed: int = 0,
        dtype: str = "float32",
        image_size: int | None = None,
    ):
        if noise not in NOISES:
            raise ValueError(f"noise={noise!r} must be one of {', '.join(NOISES)}.")
        model.check_processor(processor)
        self.processor, self.noise, self.seed = processor, noise, seed
        self.timestep = model.config.feature_timestep if timestep is None else timestep
        model.schedule.as_timesteps(self.timestep, "cpu")  # raises
        super().__init__(
            name,
            model,
            model.layers,
            lambda tokens: F.layer_norm(tokens, tokens.shape[-1:], eps=model.config.layer_norm_eps),
            image_size=image_size or processor.image_size,
            patch_size=model.config.patch_size,
            dim=model.config.hidden_size,
            num_prefix_tokens=model.config.num_global_tokens,
            mean=processor.image_mean,
            std=processor.image_std,
            dtype=dtype,
            facts={
                "encoder": state_fingerprint(model),
                "library": "ldae_hf",
                "processor": processor.fingerprint,
                "timestep": self.timestep,
                "noise": noise if noise == "clean" else f"frozen by sample id, seed {seed}",
                "norm": "LayerNorm without affine",
            },
        )

    def forward(self, pixel_values: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        noise = self._frozen_noise(pixel_values, sample_ids) if self.noise == "frozen" else None
        return self.model(pixel_values, timesteps=self.timestep, noise=noise).last_hidden_state

    def _frozen_noise(self, pixel_values: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        rows, columns = self.model.grid_of(pixel_values)
        shape = (rows * columns, self.model.config.latent_dim)
        generators = (random_generator(self.seed, "noise", sample_id=sample_id) for sample_id in sample_ids.tolist())
        noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        return torch.from_numpy(noise).to(pixel_values.device)

    def untrained(self, seed: int) -> "LDAEEncoder":
        """The encoder as pre-training begins it: same configuration and tokenizer, new weights.

        Its blocks are the identity (adaLN-Zero): it is a random linear map of each patch, with positions, normalised.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = LDAEModel(deepcopy(self.model.config))
        model.tokenizer = self.model.tokenizer
        condition = dict(timestep=self.timestep, noise=self.noise, seed=self.seed, dtype=self.dtype)
        model = model.to(self.device).eval()
        return LDAEEncoder(model, self.processor, "untrained encoder", **condition, image_size=self.image_size)
