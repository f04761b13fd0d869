"""Folders that are whole or not there, and of which every bit is known.

A folder is written aside, the sha256 of every file and that of the list itself noted in `manifest.json`, all of it
flushed to the disk, and then renamed into place: a process killed at any moment leaves what was there before.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path, PurePath

from safetensors import SafetensorError


MANIFEST = "manifest.json"


class DamagedError(ValueError):
    """A folder that is not as it was written; the message names the file."""


def sha256(file: Path) -> str:
    """Hex digest of a file."""
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def flush(path: Path) -> None:
    """To the disk: the content of a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(file: Path, text: str) -> None:
    """Writes a file that is never seen half-written."""
    aside = file.with_name(f".{file.name}.writing")
    try:
        aside.write_text(text)
        flush(aside)
        aside.replace(file)
    except OSError:
        aside.unlink(missing_ok=True)
        raise


def write_folder(folder: Path, write: Callable[[Path], None], unlisted: tuple[str, ...] = ()) -> None:
    """Makes `folder` by calling `write(path)` on a fresh folder beside it, then hashing and renaming that.

    An existing `folder` is replaced only when the new one is complete; if writing fails, nothing of the new one stays.

    Args:
        unlisted: relative paths of files that the manifest leaves out, since people edit them.

    Raises:
        OSError: the disk is full, or something else is wrong with it. And whatever `write` raises.
    """
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        write(aside)
        files = sorted(path for path in aside.rglob("*") if path.is_file())
        names = {file.relative_to(aside).as_posix(): file for file in files}
        digests = {name: sha256(file) for name, file in names.items() if name not in unlisted}
        write_text(aside / MANIFEST, manifest_text(digests))
        for file in files:
            if file.stat().st_nlink == 1:  # the mode of a file that lies elsewhere too is not ours to change
                file.chmod((aside / MANIFEST).stat().st_mode)  # safetensors lets nobody else read its files
        for path in (*aside.rglob("*"), aside):
            flush(path)
    except BaseException as error:
        shutil.rmtree(aside, ignore_errors=True)  # the disk may be full
        if isinstance(error, SafetensorError) and (number := re.search(r"os error (\d+)", str(error))):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(folder)) from error
        raise
    before = folder.with_name(f".{folder.name}.before")
    shutil.rmtree(before, ignore_errors=True)
    if folder.exists():
        folder.rename(before)
    aside.rename(folder)
    flush(folder.parent)
    shutil.rmtree(before, ignore_errors=True)


def manifest_text(digests: dict[str, str]) -> str:
    """The content of a manifest: the files' digests by relative path, and the digest of these."""
    own = hashlib.sha256(json.dumps(digests).encode()).hexdigest()
    return json.dumps({"files": digests, "sha256": own}, indent=2) + "\n"


def read_manifest(folder: Path) -> dict[str, str]:
    """The files' digests by relative path.

    Raises:
        DamagedError: there is no manifest, or a bit of it is not as it was written.
    """
    try:
        text = (folder / MANIFEST).read_bytes().decode()
        digests = json.loads(text)["files"]
        intact = text == manifest_text(digests) and all(isinstance(digest, str) for digest in digests.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        intact = False
    if not intact:
        raise DamagedError(f"{folder} has no {MANIFEST}, or a damaged one; it is not as it was written.")
    return digests


def check_folder(folder: Path, needed: tuple[str, ...] = ()) -> None:
    """Compares every file that the manifest lists with its sha256.

    Args:
        needed: files that the manifest must list.

    Raises:
        DamagedError: no manifest, or a file is missing, changed or outside the folder.
    """
    digests = read_manifest(folder)
    for name in dict.fromkeys((*needed, *digests)):
        if name not in digests or not is_intact(folder, name, digests[name]):
            raise DamagedError(f"{folder / name} is missing or damaged: its sha256 is not the one in {MANIFEST}.")


def is_intact(folder: Path, name: str, digest: str) -> bool:
    """Whether a folder holds a file of this name and sha256; never true of one that lies outside."""
    path = PurePath(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    try:
        return (folder / path).is_file() and sha256(folder / path) == digest  # to open a pipe would wait for ever
    except (OSError, ValueError):  # not there, not readable, or a name that no file can have
        return False
