"""Proof: a loss or gradient that is not finite stops a run before it changes a weight, and leaves what finds its cause;
two runs cannot share a folder, and a killed one does not keep it.

    python tests/proofs/faults.py
"""

import argparse
import io
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from trials import (
    SMALL,
    Run,
    Start,
    before,
    differences,
    labelled_images,
    lines,
    module,
    note,
    orphans,
    overrides,
    report,
)

from ldae_hf.cli import app
from ldae_hf.image_processing_ldae import LDAEImageProcessor
from ldae_hf.manifest import check_folder
from ldae_hf.modeling_ldae import LDAEForPreTraining
from ldae_hf.training import checkpoints, load_images
from ldae_hf.training.sampling import epoch_order


IMAGES, BATCH = 82, 8  # ten steps an epoch, and two images that are left out
STEP = 7  # the step that fails, counted from 1
PLACE = 5  # of the image that is to blame in that step's batch: of two processes the second one sees it
RECIPE = SMALL | {"train.epochs": 1, "train.warmup_epochs": 0}


def images():
    """Pictures with one that is all magenta, so that it is known again after any crop, and its number."""
    blamed = int(epoch_order(0, 0, IMAGES)[(STEP - 1) * BATCH + PLACE])
    stream = io.BytesIO()
    Image.new("RGB", (24, 20), "magenta").save(stream, "PNG")
    return labelled_images(IMAGES, {blamed: stream.getvalue()}), blamed


# ---- faults, each prepared in the fork


def spoil_the_image(factor: float) -> Callable[[], None]:
    """Normalised pixels of the magenta image times a number."""

    def prepare() -> None:
        normalize = LDAEImageProcessor.normalize_pixels

        def spoilt(self, pixels: torch.Tensor) -> torch.Tensor:
            magenta = torch.tensor([255, 0, 255], dtype=pixels.dtype)[:, None, None]
            found = (pixels == magenta).flatten(1).all(dim=1)
            values = normalize(self, pixels)
            return torch.where(found[:, None, None, None], values * factor, values)

        LDAEImageProcessor.normalize_pixels = spoilt

    return prepare


class Moment:
    """True in the step that fails, in the process that has the fault: the last one."""

    def __init__(self):
        self.done = 0
        self.is_here = os.environ.get("RANK", "0") == str(int(os.environ.get("WORLD_SIZE", "1")) - 1)
        before(module("metrics_log").MetricsLog, "add", self.count)

    def count(self) -> None:
        self.done += 1

    def __bool__(self) -> bool:
        return self.is_here and self.done == STEP - 1


def spoil_the_loss() -> None:
    forward, now = LDAEForPreTraining.forward, Moment()

    def spoilt(self, *arguments, **options):
        output = forward(self, *arguments, **options)
        if now:
            output.loss = output.loss * float("nan")
        return output

    LDAEForPreTraining.forward = spoilt


def spoil_the_gradient() -> None:
    adamw, now = module("pretrain").adamw, Moment()

    def spoilt(gradient: torch.Tensor) -> torch.Tensor:
        return gradient * float("inf") if now else gradient

    def hooked(model, *arguments):
        model.decoder.head.weight.register_hook(spoilt)
        return adamw(model, *arguments)

    module("pretrain").adamw = hooked


FAULTS = {
    "NaN in the pixels": (spoil_the_image(float("nan")), True),
    "overflow by the pixels": (spoil_the_image(1e38), True),
    "NaN in the loss": (spoil_the_loss, False),
    "infinity in the gradient": (spoil_the_gradient, False),
}  # with whether the image is to blame


# ---- the proof


@dataclass
class Proof:
    folder: Path
    failed: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    stopped: int = 0
    replays: int = 0
    found: int = 0
    refused_after: float = 0.0

    def claim(self, holds: bool, sentence: str) -> None:
        if not holds:
            self.failed.append(sentence)

    def run(self, name: str, processes: int = 1) -> Run:
        self.runs.append(Run(self.folder / name, {}, processes))
        return self.runs[-1]

    def command(self, run: Run, *prepare: Callable[[], None], steps: int | None = None, workers: int = 0) -> Start:
        """`ldae pretrain` on the images."""
        arguments = ["pretrain", "l_dae", "--tier", "quickstart", "--output-dir", str(run.folder)]
        arguments += ["--dataset", str(self.folder / "images"), "--mixed-precision", "no", "--log-every", "1"]
        arguments += ["--checkpoint-every", "5", "--num-workers", str(workers)]
        arguments += [part for value in overrides(RECIPE) for part in ("--set", value)]
        arguments += ["--max-steps", str(steps)] if steps else []
        return self.ldae(run, arguments, *prepare)

    @staticmethod
    def ldae(run: Run, arguments: list[str], *prepare: Callable[[], None]) -> Start:
        """Any command."""
        run.starts += 1

        def call() -> None:
            for step in prepare:
                step()
            app(arguments)

        return Start(run, call)

    def check_fault(self, name: str, prepare: Callable[[], None], is_image: bool, processes: int, blamed: int) -> None:
        what = f"{name}, {processes} processes"
        reference = self.run(f"reference-{processes}", processes)
        if not reference.folder.is_dir():
            self.command(reference, steps=STEP - 1).expect(0)
        run = self.run(f"{name.replace(' ', '-')}-{processes}", processes)
        start = self.command(run, prepare)
        codes, output = start.join(), start.output.read_text()
        self.claim(codes == [2] * processes, f"{what}: exit codes {codes}\n{output[-2000:]}")
        self.claim(
            f"At step {STEP} " in output and "Traceback" not in output, f"{what}: says not the step\n{output[-2000:]}"
        )
        self.stopped += codes == [2] * processes
        noted = run.folder / "failures" / f"step-{STEP - 1:08d}"
        if not noted.is_dir():
            self.failed.append(f"{what}: nothing is noted")
            return
        check_folder(noted)
        facts = json.loads((noted / "replay.json").read_text())
        ids = epoch_order(0, 0, IMAGES)[(STEP - 1) * BATCH : STEP * BATCH].tolist()
        self.claim(facts["sample_ids"] == ids, f"{what}: other samples are noted")
        self.claim((facts["step"], facts["seed"]) == (STEP - 1, 0), f"{what}: another step or seed is noted")
        before, kept = (
            load_file(folder / "model.safetensors")
            for folder in (checkpoints(reference.folder / "checkpoints")[-1], noted)
        )
        same = before.keys() == kept.keys() and all(torch.equal(value, kept[key]) for key, value in before.items())
        self.claim(same, f"{what}: the weights were changed by the step")
        self.claim(run.step == 5, f"{what}: the checkpoint before it is not the last one")
        self.claim(
            [line["step"] for line in lines(run.folder)] == list(range(1, STEP)), f"{what}: the log has that step"
        )
        ended = lines(run.folder, "sessions.jsonl")[-1]
        self.claim((ended["event"], ended["reason"]) == ("end", "error"), f"{what}: its end is not noted as an error")
        self.claim(facts["command"] in output, f"{what}: the command to replay it is not said")

        replay = self.ldae(self.run(f"replay-{run.folder.name}"), facts["command"].split()[1:], *[prepare] * is_image)
        codes, output = replay.join(), replay.output.read_text()
        self.replays += codes == [0]
        rows = [line for line in output.splitlines() if line.startswith("image ")]
        if is_image:
            right = len(rows) == 1 and rows[0].startswith(f"image {blamed} at t =")
        else:
            right = not rows and "Every image alone has a finite loss" in output
        self.claim(codes == [0] and right, f"{what}: the replay says {output[-2000:]}")
        self.found += is_image and right

    def check_that_it_goes_on(self) -> None:
        """When the cause is gone the same command goes on, as if nothing had been."""
        whole, run = self.run("whole"), self.runs[1]
        self.command(whole).expect(0)
        self.command(run).expect(0)
        self.failed += [f"after a fault: differs in {found}" for found in differences(whole.folder, run.folder)]

    def check_lock(self) -> None:
        run = self.run("locked")

        def pause() -> None:
            note("here")
            time.sleep(120)

        first = self.command(run, lambda: before(torch.nn.utils, "get_total_norm", pause), workers=2)
        first.wait_for("here")
        files = self.state(run.folder)
        began = time.monotonic()
        second = self.command(run)
        codes, output = second.join(), second.output.read_text()
        self.refused_after = time.monotonic() - began
        owner = f"in use by another run (process {first.processes[0].pid} on "
        self.claim(codes == [2] and owner in output, f"a second run on a folder: {codes}\n{output[-2000:]}")
        self.claim(self.state(run.folder) == files, "a second run that is refused changes the folder")
        self.claim(first.processes[0].is_alive(), "a second run ends the first one")
        first.signal(signal.SIGKILL)
        first.join()
        self.command(run, steps=2).expect(0)  # at once, while workers of the first may live

    @staticmethod
    def state(folder: Path) -> dict:
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def run() -> dict:
    """All faults on one and on two processes; figures, and in `failed` what does not hold."""
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(Path(folder))
        dataset, blamed = images()
        (proof.folder / "images").mkdir()
        dataset.to_parquet(proof.folder / "images" / "train.parquet")
        load_images(proof.folder / "images")  # prepared once, not in every fork
        for processes in (1, 2):
            for name, (prepare, is_image) in FAULTS.items():
                proof.check_fault(name, prepare, is_image, processes, blamed)
        proof.check_that_it_goes_on()
        proof.check_lock()
        if left := orphans(proof.runs):
            proof.failed.append(f"{left} processes lived on for more than 10 seconds")
    return {
        "faults": 2 * len(FAULTS),
        "stopped": proof.stopped,
        "replays": proof.replays,
        "found": proof.found,
        "images": 2 * sum(is_image for _, is_image in FAULTS.values()),
        "refused_after": proof.refused_after,
        "failed": proof.failed,
    }


def main() -> int:
    argparse.ArgumentParser().parse_args()
    began = time.monotonic()
    line = (
        "faults: {faults} losses or gradients not finite, {stopped} stopped before the update with exit code 2; "
        "{replays} replays, which found {found} of {images} images that were to blame; a second run on a folder was "
        "refused after {refused_after:.1f} s, a run after a SIGKILL not"
    )
    return report(line, run(), began)


if __name__ == "__main__":
    raise SystemExit(main())
