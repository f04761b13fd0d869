"""Proof: of a checkpoint every flipped bit and every truncation is found before it is used; a disk that is full when a
run saves costs nothing that had been saved, and with room again the same command goes on, bit for bit.

    python tests/proofs/damage.py
"""

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import AutoModelForPreTraining
from trials import SMALL, Run, differences, labelled_images, leftovers, overrides, report

from ldae_hf.manifest import DamagedError, check_folder, read_manifest, sha256
from ldae_hf.recipes import load_recipe
from ldae_hf.training.checkpointing import checkpoints, load_checkpoint, newest_intact
from ldae_hf.training.optimization import ExponentialMovingAverage, adamw
from ldae_hf.verify import FAILED, hashes, look


IMAGES = 18  # two global batches of 8 an epoch, and two images that are left out
EPOCHS = 10
RECIPE = SMALL | {"train.epochs": EPOCHS}
SETTINGS = dict(tier="quickstart", overrides=overrides(RECIPE), watched=0, checkpoint_every=1, keep_checkpoints=2)
FLIPS_PER_FILE, TRUNCATIONS_PER_FILE = 20, 5  # at least
DISK = 160 * 2**20  # bytes of the disk that is made full


# ---- damage


class Damage:
    """Damages a file of a checkpoint within a `with` block."""

    def __init__(self, file: Path, place: int, bit: int | None):
        self.file, self.place, self.bit = file, place, bit

    def __enter__(self) -> None:
        with open(self.file, "r+b") as stream:
            stream.seek(self.place)
            self.before = stream.read(1) if self.bit is not None else stream.read()
            stream.seek(self.place)
            if self.bit is None:
                stream.truncate()
            else:
                stream.write(bytes([self.before[0] ^ 1 << self.bit]))

    def __exit__(self, *_) -> None:
        with open(self.file, "r+b") as stream:
            stream.seek(self.place)
            stream.write(self.before)


def drawn(files: list[Path], count: int, per_file: int, rng: random.Random) -> list[Path]:
    """So many files: each at least `per_file` times, the others by their bytes."""
    sizes = [file.stat().st_size for file in files]
    return files * per_file + rng.choices(files, sizes, k=count - per_file * len(files))


def finds(look_at: Callable[[], object], file: Path) -> bool:
    """Whether damage is found, and the file named."""
    try:
        look_at()
    except DamagedError as error:
        return file.name in str(error)
    except Exception:  # it was used
        pass
    return False


def damaged_checkpoints(folder: Path, flips: int, truncations: int, failed: list[str]) -> dict:
    """Figures of the damage that is found in the newest of a run's checkpoints, by all who read one."""
    older, newer = checkpoints(folder / "checkpoints")
    recipe = load_recipe("l_dae", "quickstart", overrides(RECIPE))
    torch.manual_seed(1)
    model = AutoModelForPreTraining.from_config(recipe.model_config())
    optimizer, ema = adamw(model, recipe.train["betas"]), ExponentialMovingAverage(model, 0.5)
    untouched = {name: value.clone() for name, value in (model.state_dict() | ema.average).items()}

    def verified() -> None:
        (check,) = look(newer, {"hashes": lambda: hashes(newer, True)})
        if check.status == FAILED:
            raise DamagedError(check.detail)

    def newest() -> None:
        found, problems = newest_intact(folder / "checkpoints")
        if found == older and len(problems) == 1:
            raise DamagedError(problems[0])

    readers = {"load_checkpoint": lambda: load_checkpoint(newer, model, optimizer, ema), "verify": verified}
    readers |= {"newest_intact": newest}
    rng = random.Random(0)
    files = sorted(path for path in newer.rglob("*") if path.is_file())
    before = {file: sha256(file) for file in files}
    plans = [(file, rng.randrange(8)) for file in drawn(files, flips, FLIPS_PER_FILE, rng)]
    plans += [(file, None) for file in drawn(files, truncations, TRUNCATIONS_PER_FILE, rng)]
    found = {"flips": 0, "truncations": 0}
    for file, bit in plans:
        place = rng.randrange(file.stat().st_size)
        with Damage(file, place, bit):
            unseen = [name for name, reader in readers.items() if not finds(reader, file)]
        found["truncations" if bit is None else "flips"] += not unseen
        if unseen:
            failed.append(f"{file.name}, byte {place}, bit {bit}: not found by {', '.join(unseen)}")
    if before != {file: sha256(file) for file in files}:
        failed.append("the proof did not undo its damage")
    now = model.state_dict() | ema.average
    if optimizer.state or not all(torch.equal(value, now[name]) for name, value in untouched.items()):
        failed.append("a damaged checkpoint changed the model, the optimizer or the EMA")
    step = load_checkpoint(newer, model, optimizer, ema)["step"]
    if f"step-{step:08d}" != newer.name:
        failed.append("the checkpoint without damage does not load")
    return {"files": len(files), "found_flips": found["flips"], "found_truncations": found["truncations"]}


# ---- full disks, prepared in the fork


def at(number: int, event: str, name: str, act: Callable[[], None]) -> Callable[[], None]:
    """Calls `act` when the process makes a folder of this name, or opens a file to append, for the nth time."""

    def prepare() -> None:
        left = number

        def hook(happened: str, arguments: tuple) -> None:
            nonlocal left
            if happened == event and Path(str(arguments[0])).match(name):
                left -= event != "open" or "a" in str(arguments[1])
                if left == 0:
                    left = -1
                    act()

        sys.addaudithook(hook)

    return prepare


def limit_files(size: Callable[[], int]) -> Callable[[], None]:
    """No file can be longer than so many bytes from now on: writing fails in the middle of one, as on a full disk."""

    def act() -> None:  # an error, EFBIG, and no death by SIGXFSZ, which Python ignores
        resource.setrlimit(resource.RLIMIT_FSIZE, (size(), resource.RLIM_INFINITY))

    return act


def fill(ballast: Path, room: int) -> Callable[[], None]:
    """Fills a disk, but for so many bytes."""

    def act() -> None:
        free = os.statvfs(ballast.parent)
        with open(ballast, "wb") as stream:
            os.posix_fallocate(stream.fileno(), 0, max(1, free.f_bavail * free.f_frsize - room))

    return act


@contextmanager
def small_disk(folder: Path) -> Iterator[Path | None]:
    """A file system of its own, small enough to be filled; None where this process may not mount one."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        yield None
        return
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


class FullDisk:
    """A run that meets a full disk at one save after the other.

    Args:
        whole: a run without trouble that kept all its checkpoints. words: of the error.
    """

    def __init__(self, folder: Path, whole: Path, settings: dict, words: str, failed: list[str]):
        self.run, self.whole, self.words, self.failed = Run(folder, settings), whole, words, failed
        self.saves = 0

    def claim(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.failed.append(f"{self.words}, save {self.saves}: {sentence}")

    def meets(self, number: int, act: Callable[[], None], make_room: Callable[[], None] = lambda: None) -> None:
        """The next start finds the disk full when it saves for the nth time."""
        folder, stands = self.run.folder / "checkpoints", self.run.step
        start = self.run.start(at(number, "os.mkdir", ".step-*.writing/training", act))
        code, said = start.join()[0], start.end_of_output()
        self.saves += 1
        last = stands + number - 1
        intact = f"{folder / f'step-{last:08d}'} is intact" if last else "nothing has been saved yet"
        self.claim(code == 1 and "RunError" in said.strip().splitlines()[-1], f"ended otherwise: {said[-300:]}")
        self.claim(self.words in said and intact in said, f"the error does not say that {intact}")
        self.claim(not leftovers(self.run.folder), f"leftovers: {leftovers(self.run.folder)}")
        kept = [int(path.name.removeprefix("step-")) for path in checkpoints(folder)]
        self.claim(kept == [step for step in (last - 1, last) if step > 0], f"the checkpoints are {kept}")
        if last:
            newest = folder / f"step-{last:08d}"
            check_folder(newest)
            own = self.whole / "checkpoints" / newest.name
            self.claim(read_manifest(newest) == read_manifest(own), f"{newest.name} is not that of a whole run")
        make_room()

    def goes_on(self) -> None:
        """To its end, equal to a run that never met a full disk."""
        self.run.finish()
        found = differences(self.run.folder, self.whole)
        self.claim(not found, f"differs from a run without trouble in {', '.join(found)}")
        self.claim(not leftovers(self.run.folder), f"leftovers: {leftovers(self.run.folder)}")


def full_at_saves(count: int, rng: random.Random) -> list[int]:
    """After how many saves of each start the disk is full: the first, second or third, in a random order."""
    numbers = ([1, 2, 1, 3] * count)[:count]
    rng.shuffle(numbers)
    return numbers


def limited(folder: Path, whole: Path, settings: dict, saves: int, failed: list[str]) -> int:
    """A file is cut off at a random length, in the middle of the first or a later file of a checkpoint."""
    disk, rng = FullDisk(folder, whole, settings, os.strerror(27), failed), random.Random(1)
    longest = max(path.stat().st_size for path in whole.rglob("*.safetensors"))
    for number in full_at_saves(saves, rng):
        length = int(longest * 10 ** rng.uniform(-2.5, 0))
        disk.meets(number, limit_files(lambda length=length: length))
    disk.goes_on()
    return disk.saves


def filled(folder: Path, whole: Path, settings: dict, saves: int, failed: list[str]) -> int:
    """A real disk, on which room for a random part of a checkpoint is left."""
    disk, rng = FullDisk(folder / "run", whole, settings, os.strerror(28), failed), random.Random(2)
    size = sum(path.stat().st_size for path in checkpoints(whole / "checkpoints")[-1].rglob("*") if path.is_file())
    ballast = folder / "ballast"
    for number in full_at_saves(saves, rng):
        disk.meets(number, fill(ballast, rng.randrange(size)), lambda: ballast.unlink(missing_ok=True))
    disk.goes_on()
    return disk.saves


def torn_lines(folder: Path, whole: Path, settings: dict, failed: list[str]) -> int:
    """The disk is full in the middle of a line of the log, of the sessions, and when the encoder is written."""
    run, torn = Run(folder, settings), 0
    for name, number, length in (("metrics.jsonl", 5, 100), ("sessions.jsonl", 2, 40)):
        file = folder / name
        act = limit_files(lambda file=file, length=length: file.stat().st_size + length)
        start = run.start(at(number, "open", name, act), checkpoint_every=4, max_steps=6)
        start.join()
        is_torn = not file.read_bytes().endswith(b"\n")
        torn += is_torn
        if not is_torn:
            failed.append(f"{name} was not torn: {start.end_of_output()[-300:]}")
    start = run.start(at(1, "os.mkdir", ".encoder.writing", limit_files(lambda: 10**5)))
    if start.join() != [1] or os.strerror(27) not in start.end_of_output():
        failed.append(f"a full disk when the encoder is written: {start.end_of_output()[-300:]}")
    run.finish()
    if found := differences(folder, whole):
        failed.append(f"after torn lines a run differs in {', '.join(found)}")
    starts = [line for line in readable(folder / "sessions.jsonl") if line["event"] == "start"]
    if len(starts) != 4:
        failed.append("a torn line of sessions.jsonl made the start after it unreadable")
    return torn


def readable(file: Path) -> list[dict]:
    """The lines that are not torn."""
    found = []
    for line in file.read_text().splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            pass
    return found


def run(flips: int = 1000, truncations: int = 300, saves: int = 20) -> dict:
    """Figures of the proof; claims that fail are in `failed`, a list of sentences."""
    failed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        settings = SETTINGS | dict(dataset=labelled_images(IMAGES))
        whole = Run(folder / "whole", settings | dict(keep_checkpoints=1000))
        whole.finish()
        for name in ("step-00000019", "step-00000020"):
            shutil.copytree(whole.folder / "checkpoints" / name, folder / "damaged" / "checkpoints" / name)
        figures = damaged_checkpoints(folder / "damaged", flips, truncations, failed)
        figures["limited"] = limited(folder / "limited", whole.folder, settings, saves, failed)
        with small_disk(folder / "disk") as disk:
            figures["filled"] = filled(disk, whole.folder, settings, saves, failed) if disk else 0
        figures["torn"] = torn_lines(folder / "torn", whole.folder, settings, failed)
    disk = f"{figures['filled']} times on a small disk" if figures["filled"] else "no small disk could be mounted"
    return figures | {"flips": flips, "truncations": truncations, "disk": disk, "failed": failed}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--truncations", type=int, default=300)
    parser.add_argument("--saves", type=int, default=20, help="at which the disk is full, for each way to make it so")
    began = time.monotonic()
    line = (
        "damage: {found_flips:,} of {flips:,} flipped bits and {found_truncations} of {truncations} truncations in the "
        "{files} files of a checkpoint found before use, by each of three readers; disk full at random saves, "
        "{limited} times by a limit on the length of files (EFBIG), {disk} (ENOSPC), {torn} lines torn: "
        "went on bit for bit"
    )
    return report(line, run(**vars(parser.parse_args(arguments))), began)


if __name__ == "__main__":
    raise SystemExit(main())
