"""Which library an encoder comes from."""

import json
from pathlib import Path

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from ...modeling_ldae import LDAEPreTrainedModel
from .base import NOISES, Encoder
from .ldae import LDAEEncoder, load_ldae
from .timm_vit import PREFIX, load_timm
from .transformers_vit import load_transformers


def open_encoder(
    source: str | Path | PreTrainedModel,
    *,
    processor=None,
    timestep: int | None = None,
    noise: str = "clean",
    seed: int = 0,
    dtype: str = "float32",
    image_size: int | None = None,
    device: str | torch.device | None = None,
) -> Encoder:
    """A frozen encoder, of whatever library.

    Args:
        source: a folder or a name on the Hub with an l-DAE, a Vision Transformer of transformers, or one in timm's
            format; `"timm:NAME"` or `"timm:NAME@FILE.safetensors"` (see [`load_timm`]); or a model, with `processor`.
        processor: where the image processor is, or the processor; by default where the encoder is. timm has none.
        timestep, noise, seed: of l-DAE's features, see [`LDAEEncoder`].
        dtype: `"float32"`, or `"bfloat16"` under autocast.
        image_size: of the crops; default the encoder's. Positions are interpolated where the model can.
        device: by default a model stays where it is, a loaded one goes to the GPU if there is one.

    Raises:
        ValueError: the encoder is none of these, its weights are not all there, or an option is not for it.
        OSError: there is no such folder or name.
    """
    if noise not in NOISES:
        raise ValueError(f"noise={noise!r} must be one of {', '.join(NOISES)}.")
    library = _library(source)
    common = dict(dtype=dtype, image_size=image_size)
    if library == "ldae_hf":
        model, processor = load_ldae(source, processor, device)
        name = "encoder" if isinstance(source, LDAEPreTrainedModel) else str(source)
        return LDAEEncoder(model, processor, name, timestep=timestep, noise=noise, seed=seed, **common)
    if timestep is not None or noise != "clean":
        raise ValueError(f"{_title(source)} is no l-DAE; only an l-DAE has a timestep and takes noise.")
    if library == "transformers":
        return load_transformers(source, processor, device=device, **common)
    if processor is not None:
        raise ValueError(f"{source} is a model of timm, which has no processor; leave it out.")
    return load_timm(source, device=device, **common)


def _library(source: str | Path | PreTrainedModel) -> str:
    """ "ldae_hf", "transformers" or "timm"."""
    if isinstance(source, PreTrainedModel):
        return "ldae_hf" if isinstance(source, LDAEPreTrainedModel) else "transformers"
    if not isinstance(source, str | Path):
        raise ValueError(f"An encoder is a folder, a name, or a model of transformers, not a {type(source).__name__}.")
    if str(source).startswith(PREFIX):
        return "timm"
    if not Path(source).is_dir() and (Path(source).is_absolute() or str(source).startswith((".", "~"))):
        raise ValueError(f"There is no folder {source}.")  # and it cannot be a name on the Hub
    file = cached_file(source, "config.json", _raise_exceptions_for_missing_entries=False)
    if file is None:
        raise ValueError(f"{source} has no config.json, which says what encoder it is.")
    try:
        config = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"config.json of {source} is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"config.json of {source} does not describe a model.")
    if "model_type" not in config and "architecture" in config:
        return "timm"
    return "ldae_hf" if config.get("model_type") == "ldae" else "transformers"


def _title(source) -> str:
    return str(source) if isinstance(source, str | Path) else type(source).__name__
