"""The model as it is evaluated and published: whole, in eval mode, with the EMA's weights."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import AutoModelForPreTraining

from ..golden import write_golden_features
from ..manifest import write_folder
from ..modeling_ldae import LDAEForPreTraining
from .checkpointing import load_weights, quietly
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
