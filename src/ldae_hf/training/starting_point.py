"""Another training's model as the beginning of a run: a run's, a checkpoint's, a published one's."""

from pathlib import Path

import torch
from safetensors.torch import load_file

from ..configuration_ldae import LDAEConfig
from ..hub import fetch
from ..manifest import MANIFEST, check_folder, sha256
from ..modeling_ldae import LDAEForPreTraining
from ..progress import quietly
from .checkpointing import EMA, WEIGHTS
from .optimization import ExponentialMovingAverage
from .publishing import check_whole, newest_in_run
from .session import RunError, Session


PRETRAINING = "pretraining"  # of a published repository


def check_start(start_from: str | Path | None, processor: str | Path | None, tokenizer: str | Path | None) -> None:
    """Raises RunError for what contradicts a start from another training's model."""
    given = "processor" if processor is not None else "tokenizer" if tokenizer is not None else None
    if start_from is not None and given is not None:
        raise RunError(f"The {given} comes with start_from={str(start_from)!r}; leave {given} out.")


class StartingPoint:
    """A whole model in a local folder.

    Args:
        source: a run's folder (its newest checkpoint), a checkpoint's, a repository's, or its name on the Hub.
        session: of the run; the main process downloads, the others find it in the cache.

    Raises:
        RunError: there is no model. ValueError: it is an encoder alone, or from the Hub. DamagedError: it is not as it
            was written.
    """

    def __init__(self, source: str | Path, session: Session):
        self.source = source
        folder = Path(source)
        if not folder.is_dir():
            session.on_main(lambda: self.download(str(source)))
            folder = self.download(str(source))
        if (folder / "checkpoints").is_dir():
            folder = newest_in_run(folder / "checkpoints")
        elif (folder / PRETRAINING).is_dir():
            folder = folder / PRETRAINING
        if not (folder / WEIGHTS).is_file():
            raise RunError(f"{source} holds no run, no checkpoint and no {PRETRAINING}/, from which a run could start.")
        if (folder / MANIFEST).is_file():
            check_folder(folder)
        check_whole(folder)
        self.folder = folder
        self.fingerprint = sha256(folder / WEIGHTS)
        self.tokenizer = folder if (folder / "tokenizer").is_dir() else None

    @staticmethod
    def download(name: str) -> Path:
        return fetch(name, allow_patterns=[f"{PRETRAINING}/**"])

    def load_into(self, model: LDAEForPreTraining) -> None:
        """Copies the weights, raw ones, into a new model, whose basis and tables stay its own.

        Raises:
            RunError: a weight is missing, unknown, or has another shape.
        """
        with quietly():
            saved = LDAEForPreTraining.from_pretrained(self.folder, config=LDAEConfig.from_pretrained(self.folder))
        theirs, ours = dict(saved.named_parameters()), dict(model.named_parameters())
        for name in sorted(theirs.keys() | ours.keys()):
            shapes = [tuple(weights[name].shape) if name in weights else "none" for weights in (theirs, ours)]
            if shapes[0] != shapes[1]:
                raise RunError(
                    f"A run cannot start from {self.source}: {name} has the shape {shapes[0]} there, {shapes[1]} in "
                    "the recipe's model; take the recipe that it was trained with."
                )
        with torch.no_grad():
            for name, value in ours.items():
                value.copy_(theirs[name])

    def load_average(self, ema: ExponentialMovingAverage | None) -> None:
        """Lets the moving average go on from the saved one, if there are both."""
        if ema is not None and (self.folder / EMA).is_file():
            ema.load(load_file(self.folder / EMA))
