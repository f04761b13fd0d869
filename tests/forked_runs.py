"""Runs in forks of the test process, and the images that they train on.

accelerate keeps one state per process, a fork can be killed, and unlike a fresh process it need not import anything.
"""

import io
import json
import multiprocessing
import os
import socket
import traceback
from pathlib import Path

import datasets
import numpy as np
import torch
from accelerate.state import AcceleratorState
from PIL import Image


TIMEOUT = 240  # seconds; a run takes two


class Child:
    """A function that runs in a fork; `join` returns what it returned, or raises what it raised."""

    def __init__(self, function, environment: dict[str, str] | None = None):
        self.pipe, theirs = multiprocessing.Pipe()

        def run():
            os.environ |= {"ACCELERATE_USE_CPU": "true"} | (environment or {})
            AcceleratorState._reset_state(True)  # what another test may have left behind in the parent
            torch.set_num_threads(1)
            try:
                theirs.send((function(), None))
            except BaseException as error:
                traceback.print_exc()
                theirs.send((None, error))

        self.process = multiprocessing.get_context("fork").Process(target=run)
        self.process.start()
        theirs.close()

    def join(self):
        if not self.pipe.poll(TIMEOUT):
            self.process.kill()
            raise TimeoutError(f"a run has not ended after {TIMEOUT} seconds")
        try:
            result, error = self.pipe.recv()
        except EOFError:
            self.process.join()
            raise ChildProcessError(f"ended by signal {-self.process.exitcode}") from None
        self.process.join()
        if error is not None:
            raise error
        return result


def in_processes(run, processes: int = 1):
    """What `run` returns in the main one of so many processes that know of each other."""
    if processes == 1:
        return Child(run).join()
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = str(probe.getsockname()[1])
    common = dict(WORLD_SIZE=str(processes), MASTER_ADDR="localhost", MASTER_PORT=port)
    ranks = [Child(run, common | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(processes)]
    try:
        return [rank.join() for rank in ranks][0]
    finally:
        for rank in ranks:  # one that waits for another that failed
            rank.process.kill()


def encoded(number: int) -> bytes:
    """A smooth picture of its own, as a PNG."""
    rng = np.random.default_rng(number)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
    stream = io.BytesIO()
    small.resize((24, 20), Image.Resampling.BICUBIC).save(stream, "PNG")
    return stream.getvalue()


def dataset_of(contents: list[bytes]) -> datasets.Dataset:
    rows = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0] * len(contents)}
    return datasets.Dataset.from_dict(
        rows, datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})
    )


def lines(folder: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]
