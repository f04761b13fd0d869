"""What the proofs share: tiny runs in forks of one warmed process, how they ended, and what has to be equal then."""

import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import conftest  # noqa: F401 - settings that must stand before a Hugging Face library is imported
import datasets
import psutil
import torch
from accelerate.state import AcceleratorState
from forked_runs import dataset_of, encoded, lines

from ldae_hf.manifest import read_manifest
from ldae_hf.training import checkpoints, pretrain


datasets.disable_progress_bars()  # between the lines of figures

PATIENCE = 300  # seconds; a run takes a few
IMAGES = 26  # three global batches of 8 an epoch, and two images that are left out
SMALL = {
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.latent_dim": 7,
    "data.crop": "random_resized",
    "data.flip": True,
    "train.epochs": 6,
    "train.warmup_epochs": 1,
    "train.global_batch_size": 8,
    "train.base_learning_rate": 0.05,
    "train.max_grad_norm": 1,
    "train.ema_half_life_epochs": 1,
}
MEASURED = {"time", "images_per_second", "data_wait", "tflops_per_second", "mfu"}  # of a line: never the same twice


def overrides(values: dict) -> list[str]:
    return [f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in values.items()]


def labelled_images(count: int = IMAGES, others: dict[int, bytes] | None = None) -> datasets.Dataset:
    """Smooth pictures of three classes; `others` are image files to take in place of some, by number."""
    contents = [(others or {}).get(number) or encoded(number) for number in range(count)]
    classes = datasets.ClassLabel(names=["0", "1", "2"])
    labels = [number % classes.num_classes for number in range(count)]
    return dataset_of(contents).remove_columns("label").add_column("label", labels, feature=classes)


def module(name: str):
    """A module of the training, to be changed in a fork; some have the name of a function of the package."""
    return sys.modules[f"ldae_hf.training.{name}"]


def before(module, name: str, act: Callable[[], None]) -> None:
    """Has `act` called before each call of a module's or class's function."""
    function = getattr(module, name)

    def called(*arguments, **options):
        act()
        return function(*arguments, **options)

    setattr(module, name, called)


# ---- a run in processes of its own


@dataclass
class Run:
    """A pre-training that is started again and again, with the same arguments.

    Args:
        folder: of the run; notes and output of its starts lie beside it.
        settings: arguments of `pretrain`. prepare: called in each process before it, at every start.
    """

    folder: Path
    settings: dict
    processes: int = 1
    prepare: Callable[[], None] = lambda: None
    recipe: str = "l_dae"
    starts: int = 0
    groups: list[tuple[int, float]] = field(default_factory=list)  # process group of each start, and when it ended

    def start(self, *prepare: Callable[[], None], **changes) -> "Start":
        """Starts it, with further preparations and other arguments this time."""
        self.starts += 1
        settings = dict(output_dir=self.folder, num_workers=0, mixed_precision="no", log_every=1) | self.settings

        def run() -> None:
            for step in (self.prepare, *prepare):
                step()
            pretrain(self.recipe, **settings | changes)

        return Start(self, run)

    def finish(self, *prepare: Callable[[], None], **changes) -> None:
        """Starts it and expects that it ends as it should."""
        self.start(*prepare, **changes).expect(0)

    @property
    def step(self) -> int:
        """Of the newest checkpoint, 0 if there is none."""
        found = checkpoints(self.folder / "checkpoints")
        return int(found[-1].name.removeprefix("step-")) if found else 0


class Start:
    """The processes of one start, a process group of their own. What they print is in `output`."""

    def __init__(self, run: Run, function: Callable[[], None]):
        self.run = run
        self.output = run.folder.with_name(f"{run.folder.name}.output-{run.starts}")
        self.notes = run.folder.with_name(f"{run.folder.name}.notes-{run.starts}")
        self.output.touch()
        self.notes.touch()
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            port = str(probe.getsockname()[1])
        common = {"ACCELERATE_USE_CPU": "true"}
        if run.processes > 1:
            common |= dict(WORLD_SIZE=str(run.processes), MASTER_ADDR="localhost", MASTER_PORT=port)
        self.processes, self.group = [], 0
        for rank in range(run.processes):
            own = common | (dict(RANK=str(rank), LOCAL_RANK=str(rank)) if run.processes > 1 else {})
            process = multiprocessing.get_context("fork").Process(target=self._begin, args=(function, own))
            process.start()
            self.group = self.group or process.pid
            os.setpgid(process.pid, self.group)
            self.processes.append(process)

    def _begin(self, function: Callable[[], None], environment: dict[str, str]) -> None:
        os.setpgid(0, self.group)
        os.environ |= environment
        stream = os.open(self.output, os.O_WRONLY | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(stream, descriptor)
        AcceleratorState._reset_state(True)  # what is left from the parent
        torch.set_num_threads(1)
        global _notes
        _notes = os.open(self.notes, os.O_WRONLY | os.O_APPEND)
        function()

    def signal(self, number: int, rank: int | None = 0) -> None:
        """To one process, or to all processes and their workers if `rank` is None, as a terminal's Ctrl-C."""
        if rank is None:
            os.killpg(self.group, number)
        else:
            os.kill(self.processes[rank].pid, number)

    def wait_for(self, note: str) -> bool:
        """Until a process has written the note; false if all have ended without."""
        began = time.monotonic()
        while note not in self.notes.read_text().splitlines():
            if not any(process.is_alive() for process in self.processes):
                return note in self.notes.read_text().splitlines()
            if time.monotonic() - began > PATIENCE:
                self.kill()
                raise TimeoutError(f"no {note!r} after {PATIENCE} seconds:\n{self.end_of_output()}")
            time.sleep(0.005)
        return True

    def join(self) -> list[int]:
        """Exit codes, by rank; minus the number of the signal that ended a process."""
        deadline = time.monotonic() + PATIENCE
        while any(process.is_alive() for process in self.processes):  # `Process.join` would wait for the workers too
            if time.monotonic() > deadline:
                self.kill()
                raise TimeoutError(f"a run has not ended after {PATIENCE} seconds:\n{self.end_of_output()}")
            time.sleep(0.005)
        self.run.groups.append((self.group, time.monotonic()))
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        for process in self.processes:
            process.kill()

    def expect(self, *codes: int) -> int:
        """The exit code of all processes, which has to be one of these.

        Raises:
            AssertionError: with the end of the output.
        """
        found = self.join()
        if len(set(found)) != 1 or found[0] not in codes:
            raise AssertionError(f"{self.run.folder.name}: exit codes {found}, not {codes}:\n{self.end_of_output()}")
        return found[0]

    def end_of_output(self) -> str:
        return self.output.read_text(errors="replace")[-3000:]


_notes = 2  # where a start's processes write what they do


def note(text: str) -> None:
    """From within a process of a start, also from one that is about to die."""
    os.write(_notes, f"{text}\n".encode())


def members(group: int) -> list[int]:
    """Processes of a group that live."""
    found = []
    for process in psutil.process_iter(["status"]):
        try:
            if process.info["status"] != psutil.STATUS_ZOMBIE and os.getpgid(process.pid) == group:
                found.append(process.pid)
        except ProcessLookupError:
            pass
    return found


def orphans(runs: list[Run], seconds: float = 10) -> int:
    """Processes that are left of starts that ended so long ago; they are ended."""
    left = 0
    for group, ended in (start for run in runs for start in run.groups):
        time.sleep(max(0, ended + seconds - time.monotonic()))
        for process in members(group):
            left += 1
            os.kill(process, signal.SIGKILL)
    return left


# ---- what must be equal


def digests(folder: Path) -> dict[str, str]:
    """sha256 of every file of a finished run that holds a result: the last checkpoint (weights, optimizer, EMA, RNG,
    state), encoder with golden features, processor and tokenizer."""
    holders = {"last checkpoint": checkpoints(folder / "checkpoints")[-1]}
    holders |= {name: folder / name for name in ("encoder", "processor", "tokenizer") if (folder / name).is_dir()}
    return {f"{name}/{file}": value for name, path in holders.items() for file, value in read_manifest(path).items()}


def log_of(folder: Path) -> list[dict]:
    """The lines of a log, without what was measured of time."""
    return [{key: value for key, value in line.items() if key not in MEASURED} for line in lines(folder)]


def differences(one: Path, other: Path) -> list[str]:
    """In what two finished runs differ, bit for bit; empty if in nothing."""
    first, second = digests(one), digests(other)
    found = [name for name in sorted(first.keys() | second.keys()) if first.get(name) != second.get(name)]
    if log_of(one) != log_of(other):
        pairs = zip(log_of(one), log_of(other), strict=False)
        unequal = next((pair for pair in pairs if pair[0] != pair[1]), "their lengths")
        found.append(f"metrics.jsonl ({unequal})")
    return found


def leftovers(folder: Path) -> list[str]:
    """What half-done work has left in a run's folder."""
    found = (path for path in folder.rglob("*") if path.name.startswith(".") or path.name.endswith(".partial"))
    return sorted(str(path.relative_to(folder)) for path in found)


def report(line: str, figures: dict, began: float) -> int:
    """Prints a proof's figures on a line and what failed below; returns the exit code."""
    print(f"{line.format(**figures)} ({time.monotonic() - began:.0f} s)", flush=True)
    for sentence in figures["failed"]:
        print(f"FAILED: {sentence}", flush=True)
    return int(bool(figures["failed"]))
