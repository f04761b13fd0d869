"""`ldae replay`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import NumWorkers


def replay(
    folder: Annotated[Path, typer.Argument(help="A folder in a run's failures/.")],
    dataset: Annotated[
        str | None, typer.Option(help="The run's images, where the name that it noted no longer leads to them.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Images at a time.")] = 16,
    num_workers: NumWorkers = 0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default a GPU if there is one.")] = None,
):
    """Repeat a training step whose loss or gradient was not finite, image by image.

    Says which images it was, at which timestep, and in which module the first NaN or infinity appeared.

    \b
    ldae replay runs/mine/failures/step-00001234
    """
    options = dict(locals())  # each option is the argument of the same name
    from ldae_hf.training.replay import replay, replay_text

    typer.echo(replay_text(replay(**options)))
