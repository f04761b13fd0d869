"""The checkpoints of a run: what they hold, and how they are written behind the training's back.

Saving stops the training for as long as it takes to copy weights and optimizer to the host's memory; a thread then
writes the copy, in safetensors and JSON, as a folder that is whole or not there (see `manifest`). Older checkpoints go
when the new one is safe. A checkpoint is also a model repository, which `AutoModel` loads. What is saved is the whole
model, sharded or not: another number of processes goes on from it.
"""

import json
import re
import shutil
import textwrap
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from ..manifest import MANIFEST, DamagedError, check_folder, write_folder
from ..progress import quietly
from .optimization import ExponentialMovingAverage
from .sharding import copy_, shard_like, whole


WEIGHTS = "model.safetensors"
OPTIMIZER = "training/optimizer.safetensors"
EMA = "training/ema.safetensors"
RNG = "training/rng.safetensors"
STATE = "training/state.json"
_STEP = re.compile(r"step-(\d{8,})")

Tensors = dict[str, torch.Tensor]
WriteRest = Callable[[Path, dict[str, Tensors]], None]


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


# ---- which there are


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = {path: _STEP.fullmatch(path.name) for path in folder.glob("step-*") if (path / MANIFEST).is_file()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every bit is as it was written, and what is wrong with the newer ones, if any are.

    Raises:
        DamagedError: there are checkpoints, and all are damaged.
    """
    found, problems = checkpoints(folder), []
    for checkpoint in reversed(found):
        try:
            check_folder(checkpoint)
            return checkpoint, problems
        except DamagedError as error:
            problems.append(str(error))
    if problems:
        raise DamagedError(f"{' '.join(problems)} No checkpoint is intact; delete {folder} to begin anew.")
    return None, problems


def set_aside(folder: Path, newest: Path | None) -> None:
    """Renames the checkpoints behind `newest`, which are damaged, to `step-….damaged`."""
    for checkpoint in reversed(checkpoints(folder)):
        if checkpoint == newest:
            return
        target = checkpoint.with_name(f"{checkpoint.name}.damaged")
        shutil.rmtree(target, ignore_errors=True)
        checkpoint.rename(target)


def clear_leftovers(folder: Path) -> None:
    """Of a process that was killed while it wrote a checkpoint or removed one."""
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)


# ---- writing


class CheckpointWriter:
    """Writes checkpoints of one run, one after the other, in a thread.

    Args:
        folder: where they go, as `step-<step>`. keep: how many stay. writes: false in all but the main process.
        written: called in the thread when one is on the disk.
    """

    def __init__(self, folder: Path, keep: int, writes: bool, written: Callable[[], None] = lambda: None):
        self.folder, self.keep, self.writes, self.written = folder, keep, writes, written
        self._host: dict[str, Tensors] = {}  # written into again and again: fresh memory costs more than the copy
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(
        self, step: int, files: dict[str, Tensors], write_rest: Callable[[Path, dict[str, Tensors]], None]
    ) -> None:
        """Copies the tensors to the host and returns; the rest is done behind the caller's back.

        All processes call it, since a sharded tensor is put together by all.

        Args:
            files: tensors by name, by the file's path in the checkpoint.
            write_rest: given the new folder and the copies, writes what is not such a file.

        Raises:
            OSError: the checkpoint before this one could not be written. CheckpointError: it was not finite.
        """
        self.wait()
        for file, tensors in files.items():
            self._copy(tensors, self._host.setdefault(file, {}))
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if self.writes:
            self._thread = threading.Thread(target=self._write, args=(step, write_rest), name="checkpoint")
            self._thread.start()

    def wait(self) -> None:
        """Until the last checkpoint is on the disk, and the older ones are gone.

        Raises:
            OSError: it could not be written. CheckpointError: it was not finite.
        """
        self.join()
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def join(self) -> None:
        """Until the thread is done, however it went."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written; `wait` then raises."""
        return self._error is not None

    def _copy(self, tensors: Tensors, host: Tensors) -> None:
        for name, tensor in tensors.items():
            tensor = whole(tensor.detach())
            if not self.writes:
                continue
            if name not in host:
                host[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            host[name].copy_(tensor, non_blocking=True)

    def _write(self, step: int, write_rest: WriteRest) -> None:
        try:
            self._check_finite(step)
            write_checkpoint(self.folder, step, lambda path: self._write_files(path, write_rest), self.keep)
            self.written()
        except BaseException as error:
            self._error = error

    def _check_finite(self, step: int) -> None:
        """Before an older checkpoint has to go for one that nobody can use."""
        for file, tensors in self._host.items():
            for name, tensor in tensors.items():
                if tensor.is_floating_point() and not tensor.isfinite().all():
                    raise CheckpointError(f"{name} of {file} is not finite after step {step}, which is not saved")

    def _write_files(self, path: Path, write_rest: WriteRest) -> None:
        (path / STATE).parent.mkdir()
        write_rest(path, self._host)
        for file, tensors in self._host.items():
            if not (path / file).exists():  # the weights come with the model's configuration
                save_file(tensors, path / file)


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Makes `folder/step-<step>` by calling `write` and then removes all but the newest `keep`."""
    clear_leftovers(folder)
    target = folder / f"step-{step:08d}"
    write_folder(target, write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))  # first out of sight, in one move
    return target


# ---- a pre-training run


def save_checkpoint(
    writer: CheckpointWriter,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage | None,
    state: dict,
    extras: Callable[[Path], None],
) -> None:
    """Hands `step-<step>` to the writer.

    Args:
        model: the unwrapped `LDAEForPreTraining`. ema: None if the run has none.
        state: JSON-able facts, `step` among them. extras: called with the new folder, adds processor and recipe.
    """
    files = {WEIGHTS: model.state_dict(), OPTIMIZER: optimizer_tensors(model, optimizer), RNG: rng_tensors()}
    if ema is not None:
        files[EMA] = ema.average

    def write_rest(path: Path, copies: dict[str, Tensors]) -> None:
        with quietly():
            weights = dict(copies[WEIGHTS])  # under the model's own names: some classes have others for their files
            model.save_pretrained(path, state_dict=weights, is_main_process=True, save_original_format=False)
        extras(path)
        (path / STATE).write_text(json.dumps(state, indent=2))

    writer.save(step, files, write_rest)


def load_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage | None
) -> dict:
    """Puts a checked checkpoint's weights, optimizer, EMA and RNG in place; returns its state.

    Raises:
        DamagedError: a file is damaged. CheckpointError: it was made by another model.
    """
    check_folder(folder, (WEIGHTS, OPTIMIZER, RNG, STATE) + ((EMA,) if ema is not None else ()))
    with fitting(folder):
        load_weights(model, load_file(folder / WEIGHTS))
        load_optimizer(model, optimizer, load_file(folder / OPTIMIZER))
        if ema is not None:
            ema.load(load_file(folder / EMA))
        load_rng(load_file(folder / RNG))
        return json.loads((folder / STATE).read_text())


@contextmanager
def fitting(folder: Path) -> Iterator[None]:
    """Turns the errors of a checkpoint that does not fit into a CheckpointError."""
    try:
        yield
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {textwrap.shorten(str(error), 300)}") from error


# ---- several modules that are trained together, each with its optimizer


def save_parts(
    writer: CheckpointWriter,
    step: int,
    parts: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
    state: dict,
    extras: Callable[[Path], None],
) -> None:
    """As `save_checkpoint`, for several modules by name."""
    files = {RNG: rng_tensors()}
    for name, (module, optimizer) in parts.items():
        weights, moments = part_files(name)
        files |= {weights: module.state_dict(), moments: optimizer_tensors(module, optimizer)}

    def write_rest(path: Path, copies: dict[str, Tensors]) -> None:
        extras(path)
        (path / STATE).write_text(json.dumps(state, indent=2))

    writer.save(step, files, write_rest)


def load_parts(folder: Path, parts: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> dict:
    """The inverse of `save_parts`; returns the state.

    Raises:
        DamagedError: a file is damaged. CheckpointError: it was made by other modules.
    """
    check_folder(folder, (RNG, STATE, *(file for name in parts for file in part_files(name))))
    with fitting(folder):
        for name, (module, optimizer) in parts.items():
            weights, moments = part_files(name)
            load_weights(module, load_file(folder / weights))
            if tensors := load_file(folder / moments):  # none before its first step
                load_optimizer(module, optimizer, tensors)
        load_rng(load_file(folder / RNG))
        return json.loads((folder / STATE).read_text())


def part_files(name: str) -> tuple[str, str]:
    """Where a part's weights and the state of its optimizer are."""
    return f"{name}.safetensors", f"training/{name}_optimizer.safetensors"


# ---- states as tensors by name


def load_weights(module: nn.Module, tensors: Tensors) -> None:
    """Puts parameters and buffers in place.

    Raises:
        KeyError, RuntimeError: one is missing, unknown, or has another shape.
    """
    own = module.state_dict()
    if own.keys() != tensors.keys():
        raise KeyError(f"other tensors: {', '.join(sorted(own.keys() ^ tensors.keys()))}")
    for name, value in own.items():
        copy_(value, tensors[name])


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> Tensors:
    """An optimizer's state as `<parameter name>.<key>`; the keys of AdamW are step, exp_avg and exp_avg_sq."""
    slots = {name: optimizer.state[p] for name, p in model.named_parameters() if p in optimizer.state}
    return {f"{name}.{key}": value for name, slot in slots.items() for key, value in slot.items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: Tensors) -> None:
    """The inverse of `optimizer_tensors`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.state_dict()["param_groups"]  # the same parameters as numbers
    keys = {name.rpartition(".")[2] for name in tensors}
    state = {
        number: {
            key: value if key == "step" else shard_like(value, parameter)
            for key, value in ((key, tensors[f"{names[parameter]}.{key}"]) for key in keys)
        }
        for group, numbered in zip(optimizer.param_groups, groups, strict=True)
        for parameter, number in zip(group["params"], numbered["params"], strict=True)
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_tensors() -> Tensors:
    """The states of torch's generators, from which nothing of ours draws while it trains."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"torch": torch.get_rng_state()} | cuda


def load_rng(tensors: Tensors) -> None:
    """The inverse of `rng_tensors`, for the generators that there are."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])
