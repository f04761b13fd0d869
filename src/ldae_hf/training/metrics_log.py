"""`metrics.jsonl`: one JSON line per report, always written, beside whatever tracker is on."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from ..manifest import write_text


class MetricsLog:
    """Sums what happens between two reports and writes one line for it; the lines of a resumed run join up.

    Beside them `bad_images.jsonl` lists each image that could not be read and was replaced, once, with its reason.

    Args:
        folder: the run's folder. resume_at: lines of later steps, written by a run that then died, are dropped.
        settings: of the run by name, for the trackers.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, resume_at: int, settings: dict):
        self.accelerator = accelerator
        self.file, self.bad_file = folder / "metrics.jsonl", folder / "bad_images.jsonl"
        self.total_images, self.total_seconds = 0, 0.0
        lines, bad = read_lines(self.file), read_lines(self.bad_file)
        self.seen_bad, self.new_bad = {row["index"] for row in bad}, []
        lines = [line for line in lines if line["step"] <= resume_at]
        # What a step has computed says how fast it was; what an evaluation says has a line of its own.
        self.evaluated = {line["step"] for line in lines if "images_per_second" not in line}
        accelerator.wait_for_everyone()  # all have read before the first one writes
        if accelerator.is_main_process:
            for file, kept in (self.file, lines), (self.bad_file, bad):
                if file.exists():
                    write_text(file, "".join(f"{json.dumps(line)}\n" for line in kept))
        if accelerator.log_with:
            plain = {key: value if isinstance(value, (int, float)) else str(value) for key, value in settings.items()}
            accelerator.init_trackers("ldae", config=plain)
        self._reset()

    def _reset(self) -> None:
        self.sums, self.waited, self.seconds, self.images, self.steps = {}, 0.0, 0.0, 0, 0
        self.bad = []

    def bad_images(self, rows: list[dict]) -> None:
        """Images that could not be read, as the data loader describes them."""
        self.bad += rows

    def add(self, numbers: dict[str, torch.Tensor], waited: float, seconds: float, images: int) -> None:
        """One optimizer step: its numbers stay on the device until the next report."""
        for name, value in numbers.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + value, count + 1
        self.waited, self.seconds = self.waited + waited, self.seconds + seconds
        self.images, self.steps = self.images + images, self.steps + 1

    def summary(self, step: int, **facts) -> dict:
        """Means since the last report, over all processes: the steps' numbers, images/s and the share of the time that
        was spent waiting for data. All processes call it."""
        began = time.monotonic()
        means = {
            name: self.accelerator.reduce(torch.as_tensor(total), "mean").item() / count
            for name, (total, count) in self.sums.items()
        }
        self.seconds += time.monotonic() - began  # only here does the host wait until the device is done
        self.total_images += self.images
        self.total_seconds += self.seconds
        for row in gather_object(self.bad):
            if row["index"] not in self.seen_bad:
                self.seen_bad.add(row["index"])
                self.new_bad.append(row)
        line = {
            "step": step,
            **facts,
            **means,
            "images_per_second": self.images / self.seconds,
            "data_wait": self.waited / self.seconds,
            "bad_images": len(self.seen_bad),
            "time": time.time(),
        }
        self._reset()
        return line

    def write(self, line: dict) -> None:
        """Appends a line, and hands its numbers to the trackers."""
        self._append(self.bad_file, self.new_bad)
        self.new_bad = []
        self._append(self.file, [line])
        self._track(line)

    def has_evaluation(self, step: int) -> bool:
        """Whether the log has a line of an evaluation at this step."""
        return step in self.evaluated

    def write_evaluations(self, step: int, found: list[dict[str, float]]) -> None:
        """The numbers of a step's evaluations, a line for each, all of them or none. The main process calls it."""
        self.evaluated.add(step)
        lines = [{"step": step, **numbers, "time": time.time()} for numbers in found]
        self._append(self.file, lines)
        for line, numbers in zip(lines, found, strict=True):
            self._track(line)
            tqdm.write(f"step {step:,}: " + " · ".join(f"{key} {value:.4g}" for key, value in numbers.items()))

    def images_per_second(self) -> float | None:
        """Mean over this session's steps, None if there were none."""
        return self.total_images / self.total_seconds if self.total_seconds else None

    def _track(self, line: dict) -> None:
        self.accelerator.log({key: value for key, value in line.items() if key not in ("step", "time")}, line["step"])

    def _append(self, file: Path, lines: list[dict]) -> None:
        if lines and self.accelerator.is_main_process:
            with open(file, "a") as stream:  # in one piece, between whose lines no kill can come
                stream.write("".join(json.dumps(line) + "\n" for line in lines))


def read_lines(file: Path) -> list[dict]:
    """The objects of a JSON-lines file, [] if there is none; a last line that was torn when the disk was full or the
    power went is left out."""
    lines = file.read_text().splitlines() if file.exists() else []
    try:
        return [json.loads(line) for line in lines]
    except ValueError:
        return [json.loads(line) for line in lines[:-1]]
