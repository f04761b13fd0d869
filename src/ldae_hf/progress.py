"""The progress bar of long work, which a log file does not get ten times a second."""

import sys

from tqdm import tqdm


def progress_bar(*arguments, **options) -> tqdm:
    """[`tqdm`], which on anything but a terminal writes every 30 seconds."""
    return tqdm(*arguments, **({"mininterval": 0.1 if sys.stderr.isatty() else 30} | options))
