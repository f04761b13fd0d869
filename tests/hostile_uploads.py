"""Uploads over a Hub that fails at random, in every way that one can."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
from hub_server import TOKENS, WRITE, Hub, connected

from ldae_hf.hub import upload


FAULTS = (408, (429, {"Retry-After": "7"}), 500, 502, 503, 504, "drop", "lost", "late", "cut", 0.01)
NAME = "me/model"
MOST_RUNS = 20


@dataclass
class Trial:
    """What became of one: `wrong` is empty if all is as it should be."""

    faults: int = 0
    runs: int = 0
    waits: int = 0
    seconds: float = 0.0  # that were not slept
    wrong: str = ""


def random_faults(seed: tuple[int, ...], trial: Trial) -> Callable:
    """Of each request, with a chance that is drawn first; the same ones again, whatever order the threads ask in."""
    chance = np.random.default_rng(seed).uniform(0.1, 0.6)
    asked = Counter()

    def fault(method: str, path: str, count: int):
        asked[method, path] += 1
        rng = np.random.default_rng([*seed, crc32(f"{method} {path} {asked[method, path]}".encode())])
        if rng.random() > chance:
            return None
        trial.faults += 1
        return FAULTS[rng.integers(len(FAULTS))]

    return fault


def write_files(folder: Path, rng: np.random.Generator, version: int) -> None:
    """A model's folder: small and large files, some of them in folders, one of them empty."""
    for name, size in (("config.json", 700), ("vit/config.json", 900), ("notes.txt", 0), (f"version-{version}.txt", 9)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(size))
    for name in ("model.safetensors", "vit/model.safetensors", f"pictures/{version}.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(rng.bytes(int(rng.integers(1, 150_000))))
    (folder / "README.md").write_text(f"---\nlicense: apache-2.0\n---\n# Version {version}\n")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hostile_upload(seed: int, folder: Path) -> Trial:
    """A new repository and then a second version of it, each uploaded by the same command until that succeeds."""
    rng, trial = np.random.default_rng(seed), Trial()
    source = folder / "source"
    with Hub(tokens=TOKENS) as hub, connected(hub, folder / "cache") as waits:
        for version in (1, 2):
            write_files(source, rng, version)
            (source / "version-1.txt").unlink() if version == 2 else None
            hub.fault = random_faults((seed, version), trial)
            if error := until_it_is_done(source, trial):
                trial.wrong = f"version {version} was not uploaded in {MOST_RUNS} runs: {error}"
                return trial
            repository = hub.repositories["models", NAME]
            if repository.files != contents(source):
                trial.wrong = f"version {version} is not what the repository holds"
            hub.fault, hub.requests = lambda *_: None, []
            upload(source, NAME, token=WRITE, delete_patterns="*", progress=False)
            if any("PUT" in request or "/commit/" in request for request in hub.requests):
                trial.wrong = f"version {version} was sent again when it was there"
        commits = [commit.title for commit in repository.history()]
        if commits != ["Upload with ldae"] * 2 + ["initial commit"]:
            trial.wrong = f"the commits are {commits}"
    trial.waits, trial.seconds = len(waits), sum(waits)
    return trial


def until_it_is_done(source: Path, trial: Trial) -> Exception | None:
    for _ in range(MOST_RUNS):
        trial.runs += 1
        try:
            upload(source, NAME, token=WRITE, delete_patterns="*", progress=False)
        except ConnectionError as again:
            error = again
        else:
            return None
    return error
