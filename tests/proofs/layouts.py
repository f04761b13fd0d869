"""Proof: however a global batch is split over processes, workers and micro-batches, a run sees the same samples with
the same timesteps and noise in the same order, and learns the same; it may change its layout when it goes on.

    python tests/proofs/layouts.py [--long]
"""

import argparse
import hashlib
import json
import os
import tempfile
import time
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import torch
from safetensors.torch import load_file
from trials import SMALL, Run, differences, labelled_images, lines, module, orphans, overrides, report

from ldae_hf.manifest import read_manifest
from ldae_hf.training import checkpoints, load_images


STEPS, BATCH, IMAGES = 50, 8, 42  # five steps an epoch, and two images that are left out
EXACT, CLOSE = 1e-10, 1e-5  # relative, in float64 and in fp32
CONDITIONED = SMALL | {"model.num_classes": 3, "train.epochs": STEPS * BATCH // 40}


@dataclass(frozen=True)
class Layout:
    processes: int
    workers: int
    images: int  # of a forward pass

    def __str__(self) -> str:
        parts = BATCH // (self.processes * self.images)
        return f"{self.processes} processes, {self.workers} workers, {parts} x {self.images} images"


LAYOUTS = [
    Layout(processes, workers, BATCH // processes // parts)
    for processes, workers, parts in product((1, 2, 4), (0, 2), (1, 2))
]
CHANGES = [  # 25 steps on the one, 25 on the other
    (Layout(1, 0, 8), Layout(2, 2, 2)),
    (Layout(2, 2, 4), Layout(4, 0, 1)),
    (Layout(4, 0, 2), Layout(1, 2, 8)),
    (Layout(1, 2, 4), Layout(1, 0, 2)),
]


class Recorded:
    """A loader that writes down each sample that it gives out, with digests of what belongs to it."""

    def __init__(self, loader, file: Path):
        self.loader, self.file = loader, file

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __iter__(self):
        with open(self.file, "a") as stream:
            for batch in self.loader:
                for row, sample in enumerate(batch["sample_ids"].tolist()):
                    held = {name: batch[name][row] for name in ("labels", "dropped_labels", "timesteps")}
                    held = {name: int(value) for name, value in held.items()}
                    for name in ("noise", "pixel_values"):
                        held[name] = hashlib.sha256(batch[name][row].numpy().tobytes()).hexdigest()[:16]
                    stream.write(json.dumps({"sample": sample} | held) + "\n")
                stream.flush()
                yield batch


def record(folder: Path, start: int) -> None:
    """In a fork: has the run's loader write what it gives out."""
    train_loader, rank = module("pretrain").train_loader, os.environ.get("RANK", "0")

    def recording(*arguments, **options):
        return Recorded(train_loader(*arguments, **options), folder.with_name(f"{folder.name}.order-{start}-{rank}"))

    module("pretrain").train_loader = recording


def use_float64() -> None:
    torch.set_default_dtype(torch.float64)


@dataclass
class Proof:
    folder: Path
    long: bool
    failed: list[str] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    samples: int = 0
    largest: dict[str, float] = field(default_factory=dict)  # relative differences by what differs

    def train(self, name: str, layouts: list[Layout], float64: bool, **settings) -> Run:
        """A run that changes its layout half-way if there are two of them."""
        settings = dict(tier="quickstart", overrides=overrides(CONDITIONED), watched=0) | settings
        settings |= dict(checkpoint_every=STEPS // 2, deterministic=True)  # four processes add up in the same order
        run = Run(self.folder / name, settings, prepare=use_float64 if float64 else lambda: None)
        self.runs.append(run)
        for number, layout in enumerate(layouts, start=1):
            run.processes = layout.processes
            own = dict(num_workers=layout.workers, per_device_batch_size=layout.images)
            limit = dict(max_steps=STEPS // 2) if number < len(layouts) else {}
            run.finish(lambda number=number: record(run.folder, number), **own | limit)
        return run

    def order(self, run: Run, layouts: list[Layout]) -> list[dict]:
        """All samples of a run, in the order of the global batches."""
        found = []
        for number, layout in enumerate(layouts, start=1):
            share, steps = BATCH // layout.processes, STEPS // len(layouts)
            ranks = [lines(self.folder, f"{run.folder.name}.order-{number}-{rank}") for rank in range(layout.processes)]
            assert all(len(rows) >= steps * share for rows in ranks), "a process has seen too few samples"
            for step in range(steps):
                for rows in ranks:
                    found += rows[step * share : (step + 1) * share]
        return found

    def compare(self, name: str, reference: Run, run: Run, layouts: list[Layout], limit: float) -> None:
        if self.order(run, layouts) != self.order(reference, [LAYOUTS[0]]):
            self.failed.append(f"{name}: other samples, timesteps, noise, crops or labels, or in another order")
        else:
            self.samples += STEPS * BATCH
        ours, theirs = (
            {line["step"]: line["loss"] for line in lines(one.folder) if "loss" in line} for one in (run, reference)
        )
        if list(ours) != list(theirs):
            self.failed.append(f"{name}: the log has other steps")
            return
        loss = max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in theirs)
        self.note(name, f"losses (limit {limit:g})", loss, limit)
        if limit == EXACT:
            self.note(name, f"weights (limit {limit:g})", self.weights(run, reference), limit)
        if read_manifest(run.folder / "processor") != read_manifest(reference.folder / "processor"):
            self.failed.append(f"{name}: another PCA basis")

    @staticmethod
    def weights(run: Run, reference: Run) -> float:
        """The largest difference of weights and AdamW's moments, relative to the largest value of their tensor."""
        largest = 0.0
        for file in ("model.safetensors", "training/optimizer.safetensors"):
            ours, theirs = (load_file(checkpoints(one.folder / "checkpoints")[-1] / file) for one in (run, reference))
            assert ours.keys() == theirs.keys()
            for name, value in theirs.items():
                if value.is_floating_point():
                    scale = value.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
                    largest = max(largest, ((ours[name] - value).abs().max() / scale).item())
        return largest

    def note(self, name: str, what: str, difference: float, limit: float) -> None:
        self.largest[what] = max(self.largest.get(what, 0.0), difference)
        if not difference <= limit:
            self.failed.append(f"{name}: {what.split()[0]} differs by {difference:.2g}, more than {limit:g}")

    def streams(self) -> int:
        """A stream goes on bit for bit on its layout, and on no other; the number of layouts refused."""
        images, folder = labelled_images(IMAGES), self.folder / "parquet"
        for shard in range(4):
            images.shard(4, shard, contiguous=True).to_parquet(folder / f"train-{shard:05d}-of-00004.parquet")
        load_images(folder)  # prepared once, not in every fork
        layout = Layout(2, 1, 4)
        stream = dict(dataset=str(folder), streaming=True, num_images=IMAGES)
        whole = self.train("stream", [layout], False, **stream)
        parts = self.train("stream-parts", [layout, layout], False, **stream)
        self.failed += [f"a stream, resumed: differs in {found}" for found in differences(whole.folder, parts.folder)]
        if self.order(whole, [layout]) != self.order(parts, [layout, layout]):
            self.failed.append("a stream gives other samples when it goes on")
        begun = self.train("stream-begun", [layout], False, **stream | dict(max_steps=2))
        refused = 0
        for other in (Layout(2, 2, 4), Layout(1, 1, 4), Layout(2, 1, 2)):
            begun.processes = other.processes
            start = begun.start(num_workers=other.workers, per_device_batch_size=other.images)
            codes, output = start.join(), start.output.read_text()
            if 0 in codes or "can only be resumed on the layout that saved it" not in output:
                self.failed.append(f"a stream is not refused on {other}: {codes}\n{start.end_of_output()}")
            refused += 0 not in codes
        return refused


def run(long: bool = False) -> dict:
    """Layouts in float64, in fp32 one of each number of processes (all if `long`); changes of layout; streams."""
    with tempfile.TemporaryDirectory() as folder:
        proof = Proof(Path(folder), long)
        images = labelled_images(IMAGES)
        for float64, layouts in (True, LAYOUTS), (False, LAYOUTS if long else LAYOUTS[::5]):
            kind, limit = ("float64", EXACT) if float64 else ("fp32", CLOSE)
            reference = proof.train(f"{kind}-reference", [LAYOUTS[0]], float64, dataset=images)
            for number, layout in enumerate(layouts[1:], start=1):
                other = proof.train(f"{kind}-{number}", [layout], float64, dataset=images)
                proof.compare(f"{kind}, {layout}", reference, other, [layout], limit)
                parts = [layout, layout]
                if float64 and (long or number % 4 == 3):  # on one layout
                    again = proof.train(f"{kind}-{number}-parts", parts, float64, dataset=images)
                    proof.failed += [
                        f"{layout}, resumed: differs in {found}" for found in differences(other.folder, again.folder)
                    ]
            if float64:
                for number, pair in enumerate(CHANGES):
                    other = proof.train(f"change-{number}", list(pair), float64, dataset=images)
                    proof.compare(f"{pair[0]}, then {pair[1]}", reference, other, list(pair), limit)
        refused = proof.streams()
        if left := orphans(proof.runs):
            proof.failed.append(f"{left} processes lived on for more than 10 seconds")
    return {
        "layouts": len(LAYOUTS),
        "changes": len(CHANGES),
        "samples": proof.samples,
        "differences": ", ".join(f"{what} by {value:.1e}" for what, value in proof.largest.items()),
        "refused": refused,
        "failed": proof.failed,
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--long", action="store_true")
    began = time.monotonic()
    found = run(**vars(parser.parse_args()))
    line = (
        "layouts: {layouts} of them and {changes} changes from one to another, {samples} samples in the same order; "
        "largest relative differences: {differences}; a stream refused {refused} of 3 other layouts"
    )
    return report(line, found, began)


if __name__ == "__main__":
    raise SystemExit(main())
