"""Other people's weights: a PyTorch checkpoint, which is a pickle, becomes a safetensors file.

The only place in the package that calls `torch.load`, with `weights_only=True` and in a process of its own: this file,
run as a script. What comes out of it is read as safetensors, which can hold nothing but tensors. The process is no
sandbox: it keeps a crash or a full memory away from the caller, `weights_only` keeps code from running.
"""

import hashlib
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


MAX_BYTES = 8 * 2**30  # of a checkpoint, and of its tensors: far more than any file that this package has a use for
TIMEOUT = 600  # seconds
NESTED_UNDER = ("state_dict", "model")


def convert(file: str | Path, output: str | Path | None = None, *, force: bool = False) -> str:
    """Writes the tensors of a PyTorch checkpoint (`.pth`, `.pt`, `.ckpt`) as safetensors, under the same names.

    The checkpoint is a state dict, or holds one under "state_dict" or "model"; what lies beside that is left out. The
    new file is written aside and renamed when it is whole.

    Args:
        output: default `file` with the ending `.safetensors`. force: replace an `output` that is there.

    Returns:
        A report: name, dtype and shape of each tensor, their total size, and the file's sha256.

    Raises:
        ValueError: no such file, too large, damaged, empty, or with anything else than tensors in it; a pickle that
            would run code is refused by the name of what it asks for. Or `output` is there already.
    """
    file = Path(file)
    output = file.with_suffix(".safetensors") if output is None else Path(output)
    if not file.is_file():
        raise ValueError(f"There is no file {file} to convert.")
    if output.exists() and output.samefile(file):
        raise ValueError(f"{output} is the checkpoint itself; name another --output.")
    _refuse_existing(output, force)
    size = _size(file)
    if size > MAX_BYTES:
        raise ValueError(f"{file} holds {size / 2**30:.1f} GiB, more than the {MAX_BYTES / 2**30:g} GiB allowed.")
    output.parent.mkdir(parents=True, exist_ok=True)
    aside = output.with_name(f".{output.name}.writing")
    try:
        _run(file, aside)
        report = _report(aside, output)
        _refuse_existing(output, force)
        aside.replace(output)
        _flush(output.parent)
    finally:
        aside.unlink(missing_ok=True)
    return report


def _size(file: Path) -> int:
    """Bytes of the file, or of what it unpacks to. Raises ValueError for a damaged archive."""
    size = file.stat().st_size
    if zipfile.is_zipfile(file):  # torch.save does not compress its records, but a hostile writer may have
        try:
            with zipfile.ZipFile(file) as archive:
                size = max(size, sum(record.file_size for record in archive.infolist()))
        except (zipfile.BadZipFile, NotImplementedError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is a damaged archive: {error}.") from error
    return size


def _refuse_existing(output: Path, force: bool) -> None:
    if output.exists() and not force:
        raise ValueError(f"{output} is there already; name another --output, or replace it with --force.")


def _run(file: Path, aside: Path) -> None:
    """Unpickles in another process. Raises ValueError with its last line if it fails."""
    # -P: the package's folder must not come before the standard library on the path.
    command = [sys.executable, "-P", __file__, str(file), str(aside)]
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise ValueError(f"Reading {file} took more than {TIMEOUT} seconds and was stopped.") from error
    if process.returncode:
        lines = process.stderr.strip().splitlines()
        said = lines[-1] if process.returncode == 1 and lines else "the process that read it was killed."
        raise ValueError(f"{file} cannot be converted: {said}")


def _report(safetensors: Path, name: Path) -> str:
    """What the file holds, read from its header and its bytes, under the name that it will have."""
    lines = []
    with safe_open(safetensors, "pt") as tensors:
        for key in tensors.keys():
            part = tensors.get_slice(key)
            shown = key if key.isprintable() else repr(key)  # a name may hold what a terminal obeys
            lines.append(f"{shown}  {part.get_dtype()}  {tuple(part.get_shape())}")
    with open(safetensors, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return "\n".join([*lines, f"{name}: {len(lines)} tensors, {safetensors.stat().st_size:,} bytes, sha256 {digest}"])


def _flush(path: Path) -> None:
    """To the disk: the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unpickle(file: str) -> object:
    """The content of a checkpoint. Raises ValueError if it is none, or asks for code."""
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if name := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ValueError(
                f"its pickle asks for {name[1]}, which is code and not a tensor, so it was not run."
            ) from None
        raise ValueError("it is not a checkpoint that torch.save has written.") from None
    except Exception as error:  # on bytes that are no checkpoint torch.load fails in any way
        raise ValueError(f"it is damaged, or not a checkpoint ({type(error).__name__}).") from None


def _tensors(checkpoint: object) -> dict[str, torch.Tensor]:
    """Name -> contiguous tensor with memory of its own. Raises ValueError for anything else."""
    if isinstance(checkpoint, dict):
        checkpoint = next(
            (checkpoint[key] for key in NESTED_UNDER if isinstance(checkpoint.get(key), dict)), checkpoint
        )
    if not isinstance(checkpoint, dict):
        raise ValueError(f"it holds a {type(checkpoint).__name__}, not a dictionary of tensors.")
    if not checkpoint:
        raise ValueError("it holds no tensors.")
    for name, value in checkpoint.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ValueError(f"its entry {name!r} is a {type(value).__name__}, not a tensor under a name.")
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise ValueError(f"its tensor {name!r} is sparse, quantised or without data.")
    size = sum(value.numel() * value.element_size() for value in checkpoint.values())
    if size > MAX_BYTES:  # a few bytes, expanded by strides of 0
        raise ValueError(f"its tensors are {size / 2**30:.1f} GiB, more than the {MAX_BYTES / 2**30:g} GiB allowed.")
    return {name: value.detach().clone(memory_format=torch.contiguous_format) for name, value in checkpoint.items()}


def _main(file: str, aside: str) -> None:
    try:
        save_file(_tensors(_unpickle(file)), aside)
        _flush(Path(aside))
    except (ValueError, SafetensorError, OSError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    _main(*sys.argv[1:])
