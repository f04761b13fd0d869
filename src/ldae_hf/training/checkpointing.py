"""Checkpoints that are whole or not there.

A checkpoint is written aside, every file flushed, its sha256 noted in `manifest.json`, and then renamed into place: a
process killed at any moment leaves the earlier checkpoint as it was. Safetensors and JSON only. The folder is also a
model repository: `LDAEForPreTraining.from_pretrained` and `AutoModel.from_pretrained` load it.
"""

import hashlib
import json
import os
import re
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


MANIFEST = "manifest.json"
_STEP = re.compile(r"step-(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be used; the message names the file."""


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_folder(folder: Path, write) -> None:
    """Makes `folder` by calling `write(path)` on a fresh folder beside it, then hashing and renaming that.

    An existing `folder` is replaced only when the new one is complete.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    files = sorted(file for file in aside.rglob("*") if file.is_file())
    manifest = {str(file.relative_to(aside)): sha256(file) for file in files}
    (aside / MANIFEST).write_text(json.dumps(manifest, indent=2))
    for file in (*files, aside / MANIFEST, aside):
        _flush(file)
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    _flush(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def check_folder(folder: Path) -> None:
    """Compares every file with the manifest.

    Raises:
        CheckpointError: no manifest, or a file is missing or changed.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{folder} has no readable {MANIFEST}; it is not a complete checkpoint.") from error
    for name, digest in manifest.items():
        file = folder / name
        if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file() or sha256(file) != digest:
            raise CheckpointError(f"{file} is missing or damaged (its sha256 is not the one in {MANIFEST}).")


def checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints below `folder`, oldest first."""
    found = [path for path in folder.glob("step-*") if _STEP.fullmatch(path.name) and (path / MANIFEST).is_file()]
    return sorted(found)


def save_checkpoint(folder: Path, step: int, model, optimizer, ema, state: dict, extras, keep: int) -> Path:
    """Writes `folder/step-<step>` and then removes all but the newest `keep`.

    Args:
        model: the unwrapped `LDAEForPreTraining`. ema: an `ExponentialMovingAverage` or None.
        state: JSON-able facts (step, seed, plan …). extras: called with the new folder, adds processor and recipe.
    """

    def write(path: Path) -> None:
        model.save_pretrained(path)
        extras(path)
        (path / "training").mkdir()
        save_file(optimizer_tensors(model, optimizer), path / "training" / "optimizer.safetensors")
        save_file({"torch": torch.get_rng_state()}, path / "training" / "rng.safetensors")
        if ema is not None:
            save_file({k: v.contiguous() for k, v in ema.average.items()}, path / "training" / "ema.safetensors")
        (path / "training" / "state.json").write_text(json.dumps(state, indent=2))

    target = folder / f"step-{step:08d}"
    write_folder(target, write)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path, model, optimizer, ema) -> dict:
    """Puts a checked checkpoint's weights, optimizer, EMA and RNG in place; returns its state.

    Raises:
        CheckpointError: damaged, or made by another model.
    """
    check_folder(folder)
    try:
        model.load_state_dict(load_file(folder / "model.safetensors"))
        load_optimizer(model, optimizer, load_file(folder / "training" / "optimizer.safetensors"))
        torch.set_rng_state(load_file(folder / "training" / "rng.safetensors")["torch"])
        if ema is not None:
            average = load_file(folder / "training" / "ema.safetensors")
            for name, value in ema.average.items():
                value.copy_(average[name])
        return json.loads((folder / "training" / "state.json").read_text())
    except (RuntimeError, KeyError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder} does not fit this run: {error}") from error


def optimizer_tensors(model, optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as `<parameter name>.<step | exp_avg | exp_avg_sq>`."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    state = optimizer.state
    return {f"{names[p]}.{key}": value.contiguous() for p, slot in state.items() for key, value in slot.items()}


def load_optimizer(model, optimizer, tensors: dict[str, torch.Tensor]) -> None:
    """The inverse of `optimizer_tensors`."""
    state = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        name = next(name for name, other in model.named_parameters() if other is parameter)
        prefix = f"{name}."
        state[index] = {key: tensors[prefix + key] for key in ("step", "exp_avg", "exp_avg_sq")}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
