"""The model as it is evaluated and published: whole, in eval mode, with the EMA's weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import AutoModelForPreTraining

from ..configuration_ldae import CONVOLUTIONAL_TOKENIZERS
from ..golden import write_golden_features
from ..latent_tokenizers import LearnedTokenizer
from ..manifest import write_folder
from ..modeling_ldae import LDAEForPreTraining
from ..progress import quietly
from .checkpointing import EMA, WEIGHTS, load_weights, newest_intact
from .optimization import ExponentialMovingAverage
from .session import Session
from .sharding import whole


@contextmanager
def published(
    model: LDAEForPreTraining, ema: ExponentialMovingAverage | None, session: Session
) -> Iterator[LDAEForPreTraining | None]:
    """Within it the main process has the model to look at; all processes enter it.

    Of a sharded model that is a copy, and the other processes have None.
    """
    if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        yield whole_copy(model, ema, session)
        return
    model.eval()
    try:
        with ema.in_place_of_parameters(model) if ema is not None else nullcontext():
            yield model
    finally:
        model.train()


def whole_copy(
    model: LDAEForPreTraining, ema: ExponentialMovingAverage | None, session: Session
) -> LDAEForPreTraining | None:
    """A model with the parts of all processes, in the main one."""
    tensors = model.state_dict() | ({} if ema is None else ema.average)
    tensors = {name: whole(value.detach()) for name, value in tensors.items()}
    if not session.accelerator.is_main_process:
        return None
    with torch.random.fork_rng():  # no trace of its initialisation
        copy = AutoModelForPreTraining.from_config(model.config, attn_implementation=model.config._attn_implementation)
    if isinstance(copy, LDAEForPreTraining):
        copy.ldae.tokenizer = model.ldae.tokenizer  # has no parameters to shard, and may hold an autoencoder
    copy.to(session.accelerator.device, torch.get_default_dtype())
    load_weights(copy, tensors)
    return copy.eval()


def save_encoder(folder: Path, model: LDAEForPreTraining, extras: Callable[[Path], None]) -> None:
    """The encoder as a model repository, with features by which `ldae verify` knows it again.

    Args:
        model: as `published` has it. extras: called with the new folder, adds processor and recipe.
    """

    def write(path: Path) -> None:
        with quietly():
            model.ldae.save_pretrained(path)
        write_golden_features(path, model.ldae)
        extras(path)

    write_folder(folder, write)


def newest_in_run(checkpoints: Path) -> Path:
    """The newest intact checkpoint of a run; of damaged ones behind it a warning is printed.

    Raises:
        ValueError: there is none yet. DamagedError: all are damaged.
    """
    folder, problems = newest_intact(checkpoints)
    for problem in problems:
        print(f"warning: {problem}")
    if folder is None:
        raise ValueError(f"{checkpoints} holds no checkpoint yet; the model is in there once the first is written.")
    return folder


def check_whole(folder: Path) -> None:
    """Raises ValueError if a model's folder has no decoder, or its weights are damaged."""
    try:
        with safe_open(folder / WEIGHTS, "pt") as tensors:
            names = list(tensors.keys())
    except SafetensorError as error:
        raise ValueError(f"The weights in {folder} are damaged ({error}); copy or download them again.") from error
    if not any(name.startswith("decoder.") for name in names):
        raise ValueError(
            f"{folder} holds an encoder alone; name the run's folder, whose checkpoints hold the decoder too, or a "
            "published repository with its pretraining/."
        )


def load_published(checkpoint: Path, weights: str | None = None) -> tuple[LDAEForPreTraining, str]:
    """A checkpoint's model in eval mode, with its convolutional tokenizer, and which weights it has.

    Args:
        weights: `"ema"` or `"raw"`; default the moving average, if there is one.

    Raises:
        ValueError: the moving average is asked for, and there is none, or the folder is no checkpoint.
    """
    average = checkpoint / EMA
    weights = weights or ("ema" if average.is_file() else "raw")
    with quietly():
        model = LDAEForPreTraining.from_pretrained(checkpoint)
    if weights == "ema":
        if not average.is_file():
            raise ValueError(f"{checkpoint} has no moving average of its weights; take weights=raw.")
        with torch.no_grad():
            for name, value in load_file(average).items():
                model.get_parameter(name).copy_(value)
    if model.config.tokenizer in CONVOLUTIONAL_TOKENIZERS:
        model.set_tokenizer(LearnedTokenizer.from_pretrained(checkpoint, subfolder="tokenizer"))
    return model, weights
