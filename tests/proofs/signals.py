"""Proof: whatever a run is doing when it is asked to end, it saves, leaves with exit code 75, and goes on as if it had
not been asked: bit for bit, no step done twice, no evaluation missing.

    python tests/proofs/signals.py [--repeat 1] [--compile]
"""

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from trials import SMALL, Run, before, differences, labelled_images, leftovers, module, note, orphans, overrides, report

from ldae_hf.training import EXIT_CODE
from ldae_hf.training.checkpointing import CheckpointWriter
from ldae_hf.training.data import eval_loader, load_images
from ldae_hf.training.metrics_log import MetricsLog
from ldae_hf.training.perceptual import LabelFeatures


STEPS = 18
LONG = 60.0  # seconds: a wait that a signal has to break off
SOON = 10.0  # seconds within which it then has left, on a machine that does other work too
LEARNED = {  # a tokenizer trained with a network for its perceptual loss and a discriminator, then cached latents
    "model.size": "quickstart",
    "model.image_size": 16,
    "model.patch_size": 4,
    "model.latent_dim": 4,
    "tokenizer.stride": 2,
    "tokenizer.base_width": 8,
    "tokenizer.epochs": 3,
    "tokenizer.global_batch_size": 8,
    "tokenizer.adversarial_start_epochs": 1.0,
    "train.epochs": 2,
    "train.warmup_epochs": 1,
    "train.global_batch_size": 8,
}


def pause(seconds: float) -> None:
    """So that the signal comes here; a signal that breaks nothing off does not shorten it."""
    note("here")
    time.sleep(seconds)


# ---- where it comes: preparations of the start that is asked to end


def at(
    owner: object, name: str, number: int = 1, seconds: float = 0.3, act: Callable[[float], None] = pause
) -> Callable[[], None]:
    """At the number-th call of a function."""

    def prepare() -> None:
        calls = 0

        def count() -> None:
            nonlocal calls
            calls += 1
            if calls == number:
                act(seconds)

        before(owner, name, count)

    return prepare


def at_step(number: int, seconds: float = 0.3) -> Callable[[], None]:
    """When the gradient of the number-th step is there."""
    return at(torch.nn.utils, "get_total_norm", number, seconds)


def at_step_unread(number: int) -> Callable[[], None]:
    """As `at_step`, and whoever read the output has ended, as `| tee log` does on Ctrl-C."""

    def prepare() -> None:
        reads, writes = os.pipe()
        for descriptor in (1, 2):
            os.dup2(writes, descriptor)
        at_step(number)()
        at(torch.nn.utils, "get_total_norm", number, act=lambda _: os.close(reads))()

    return prepare


def at_batch_of_the_pca(number: int) -> Callable[[], None]:
    return at(module("fit_pca").PatchCovariance, "update", number)


def within() -> None:
    """Called within an evaluation, for each of its batches."""


def drawn(model, processor) -> dict[str, float]:
    """An evaluation that moves torch's generator and reads images with workers."""
    shown = 0
    for batch in eval_loader(load_images(labelled_images()), 16, 4, num_workers=1):
        within()
        shown += len(batch["labels"])
    return {"drawn": torch.rand(()).item(), "shown": shown}


def seen(model, processor) -> dict[str, float]:
    return {"seen": model.ldae.patch_embedding.weight.double().sum().item()}


def in_evaluation(number: int, seconds: float = LONG) -> Callable[[], None]:
    """At the number-th batch of evaluations; there are seven in each."""
    return at(sys.modules[__name__], "within", number, seconds)


# ---- the cases


@dataclass(frozen=True)
class Case:
    """What a run does when a signal comes.

    Attributes:
        prepare: has it pause there. signal: its name. kind: of run.
        rank: of the process that gets the signal; None for all and their workers, as a terminal's Ctrl-C.
        breaks: whether the pause must be broken off. code: the exit code; 0 where all is done before it could leave.
    """

    name: str
    prepare: Callable[[], None]
    signal: str = "SIGTERM"
    kind: str = "plain"
    rank: int | None = 0
    workers: int = 0
    breaks: bool = False
    code: int = EXIT_CODE
    again: bool = False  # the signal comes twice, as launchers pass on what the terminal has sent already


def cases() -> list[Case]:
    return [
        Case("data", at(module("pretrain"), "load_images", seconds=LONG), breaks=True),
        Case("data", at(module("pretrain"), "load_images", seconds=LONG), "SIGINT", rank=None, breaks=True),
        Case("PCA, first batch", at_batch_of_the_pca(1)),
        Case("PCA, fourth batch", at_batch_of_the_pca(4), "SIGINT", rank=None, workers=2),
        Case("PCA, last batch", at_batch_of_the_pca(7)),
        Case("building the model", at(module("pretrain"), "adamw")),
        Case("first step", at_step(1)),
        Case("a step", at_step(5), "SIGUSR1"),
        Case("a step", at_step(8), rank=None, workers=2),
        Case("a step", at_step(7), "SIGINT", rank=None, workers=2),
        Case("a step, twice", at_step(10), "SIGINT", rank=None, workers=2, again=True),
        Case("a step, output unread", at_step_unread(4), "SIGINT", rank=None),
        Case("the update", at(module("pretrain"), "update", 6), rank=None),
        Case("a checkpoint's copy", at(CheckpointWriter, "_copy", 5)),
        Case("a checkpoint's writing", at(CheckpointWriter, "_write", 2, seconds=1)),
        Case("a checkpoint's writing", at(CheckpointWriter, "_write", 3, seconds=1), "SIGINT", rank=None, workers=2),
        Case("a checkpoint's last files", at(module("checkpointing"), "write_folder", 2, seconds=0.5), "SIGUSR1"),
        Case("evaluation, first batch", in_evaluation(1), breaks=True),
        Case("evaluation, middle", in_evaluation(11), "SIGINT", rank=None, breaks=True),
        Case("evaluation, of the last step", in_evaluation(4 * 7 + 3), rank=None, workers=2, breaks=True),
        Case("evaluation's lines", at(MetricsLog, "_append", 5)),
        Case("painting", at(module("denoising"), "denoising_picture", 2, seconds=LONG), breaks=True),
        Case("last step", at_step(STEPS)),
        Case("last update", at(module("pretrain"), "update", STEPS), "SIGINT", rank=None, workers=2),
        Case("last checkpoint", at(CheckpointWriter, "_write", STEPS // 3, seconds=1), code=0),
        Case("encoder", at(module("denoising"), "save_encoder"), code=0),
        Case("perceptual network", at(LabelFeatures, "logits", 3, LONG), kind="learned", breaks=True),
        Case("tokenizer, a step", at(module("tokenizers"), "update", 4), kind="learned", rank=None, workers=2),
        Case("tokenizer, adversarial", at(module("tokenizers"), "hinge_loss", 3), "SIGINT", kind="learned"),
        Case("tokenizer, picture", at(module("tokenizers"), "mosaic", 2), kind="learned"),
        Case("tokenizer, variance", at(module("tokenizers"), "latent_variance"), kind="learned"),
        Case("token cache", at(module("token_cache"), "eval_loader", 2, LONG), kind="learned", breaks=True),
        Case("step on cached tokens", at_step(9 + 4), "SIGUSR1", kind="learned"),
        Case("data, of one process", at(module("pretrain"), "load_images", seconds=1), kind="two", rank=1),
        Case("data, of the main process", at(module("pretrain"), "load_images", seconds=1), kind="two", rank=0),
        Case("PCA, of one process", at_batch_of_the_pca(2), kind="two", rank=1),
        Case("a step, of one process", at_step(5), kind="two", rank=1),
        Case("a step, of one process", at_step(9), "SIGINT", kind="two", rank=0),
        Case("a step, of both and workers", at_step(7), "SIGINT", kind="two", rank=None, workers=1),
        Case("evaluation, of the main process", in_evaluation(4), kind="two", rank=0, breaks=True),
        Case("evaluation, of the other process", in_evaluation(4, 0.5), kind="two", rank=1),
        Case("a checkpoint, of the other process", at(CheckpointWriter, "_write", 2, seconds=1), kind="two", rank=1),
        Case("last step, of the other process", at_step(STEPS), kind="two", rank=1),
    ]


def compilations() -> list[Case]:
    """While the C++ compiler runs, to which Ctrl-C comes too."""
    from torch._inductor.cpp_builder import CppBuilder

    compiling = at(CppBuilder, "build", seconds=0)
    return [
        Case("compilation", compiling, kind="compiled"),
        Case("compilation, with its compilers", compiling, "SIGINT", "compiled", rank=None),
    ]


# ---- the proof


def prepare() -> None:
    """At every start: a PCA of several batches, several files of latents, and notes of what is done."""
    module("fit_pca").BATCH = 4
    module("token_cache").BYTES_PER_FILE = 4 * 16 * 4 * 10
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()  # each start compiles anew
    before(MetricsLog, "add", lambda: note("step"))
    before(module("fit_pca").PatchCovariance, "update", lambda: note("batch"))


@dataclass
class Proof:
    """Runs and what has been found out so far."""

    folder: Path
    draw: random.Random
    failed: list[str] = field(default_factory=list)
    unbroken: dict[str, Run] = field(default_factory=dict)
    runs: list[Run] = field(default_factory=list)
    saved: int = 0
    broken_off: float = 0.0  # the slowest

    def new_run(self, kind: str, name: str) -> Run:
        settings = dict(dataset=labelled_images(), overrides=overrides(SMALL), tier="quickstart", checkpoint_every=3)
        settings |= dict(evaluate_every=4, evaluations=[drawn, seen])
        recipe = "l_dae"
        if kind == "learned":
            recipe, settings = "perceptual_labels", settings | dict(overrides=overrides(LEARNED), tier="cpu")
            settings |= dict(cache_latents=True, evaluations=[])
        if kind == "compiled":
            settings |= dict(compile=True)
        run = Run(self.folder / name, settings, 2 if kind == "two" else 1, prepare, recipe)
        self.runs.append(run)
        return run

    def reference(self, kind: str) -> Run:
        if kind not in self.unbroken:
            self.unbroken[kind] = self.new_run(kind, f"unbroken-{kind}")
            self.unbroken[kind].finish()
        return self.unbroken[kind]

    def check(self, number: int, case: Case) -> None:
        reference, run = self.reference(case.kind), self.new_run(case.kind, f"{number:03d}")
        start = run.start(case.prepare, num_workers=case.workers)
        if not start.wait_for("here"):
            raise AssertionError(f"it ended before it came there:\n{start.end_of_output()}")
        time.sleep(self.draw.uniform(0, 0.05))
        sent = time.monotonic()
        start.signal(signal.Signals[case.signal], case.rank)
        if case.again:
            time.sleep(self.draw.uniform(0, 0.2))
            start.signal(signal.Signals[case.signal], case.rank)
        start.expect(case.code)
        took = time.monotonic() - sent
        if case.breaks:
            self.broken_off = max(self.broken_off, took)
            assert took < SOON, f"it took {took:.1f} seconds to leave"
        self.saved += 1
        run.finish()
        for what in ("step", "batch"):
            done, expected = (self.count(what, of) for of in (run, reference))
            assert done == expected, f"{what}: {done} were done in two starts, not {expected}"
        for found in differences(reference.folder, run.folder):
            self.failed.append(f"{number} {case.name}: differs in {found}")
        for found in leftovers(run.folder):
            self.failed.append(f"{number} {case.name}: has left {found}")
        shutil.rmtree(run.folder)

    def count(self, what: str, run: Run) -> int:
        notes = self.folder.glob(f"{run.folder.name}.notes-*")
        return sum(file.read_text().splitlines().count(what) for file in notes)


def run(repeat: int = 1, seed: int = 0, compile: bool = False, only: str = "") -> dict:
    """All cases, `repeat` times; figures, and in `failed` what does not hold."""
    chosen = cases() + (compilations() if compile else [])
    chosen = [case for case in chosen if only in case.name]
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(Path(folder), random.Random(seed))
        for number, case in enumerate(chosen * repeat):
            try:
                proof.check(number, case)
            except (AssertionError, TimeoutError) as error:
                proof.failed.append(f"{number} {case.name} ({case.signal}, {case.kind}, to {case.rank}): {error}")
        if left := orphans(proof.runs):
            proof.failed.append(f"{left} processes lived on for more than 10 seconds")
    names = [case.signal for case in chosen * repeat]
    return {
        "signals": len(names),
        "kinds": ", ".join(f"{names.count(name)} {name}" for name in sorted(set(names))),
        "phases": len({case.name for case in chosen}),
        "saved": proof.saved,
        "groups": sum(case.rank is None for case in chosen) * repeat,
        "two": sum(case.kind == "two" for case in chosen) * repeat,
        "broken_off": proof.broken_off,
        "failed": proof.failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    began = time.monotonic()
    found = run(**vars(parser.parse_args()))
    line = (
        "signals: {signals} ({kinds}) in {phases} phases, {groups} to a whole process group, {two} on two processes; "
        "after {saved} all was saved; the slowest break of what can be broken off took {broken_off:.1f} s"
    )
    return report(line, found, began)


if __name__ == "__main__":
    raise SystemExit(main())
