"""What features are: a feature map is a callable, uint8 crops (B,C,H,W) and sample ids (B,) -> (B,D), with a `name` for
tables and a `fingerprint` of all that its values depend on. An encoder is one (here), and so is each floor (floors.py).
"""

import json
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS, LDAEConfig
from ..image_processing_ldae import LDAEImageProcessor
from ..latent_tokenizers import LearnedTokenizer
from ..modeling_ldae import LDAEModel, LDAEPreTrainedModel
from ..training.sampling import random_generator


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NOISES = ("clean", "frozen")


class FeatureMap(Protocol):
    name: str
    fingerprint: str

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor: ...


def load_encoder(
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
        model = LDAEModel.from_pretrained(encoder)
        if model.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
            model.set_tokenizer(LearnedTokenizer.from_pretrained(encoder, subfolder="tokenizer"))
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if not isinstance(processor, LDAEImageProcessor):
        processor = LDAEImageProcessor.from_pretrained(processor)
    model.check_processor(processor)
    return (model if device is None else model.to(device)), processor


class EncoderFeatures:
    """The mean over tokens of an encoder's output, (B,D).

    Args:
        model, processor: as [`load_encoder`] gives them.
        name: in tables.
        timestep: the condition, and with noise its level; default `config.feature_timestep`.
        noise: `"clean"`, or `"frozen"`: each image always with the same noise, drawn from seed and sample id.
        seed: of the frozen noise.
        dtype: `"float32"`, or `"bfloat16"` under autocast.

    Raises:
        ValueError: an unknown noise protocol or dtype, or a timestep outside the schedule.
    """

    def __init__(
        self,
        model: LDAEModel,
        processor: LDAEImageProcessor,
        name: str = "encoder",
        timestep: int | None = None,
        noise: str = "clean",
        seed: int = 0,
        dtype: str = "float32",
    ):
        if noise not in NOISES or dtype not in DTYPES:
            raise ValueError(
                f"noise={noise!r} must be one of {', '.join(NOISES)} and dtype={dtype!r} one of {', '.join(DTYPES)}."
            )
        model.check_processor(processor)
        self.model, self.processor, self.name, self.seed = model, processor, name, seed
        self.timestep = model.config.feature_timestep if timestep is None else timestep
        model.schedule.as_timesteps(self.timestep, "cpu")  # raises
        self.noise, self.dtype = noise, dtype
        self.protocol = {
            "encoder": state_fingerprint(model),
            "processor": processor.fingerprint,
            "layer": "last",
            "pool": "mean over tokens, after LayerNorm without affine",
            "timestep": self.timestep,
            "noise": noise if noise == "clean" else f"frozen by sample id, seed {seed}",
            "dtype": dtype,
        }
        self.fingerprint = json.dumps(self.protocol, sort_keys=True)

    def __call__(self, pixels: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        pixel_values = self.processor.normalize_pixels(pixels)
        noise = self._frozen_noise(pixel_values, sample_ids) if self.noise == "frozen" else None
        with torch.autocast(pixels.device.type, DTYPES[self.dtype], enabled=self.dtype != "float32"):
            return self.model(pixel_values, timesteps=self.timestep, noise=noise).pooler_output

    def _frozen_noise(self, pixel_values: torch.Tensor, sample_ids: torch.Tensor) -> torch.Tensor:
        rows, columns = self.model.grid_of(pixel_values)
        shape = (rows * columns, self.model.config.latent_dim)
        generators = (random_generator(self.seed, "noise", sample_id=sample_id) for sample_id in sample_ids.tolist())
        noise = np.stack([generator.standard_normal(shape, dtype=np.float32) for generator in generators])
        return torch.from_numpy(noise).to(pixel_values.device)


def state_fingerprint(model: LDAEModel) -> str:
    """sha256 (hex) of an encoder's architecture and of its parameters and buffers."""
    architecture = {key: getattr(model.config, key) for key in sorted(LDAEConfig.__annotations__)}
    digest = sha256(json.dumps(architecture).encode())
    for name, tensor in sorted(model.state_dict().items()):
        tensor = tensor.cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
