"""Proof: a run that is killed again and again, while it saves too, ends bit for bit as one that never was: weights,
optimizer, EMA, generators, encoder with golden features, and every line of the log.

    python tests/proofs/kills.py [--count 50] [--seed 0]
"""

import argparse
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from trials import SMALL, Run, before, differences, labelled_images, leftovers, module, note, orphans, overrides, report

from ldae_hf.manifest import DamagedError, check_folder
from ldae_hf.training import EXIT_CODE, checkpoints
from ldae_hf.training.checkpointing import CheckpointWriter


STEPS = 18
FILE_OPERATIONS = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.listdir"}


def drawn(model, processor) -> dict[str, float]:
    """An evaluation that moves torch's generator."""
    return {"drawn": torch.rand(()).item()}


def seen(model, processor) -> dict[str, float]:
    return {"seen": model.ldae.patch_embedding.weight.double().sum().item()}


def small_batches_for_the_pca() -> None:
    module("fit_pca").BATCH = 4


# ---- ways to die, each prepared in the fork


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def at_file_operation(number: int, part: str, in_writer: bool | None = None) -> Callable[[], None]:
    """At the number-th operation on a path that has `part` in it, by the main thread, by the writer's, or by either."""

    def prepare() -> None:
        left = number

        def hook(event: str, arguments: tuple) -> None:
            nonlocal left
            if event not in FILE_OPERATIONS or part not in str(arguments[0]):
                return
            writes = threading.current_thread().name == "checkpoint"
            if in_writer is not None and writes is not in_writer:
                return
            left -= 1
            if left == 0:
                note(f"{'writer' if writes else 'main'}: {event}")
                die()

        sys.addaudithook(hook)

    return prepare


def later(seconds: float) -> None:
    """By another process, whatever this one does then."""
    mine = os.getpid()
    if os.fork() == 0:
        time.sleep(seconds)
        os.kill(mine, signal.SIGKILL)
        os._exit(0)


def at_call(owner: object, name: str, number: int, act: Callable[[], None] = die) -> Callable[[], None]:
    """At the number-th call of a function."""

    def prepare() -> None:
        left = number

        def count() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                act()

        before(owner, name, count)

    return prepare


def at_batch_of_the_pca(number: int, act: Callable[[], None] = die) -> Callable[[], None]:
    return at_call(module("fit_pca").PatchCovariance, "update", number, act)


def at_both(*ways: Callable[[], None]) -> Callable[[], None]:
    """In either way, whichever comes first."""
    return lambda: [prepare() for prepare in ways] and None


SAVE, SIGNAL = "a save", "a signal"


def choose(draw: random.Random, run: Run, previous: str) -> tuple[str, Callable[[], None]]:
    """A way to end that this start may come to, and its name; `previous` is that of the start before it.

    A signal is no kill: what it broke off is made up for by a start that may be killed.
    """
    log, here = module("metrics_log").MetricsLog, sys.modules[__name__]
    saves = {
        SAVE: at_file_operation(draw.randint(1, 120), "/checkpoints", True),
        f"{SAVE}, the old one's end": at_file_operation(draw.randint(1, 60), ".old", True),
        f"{SAVE}, by the clock": at_call(
            CheckpointWriter, "_write", draw.randint(1, 3), lambda: later(draw.random() / 16)
        ),
    }
    others = {
        "a file": at_file_operation(draw.randint(1, 150), str(run.folder)),
        "a file, main thread": at_file_operation(draw.randint(5, 60), str(run.folder), False),
        "the clock": lambda: later(draw.uniform(0.1, 2.5)),
        "an evaluation": at_call(here, "inside", draw.randint(1, 3)),
        "an evaluation's lines": at_call(log, "_append", draw.randint(1, 15)),
    }
    signals = {f"{SIGNAL} in an evaluation": at_call(here, "inside", draw.randint(1, 3), terminate)}
    [ways] = draw.choices([saves, others, signals], [5, 2, 2])
    if not (run.folder / "processor").is_dir() and draw.random() < 0.4:
        ways = {
            "the PCA": at_batch_of_the_pca(draw.randint(1, 6)),
            "the processor": at_file_operation(draw.randint(1, 14), "/.processor"),
            f"{SIGNAL} in the PCA": at_both(
                at_batch_of_the_pca(draw.randint(1, 6), terminate), at_file_operation(draw.randint(1, 20), ".partial")
            ),
        }
    if previous.startswith(SIGNAL):
        number = draw.randint(1, 3)
        ways = {
            "what was broken off": at_both(at_call(log, "_append", number), at_file_operation(2 * number, ".partial"))
        }
    if run.step >= STEPS - 3 and draw.random() < 0.6:
        ways = {"the encoder": at_file_operation(draw.randint(1, 40), "/.encoder")}
    name = draw.choice(list(ways))
    return name, ways[name]


def inside() -> None:
    """Called within the first evaluation."""


def drawn_within(model, processor) -> dict[str, float]:
    inside()
    return drawn(model, processor)


# ---- the proof


def run(count: int = 50, seed: int = 0) -> dict:
    """Kills `count` times; figures, and in `failed` what does not hold."""
    draw, failed, kinds, where = random.Random(seed), [], Counter(), Counter()
    settings = dict(
        dataset=labelled_images(),
        tier="quickstart",
        overrides=overrides(SMALL),
        checkpoint_every=3,
        evaluate_every=4,
        evaluations=[drawn_within, seen],
    )
    lives, kills, half_written, resumed, signals = [], 0, 0, 0, 0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        unbroken = Run(folder / "unbroken", settings, prepare=small_batches_for_the_pca)
        unbroken.finish()
        while kills < count:
            life = Run(folder / f"life-{len(lives):03d}", settings, prepare=small_batches_for_the_pca)
            lives.append(life)
            saved, name = 0, ""
            while True:
                workers = draw.choice([0, 0, 2])
                name, prepare = choose(draw, life, name) if kills < count else ("none", lambda: None)
                start = life.start(prepare, num_workers=workers)
                what = f"{life.folder.name}, start {life.starts} ({name}, {workers} workers)"
                try:
                    code = start.expect(0, -signal.SIGKILL, *[EXIT_CODE] * name.startswith(SIGNAL))
                except (AssertionError, TimeoutError) as error:
                    failed.append(f"{what}: {error}")
                    return figures(locals())
                if code == 0:
                    break
                if code == EXIT_CODE:
                    signals += 1
                    continue
                kills, kinds = kills + 1, kinds + Counter([name])
                where.update(start.notes.read_text().splitlines())
                half_written += any(life.folder.glob("checkpoints/.step-*.writing"))
                resumed += life.step > 0
                if life.step < saved:
                    failed.append(f"{what}: the checkpoint of step {saved} is lost")
                saved = life.step
                try:
                    for checkpoint in checkpoints(life.folder / "checkpoints"):
                        check_folder(checkpoint)
                except DamagedError as error:
                    failed.append(f"{what}: {error}")
            failed += [f"{life.folder.name} differs in {found}" for found in differences(unbroken.folder, life.folder)]
            failed += [f"{life.folder.name} has left {found}" for found in leftovers(life.folder)]
        if left := orphans(lives):
            failed.append(f"{left} processes lived on for more than 10 seconds")
        return figures(locals())


def figures(found: dict) -> dict:
    in_save = sum(number for name, number in found["kinds"].items() if name.startswith(SAVE))
    return {
        "kills": found["kills"],
        "lives": len(found["lives"]),
        "in_save": in_save,
        "half_written": found["half_written"],
        "by_writer": sum(n for name, n in found["where"].items() if name.startswith("writer")),
        "resumed": found["resumed"],
        "signals": found["signals"],
        "kinds": dict(found["kinds"]),
        "failed": found["failed"],
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--long", dest="count", action="store_const", const=200)
    began = time.monotonic()
    found = run(**vars(parser.parse_args()))
    line = (
        "kills: {kills} SIGKILLs in {lives} runs, {in_save} of them aimed at a save ({half_written} left a checkpoint "
        "half written, {by_writer} came at a file operation of the writer's thread); {resumed} starts went on from a "
        "checkpoint, {signals} were ended by a signal. {kinds}"
    )
    return report(line, found, began)


if __name__ == "__main__":
    raise SystemExit(main())
