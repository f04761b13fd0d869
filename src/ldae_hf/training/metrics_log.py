"""`metrics.jsonl`: one JSON line per report, always written, beside whatever tracker is on."""

import json
import time
from pathlib import Path

import torch
from accelerate import Accelerator


class MetricsLog:
    """Sums what happens between two reports and writes one line for it; the lines of a resumed run join up.

    Args:
        folder: the run's folder. resume_at: lines of later steps, written by a run that then died, are dropped.
    """

    def __init__(self, folder: Path, accelerator: Accelerator, resume_at: int):
        self.accelerator = accelerator
        self.file, self.bad_file = folder / "metrics.jsonl", folder / "bad_images.jsonl"
        self.seen_bad = set()
        self.total_images, self.total_seconds = 0, 0.0
        if accelerator.is_main_process:
            lines = self.file.read_text().splitlines() if self.file.exists() else []
            kept = [line for line in lines if json.loads(line)["step"] <= resume_at]
            self.file.write_text("".join(f"{line}\n" for line in kept))
            if self.bad_file.exists():
                self.seen_bad = {json.loads(line)["index"] for line in self.bad_file.read_text().splitlines()}
        if accelerator.log_with:
            accelerator.init_trackers("ldae")
        self._reset()

    def _reset(self) -> None:
        self.loss, self.norm, self.waited, self.seconds, self.images, self.steps = 0.0, 0.0, 0.0, 0.0, 0, 0

    def add(self, loss: torch.Tensor, norm: torch.Tensor, waited: float, seconds: float, images: int) -> None:
        """One optimizer step: loss and gradient norm stay on the device until the next report."""
        self.loss, self.norm = self.loss + loss, self.norm + norm
        self.waited, self.seconds = self.waited + waited, self.seconds + seconds
        self.images, self.steps = self.images + images, self.steps + 1

    def write(self, step: int, **facts) -> dict:
        """Means since the last report, over all processes, as one line; returned too."""
        loss, norm = torch.as_tensor(self.loss), torch.as_tensor(self.norm)
        loss = self.accelerator.reduce(loss, "mean").item() / self.steps
        self.total_images += self.images
        self.total_seconds += self.seconds
        line = {
            "step": step,
            **facts,
            "loss": loss,
            "gradient_norm": norm.item() / self.steps,
            "images_per_second": self.images / self.seconds,
            "data_wait": self.waited / self.seconds,
            "time": time.time(),
        }
        self._reset()
        self._append(self.file, line)
        self.accelerator.log({key: value for key, value in line.items() if key not in ("step", "time")}, step=step)
        return line

    def write_evaluation(self, step: int, numbers: dict[str, float]) -> None:
        """Numbers of an evaluation, as a line of their own."""
        self._append(self.file, {"step": step, **numbers, "time": time.time()})
        self.accelerator.log(numbers, step=step)
        self.accelerator.print(f"step {step:,}: " + " · ".join(f"{key} {value:.4g}" for key, value in numbers.items()))

    def bad_images(self, rows: list[dict]) -> None:
        """Images that could not be read and were replaced: each is listed once, with its reason."""
        for row in rows:
            if row["index"] not in self.seen_bad:
                self.seen_bad.add(row["index"])
                with open(self.bad_file, "a") as stream:
                    stream.write(json.dumps(row) + "\n")

    def images_per_second(self) -> float | None:
        """Mean over this session's steps, None if there were none."""
        return self.total_images / self.total_seconds if self.total_seconds else None

    def close(self) -> None:
        """Ends the trackers."""
        if self.accelerator.log_with:
            self.accelerator.end_training()

    def _append(self, file: Path, line: dict) -> None:
        if self.accelerator.is_main_process:
            with open(file, "a") as stream:
                stream.write(json.dumps(line) + "\n")
