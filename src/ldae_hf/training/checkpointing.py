"""Checkpoints that are whole or not there.

A checkpoint is written aside, the sha256 of every file noted in `manifest.json`, all of it flushed to the disk, and
then renamed into place: a process killed at any moment leaves the earlier checkpoint as it was. Safetensors and JSON
only. The folder is also a model repository, which `LDAEForPreTraining.from_pretrained` and `AutoModel` load.
"""

import hashlib
import json
import os
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePath

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging

from .optimization import ExponentialMovingAverage


MANIFEST = "manifest.json"
WEIGHTS = "model.safetensors"
OPTIMIZER = "training/optimizer.safetensors"
EMA = "training/ema.safetensors"
RNG = "training/rng.safetensors"
STATE = "training/state.json"
_STEP = re.compile(r"step-(\d{8,})")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file."""


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """To the disk: the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Writes a file that is never seen half-written."""
    aside = file.with_name(f".{file.name}.writing")
    aside.write_text(text)
    _flush(aside)
    aside.replace(file)


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Makes `folder` by calling `write(path)` on a fresh folder beside it, then hashing and renaming that.

    An existing `folder` is replaced only when the new one is complete.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    files = sorted(path for path in aside.rglob("*") if path.is_file())
    write_text(aside / MANIFEST, json.dumps({str(file.relative_to(aside)): sha256(file) for file in files}, indent=2))
    for path in (*aside.rglob("*"), aside):
        _flush(path)
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def check_folder(folder: Path, needed: tuple[str, ...] = ()) -> None:
    """Compares every file that the manifest lists with its sha256.

    Args:
        needed: files that the manifest must list.

    Raises:
        CheckpointError: no manifest, or a file is missing, changed or outside the folder.
    """
    try:
        digests = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError):
        digests = None
    if not isinstance(digests, dict):
        raise CheckpointError(f"{folder} has no readable {MANIFEST}; it is not a complete checkpoint.")
    for name in dict.fromkeys((*needed, *digests)):
        if name not in digests or not _is_intact(folder, name, digests[name]):
            raise CheckpointError(
                f"{folder / name} is missing or damaged (its sha256 is not the one in {MANIFEST}); "
                f"delete {folder} to go on from what was saved before it."
            )


def _is_intact(folder: Path, name: str, digest: str) -> bool:
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    try:
        return sha256(folder / path) == digest
    except (OSError, ValueError):  # not there, not readable, or a name that no file can have
        return False


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = {path: _STEP.fullmatch(path.name) for path in folder.glob("step-*") if (path / MANIFEST).is_file()}
    return sorted((path for path, match in found.items() if match), key=lambda path: int(found[path][1]))


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


def write_checkpoint(folder: Path, step: int, write: Callable[[Path], None], keep: int) -> Path:
    """Makes `folder/step-<step>` by calling `write` and then removes all but the newest `keep`."""
    for leftover in folder.glob(".step-*"):  # of a process that was killed while it wrote or removed
        shutil.rmtree(leftover)
    target = folder / f"step-{step:08d}"
    write_folder(target, write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")))  # first out of sight, in one move
    return target


def save_checkpoint(
    folder: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    ema: ExponentialMovingAverage | None,
    state: dict,
    extras: Callable[[Path], None],
    keep: int,
) -> Path:
    """Writes `folder/step-<step>` and then removes all but the newest `keep`.

    Args:
        model: the unwrapped `LDAEForPreTraining`. ema: None if the run has none.
        state: JSON-able facts, `step` among them. extras: called with the new folder, adds processor and recipe.
    """

    def write(path: Path) -> None:
        with quietly():
            model.save_pretrained(path)
        extras(path)
        (path / STATE).parent.mkdir()
        save_file(optimizer_tensors(model, optimizer), path / OPTIMIZER)
        save_file(rng_tensors(), path / RNG)
        if ema is not None:
            save_file(ema.average, path / EMA)
        (path / STATE).write_text(json.dumps(state, indent=2))

    return write_checkpoint(folder, step, write, keep)


def load_checkpoint(
    folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer, ema: ExponentialMovingAverage | None
) -> dict:
    """Puts a checked checkpoint's weights, optimizer, EMA and RNG in place; returns its state.

    Raises:
        CheckpointError: damaged, or made by another model.
    """
    check_folder(folder, (WEIGHTS, OPTIMIZER, RNG, STATE) + ((EMA,) if ema is not None else ()))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
        load_optimizer(model, optimizer, load_file(folder / OPTIMIZER))
        if ema is not None:
            ema.load(load_file(folder / EMA))
        load_rng(load_file(folder / RNG))
        return json.loads((folder / STATE).read_text())
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {textwrap.shorten(str(error), 300)}") from error


def save_parts(
    folder: Path,
    step: int,
    parts: dict[str, tuple[nn.Module, torch.optim.Optimizer]],
    state: dict,
    extras: Callable[[Path], None],
    keep: int,
) -> Path:
    """As `save_checkpoint`, for several modules that are trained together, each with its optimizer, by name."""

    def write(path: Path) -> None:
        extras(path)
        (path / STATE).parent.mkdir()
        for name, (module, optimizer) in parts.items():
            weights = {key: value.contiguous() for key, value in module.state_dict().items()}
            save_file(weights, path / f"{name}.safetensors")
            save_file(optimizer_tensors(module, optimizer), path / f"training/{name}_optimizer.safetensors")
        save_file(rng_tensors(), path / RNG)
        (path / STATE).write_text(json.dumps(state, indent=2))

    return write_checkpoint(folder, step, write, keep)


def load_parts(folder: Path, parts: dict[str, tuple[nn.Module, torch.optim.Optimizer]]) -> dict:
    """The inverse of `save_parts`; returns the state.

    Raises:
        CheckpointError: damaged, or made by other modules.
    """
    files = [(f"{name}.safetensors", f"training/{name}_optimizer.safetensors") for name in parts]
    check_folder(folder, (RNG, STATE, *(file for pair in files for file in pair)))
    try:
        for (weights, moments), (module, optimizer) in zip(files, parts.values(), strict=True):
            module.load_state_dict(load_file(folder / weights))
            if moments := load_file(folder / moments):  # none before its first step
                load_optimizer(module, optimizer, moments)
        load_rng(load_file(folder / RNG))
        return json.loads((folder / STATE).read_text())
    except (RuntimeError, KeyError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {textwrap.shorten(str(error), 300)}") from error


def optimizer_tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as `<parameter name>.<step | exp_avg | exp_avg_sq>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = optimizer.state
    return {f"{names[p]}.{key}": value.contiguous() for p, slot in state.items() for key, value in slot.items()}


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = optimizer.state_dict()["param_groups"]  # the same parameters as numbers
    state = {
        number: {key: tensors[f"{names[parameter]}.{key}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for group, numbered in zip(optimizer.param_groups, groups, strict=True)
        for parameter, number in zip(group["params"], numbered["params"], strict=True)
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def rng_tensors() -> dict[str, torch.Tensor]:
    """The states of torch's generators. The loop draws nothing from them, but an evaluation may."""
    cuda = {"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_initialized() else {}
    return {"torch": torch.get_rng_state()} | cuda


def load_rng(tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `rng_tensors`, for the generators that there are."""
    torch.set_rng_state(tensors["torch"])
    if "cuda" in tensors and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(tensors["cuda"])
