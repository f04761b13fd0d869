"""The progress bar of long work, which a log file does not get ten times a second, and no other bars beside it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm
from transformers.utils import logging


def bar_intervals() -> dict[str, float]:
    """tqdm's options for how often a bar writes: ten times a second on a terminal, else every 30 seconds."""
    return {"mininterval": 0.1} if sys.stderr.isatty() else {"mininterval": 30, "maxinterval": 30}


def progress_bar(*arguments, **options) -> tqdm:
    """[`tqdm`], which on anything but a terminal writes every 30 seconds."""
    return tqdm(*arguments, **(bar_intervals() | options))


@contextmanager
def quietly() -> Iterator[None]:
    """Without transformers' own progress bar, which for a single file would only break up that of the run."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
