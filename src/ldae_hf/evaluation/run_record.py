"""What a run's folder tells of a run: read as it stands, while it may be written to, and whatever version wrote it."""

import json
import math
import re
import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median


PATIENCE = 900  # seconds without a line, at least, until a run that has noted no end counts as dead
RECENT = 20  # lines of the log that tell how fast a run is now


@dataclass
class Session:
    """A start of the run and its end, as `sessions.jsonl` has them; a process that was killed has noted no end."""

    start: dict
    end: dict | None = None


@dataclass
class Status:
    """`word` is one of running, finished, stopped, failed, silent; `sentence` says it to people."""

    word: str
    sentence: str


@dataclass
class RunRecord:
    """A run, as far as its folder tells.

    Attributes:
        run: `run.json`, {} if it cannot be read. metrics: lines with a step, in its order.
        sessions, bad_images: in the order in which they were noted. failures: the `replay.json` of each, with its
        `folder`. pictures: files by step. checkpoints: (name, bytes, time of change), the damaged ones too.
        torn: lines by file that are no JSON objects. now: seconds since 1970, against which the age of lines is taken.
    """

    folder: Path
    run: dict = field(default_factory=dict)
    metrics: list[dict] = field(default_factory=list)
    sessions: list[Session] = field(default_factory=list)
    bad_images: list[dict] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    pictures: dict[int, Path] = field(default_factory=dict)
    checkpoints: list[tuple[str, int, float]] = field(default_factory=list)
    torn: dict[str, int] = field(default_factory=dict)
    now: float = 0.0

    @property
    def recipe(self) -> dict:
        recipe = self.run.get("recipe")
        return recipe if isinstance(recipe, dict) else {}

    @cached_property
    def trains_tokenizer(self) -> bool:
        """Only the training of a tokenizer reports a reconstruction."""
        return any("reconstruction" in line for line in self.metrics)

    @cached_property
    def reports(self) -> list[dict]:
        """The lines of training; the others are of evaluations."""
        return [line for line in self.metrics if "learning_rate" in line]

    @cached_property
    def step(self) -> int:
        """The last one that the folder knows of."""
        events = [event for session in self.sessions for event in (session.start, session.end or {})]
        return max((int(number(line.get("step")) or 0) for line in (*self.metrics[-1:], *events)), default=0)

    @cached_property
    def steps_per_epoch(self) -> float | None:
        steps = [line["step"] / epoch for line in self.reports[-1:] if (epoch := number(line.get("epoch")))]
        return steps[0] if steps and steps[0] > 0 else None

    @cached_property
    def total_steps(self) -> int | None:
        """Of the whole run; None if nothing says it."""
        for session in reversed(self.sessions):
            if total := number(session.start.get("total_steps")):
                return int(total)
        section = self.recipe.get("tokenizer" if self.trains_tokenizer else "train")
        epochs = number(section.get("epochs")) if isinstance(section, dict) else None
        return round(epochs * self.steps_per_epoch) if epochs and self.steps_per_epoch else None

    @property
    def last_sign(self) -> float | None:
        """When the run last wrote a line, in seconds since 1970."""
        events = [event for session in self.sessions for event in (session.start, session.end or {})]
        times = [number(line.get("time")) for line in (*self.metrics, *events)]
        return max((at for at in times if at is not None), default=None)

    @property
    def seconds_per_step(self) -> float | None:
        """Of late, in the last session, with all that comes between steps."""
        began = number(self.sessions[-1].start.get("time")) if self.sessions else None
        points = [(line["step"], at) for line in self.reports if (at := number(line.get("time"))) is not None]
        points = [point for point in points if began is None or point[1] >= began][-RECENT:]
        if len(points) < 2 or points[-1][0] <= points[0][0] or points[-1][1] <= points[0][1]:
            return None
        return (points[-1][1] - points[0][1]) / (points[-1][0] - points[0][0])

    def status(self) -> Status:
        """Whether the run is alive, finished or failed, from what it noted and how long it has been silent."""
        end = self.sessions[-1].end if self.sessions else None
        total, where = self.total_steps, f"at step {self.step:,}"
        if end is not None:
            reason, detail = str(end.get("reason")), str(end.get("detail") or "")
            if reason == "finished":
                return Status("finished", f"Finished {where}.")
            if reason == "error":
                return Status("failed", f"Failed {where}: {detail or 'it does not say why'}")
            why = "the limit that it was given" if reason == "limit" else reason
            return Status("stopped", f"Stopped {where} by {why}; the same command goes on from there.")
        if total is not None and self.step >= total:
            return Status("finished", f"Finished {where}.")
        silent = math.inf if self.last_sign is None else self.now - self.last_sign
        times = [at for line in self.metrics if (at := number(line.get("time"))) is not None][-RECENT:]
        gaps = [after - before for before, after in zip(times, times[1:], strict=False)]
        if silent <= max(PATIENCE, 3 * max(gaps, default=0)):
            return Status("running", f"Running {where}.")
        return Status(
            "silent",
            f"Silent since step {self.step:,}, and it has noted no end: it was killed, its machine died, or it hangs. "
            "If no process is left, the same command goes on from the last checkpoint.",
        )

    def recent(self, name: str) -> float | None:
        """The median of a number over the last lines of training."""
        values = [value for line in self.reports[-RECENT:] if (value := number(line.get(name))) is not None]
        return median(values) if values else None

    def trained_seconds(self) -> float | None:
        """From the start of each session to its end, or to its last line."""
        times = [at for line in self.metrics if (at := number(line.get("time"))) is not None]
        if not self.sessions:
            return times[-1] - times[0] if times else None
        starts = [number(session.start.get("time")) for session in self.sessions]
        total = 0.0
        for session, began, after in zip(self.sessions, starts, [*starts[1:], math.inf], strict=True):
            ended = number((session.end or {}).get("time"))
            if began is not None and ended is None:
                ended = max((at for at in times if began <= at < (after or math.inf)), default=began)
            total += max(0.0, ended - began) if began is not None else 0.0
        return total


def number(value) -> float | None:
    """A finite number of JSON as a float; None for everything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:  # JSON's integers have no limit
        return None
    return value if math.isfinite(value) and abs(value) < 1e100 else None


def read_run(folder: str | Path) -> RunRecord:
    """Reads a run's folder, of a pre-training or of a tokenizer's training.

    Raises:
        ValueError: there is no such folder, or no run in it that has reported anything yet.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder}; give the --output-dir of a training.")
    record = RunRecord(folder, run=_object(folder / "run.json") or {}, now=time.time())
    metrics = [line for line in _lines(record, "metrics.jsonl") if number(line.get("step")) is not None]
    record.metrics = sorted(metrics, key=lambda line: line["step"])
    for event in _lines(record, "sessions.jsonl"):
        if event.get("event") == "start":
            record.sessions.append(Session(event))
        elif event.get("event") == "end":
            if not record.sessions or record.sessions[-1].end is not None:
                record.sessions.append(Session({}))  # its start was torn
            record.sessions[-1].end = event
    if not record.metrics and not record.sessions:
        before = "tokenizer-training"
        hint = f"; its tokenizer comes first: ldae report {folder / before}" if (folder / before).is_dir() else ""
        raise ValueError(f"{folder} holds no run that has reported a step yet (metrics.jsonl, sessions.jsonl){hint}.")
    record.bad_images = _lines(record, "bad_images.jsonl")
    for file in sorted(folder.glob("failures/*/replay.json")):
        record.failures.append((_object(file) or {}) | {"folder": file.parent})
    for name in ("pictures", "reconstructions"):
        found = {int(match[1]): file for file in folder.glob(f"{name}/*.png") if (match := _step_of(file.stem))}
        record.pictures |= dict(sorted(found.items()))
    for checkpoint in sorted(folder.glob("checkpoints/step-*")):
        try:
            files = [file.stat() for file in checkpoint.rglob("*") if file.is_file()]
        except OSError:  # rotated away while it was being looked at
            continue
        newest = max((file.st_mtime for file in files), default=0.0)
        record.checkpoints.append((checkpoint.name, sum(file.st_size for file in files), newest))
    return record


def _step_of(name: str) -> re.Match | None:
    return re.fullmatch(r"step-(\d{1,15})", name)


def _object(file: Path) -> dict | None:
    """The object in a JSON file, None if there is none or it cannot be read."""
    try:
        value = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _lines(record: RunRecord, name: str) -> list[dict]:
    """The objects of a JSON-lines file; what else there is, as a line that is being written, is counted."""
    try:
        lines = (record.folder / name).read_bytes().splitlines()
    except FileNotFoundError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            rows.append(row)
        elif line.strip():
            record.torn[name] = record.torn.get(name, 0) + 1
    return rows
