"""Models that generate, out of whatever holds one: a run, a checkpoint, a pipeline's folder, the Hub."""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from ..image_processing_ldae import LDAEImageProcessor
from ..manifest import MANIFEST, check_folder
from ..patch_tokenizers import ConvolutionalTokenizer
from ..pipeline_ldae import LDAEPipeline
from ..recipes import Recipe
from ..training.checkpointing import WEIGHTS
from ..training.publishing import check_whole, load_published, newest_in_run
from .feature_maps import DTYPES, state_fingerprint


class Generator(NamedTuple):
    """`pipeline`, `facts` for a result, and the `folder` that it was loaded from (None for the Hub).

    The facts: `name`, `recipe`, `tier`, `overrides`, `training` (None where not known), `weights` ("ema", "raw", or
    None of a pipeline, which does not say), `dtype`, `model` and `encoder`: sha256 of the whole model, and of the
    encoder as linear probes name it.
    """

    pipeline: LDAEPipeline
    facts: dict
    folder: Path | None


def load_generator(
    source: str | Path | LDAEPipeline,
    *,
    weights: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
) -> Generator:
    """A pipeline with the newest weights that `source` has.

    Args:
        source: a run's folder, a checkpoint's, one that a pipeline was saved to, a name on the Hub, or a pipeline.
        weights: of a run or checkpoint, `"ema"` or `"raw"`; default the moving average if there is one.
        dtype: `"float32"` or `"bfloat16"`, of the model; its tables, its tokenizer and the latents stay float32.
        device: default the GPU, if there is one; a pipeline stays where it is.

    Raises:
        ValueError: an unknown option, weights that are not there, or a folder with nothing of the kind.
        DamagedError: no checkpoint is as it was written.
    """
    if weights not in (None, "ema", "raw") or dtype not in DTYPES:
        raise ValueError(f"weights={weights!r} must be ema or raw, and dtype={dtype!r} one of {', '.join(DTYPES)}.")
    if isinstance(source, LDAEPipeline) and weights is not None:
        raise ValueError("A pipeline has the weights that it was made with; leave weights out.")
    if isinstance(source, LDAEPipeline):
        pipeline, folder, weights = source, None, None
        dtype = str(pipeline.model.dtype).removeprefix("torch.")
    else:
        folder = Path(source)
        if (folder / "checkpoints").is_dir():
            folder = newest_in_run(folder / "checkpoints")
        if (folder / "config.json").is_file():
            pipeline, weights = _of_checkpoint(folder, weights)
        elif folder.is_dir() and not (folder / "model_index.json").is_file():
            raise ValueError(f"{folder} holds no run, no checkpoint and no pipeline; name a folder that does.")
        elif weights is not None:
            raise ValueError(f"{source} is a pipeline, with the weights that it was saved with; leave weights out.")
        else:
            if (folder / MANIFEST).is_file():
                check_folder(folder)
            pipeline = LDAEPipeline.from_pretrained(source)
        pipeline.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe, training = None, None
    if folder is not None and (folder / "recipe.json").is_file():
        recipe = Recipe.load(folder)
    if folder is not None and (folder / "training.json").is_file():
        training = json.loads((folder / "training.json").read_text())
    facts = {
        "name": str(source) if isinstance(source, str | Path) else "pipeline",
        "recipe": recipe and recipe.name,
        "tier": recipe and recipe.tier,
        "overrides": recipe and recipe.overrides,
        "training": training,
        "weights": weights,
        "dtype": dtype,
        "model": state_fingerprint(pipeline.model),
        "encoder": state_fingerprint(pipeline.model.ldae),
    }
    if not isinstance(source, LDAEPipeline):  # now, so that the names of the weights are those of training
        for parameter in pipeline.model.parameters():
            parameter.data = parameter.data.to(DTYPES[dtype])
    return Generator(pipeline, facts, folder if folder is not None and folder.is_dir() else None)


def _of_checkpoint(folder: Path, weights: str | None) -> tuple[LDAEPipeline, str]:
    if (folder / MANIFEST).is_file():
        check_folder(folder)
    if (folder / WEIGHTS).is_file():
        check_whole(folder)
    model, weights = load_published(folder, weights)
    tokenizer = model.ldae.tokenizer
    vae = tokenizer.autoencoder(model.device) if isinstance(tokenizer, ConvolutionalTokenizer) else None
    return LDAEPipeline(model, LDAEImageProcessor.from_pretrained(folder), vae=vae), weights
