"""The command that gives a result again, with nothing left to a default, and whether it does.

A ledger is data that may come from anywhere: of what it holds only the evaluation commands of `ldae` are run, their
words never pass through a shell, and what they would write goes to a folder of this module's choice.
"""

import math
import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .ledger import read_ledger
from .protocols import FILES, flat


EVALUATIONS = (
    "probe",
    "full-probe",
    "knn",
    "few-shot",
    "attentive-probe",
    "finetune",
    "segment",
    "retrieve",
    "sweep depth",
    "sweep timesteps",
    "sweep layers",
    "fid",
    "tokenizer evaluate",
)
# Commands that go on with what such a folder holds: measured again they begin with a new one.
FOLDERS = {"full-probe": "--output-dir", "finetune": "--output-dir", "fid": "--samples-dir"}
WRITTEN = (
    "--output",
    "--ledger",
    "--output-dir",
    "--samples-dir",
    "--cache-dir",
    "--figure",
    "--picture",
    "--report-to",
)
TOLERANCE = 0.01  # relative, on another machine: other kernels round otherwise, and a few images change sides
# Of the process and not of what it measured.
CIRCUMSTANCES = {"time", "command", "rerun", "commit", "machine", "versions", "training", "name"}
SPEEDS = {"seconds", "images_per_second"}


def rerun_command(command: str, options: Mapping[str, object], arguments: Sequence[object] = ()) -> str | None:
    """The shell command of one evaluation with every option spelled out, for the `rerun` of its row.

    Args:
        command: of `ldae`, without it: `"probe"`, `"sweep depth"`.
        options: by the long name of each, with hyphens or underscores (`num_workers` is --num-workers): a list is the
            option repeated, True a bare flag; None, False and an empty list are left out, so a default that stands for
            something is to be given as what it stands for. What says where the result goes is left out by the caller.
        arguments: the command's positional arguments, such as the encoder as the user named it.

    Returns:
        The command; None if an argument or a value is an object in memory (a loaded model), which no command can name.
    """
    words = ["ldae", *command.split(), *arguments]
    for name, value in options.items():
        values = value if isinstance(value, list | tuple) else [value]
        flag = f"--{name.replace('_', '-')}"
        for one in values:
            if one is True:
                words.append(flag)
            elif one is not None and one is not False:
                words += [flag, one]
    if not all(isinstance(word, str | Path | int | float) for word in words):
        return None
    return shlex.join(map(str, words))


@dataclass
class Rerun:
    """A row measured again: its `command`, the new `row`, what `differs`, and `notes` that are no difference."""

    command: str
    row: dict
    differs: list[str]
    notes: list[str]


def stored_command(row: dict) -> tuple[str, bool]:
    """The command that gives a row again, and whether it is the row's `rerun`; else it is the `command` as it was
    typed, whose defaults are today's.

    Raises:
        ValueError: the row has neither.
    """
    for key in ("rerun", "command"):
        if isinstance(row.get(key), str) and row[key].strip():
            return row[key], key == "rerun"
    raise ValueError("The row holds no command; it was not measured by a command of ldae.")


def evaluation_words(command: str) -> tuple[str, list[str]]:
    """Which evaluation command of `ldae` it is, and its other words without the options that say where to write.

    Raises:
        ValueError: it is another program, or another command.
    """
    program, *words = shlex.split(command) or [""]
    name = next((name for name in EVALUATIONS if words[: len(name.split())] == name.split()), None)
    if program != "ldae" or name is None:
        raise ValueError(
            f"`{command}` is not run: only ldae's commands that evaluate are ({', '.join(EVALUATIONS)}). If you trust "
            "it, run it yourself."
        )
    kept, skip = [], False
    for word in words[len(name.split()) :]:
        flag, equals, _ = word.partition("=")
        if flag in WRITTEN:
            skip = not equals
        elif skip:
            skip = False
        else:
            kept.append(word)
    return name, kept


def rerun(row: dict, tolerance: float | None = None) -> Rerun:
    """Measures a row again in a process of its own, by its stored command, and compares encoder, protocol and numbers.

    The command runs in the current folder, which its paths must fit; what it writes is thrown away but for the row.

    Args:
        row: of a ledger. tolerance: relative, of every number; default 0 on the same machine and versions of the same
            packages, else `TOLERANCE`.

    Raises:
        ValueError: the command is not one that is run, it failed, or it gave no row of this task.
    """
    command, is_whole = stored_command(row)
    name, words = evaluation_words(command)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Path(folder, "ledger.jsonl")
        written = ["--ledger", str(ledger)]
        if name in FOLDERS:
            written += [FOLDERS[name], str(Path(folder, "run"))]
        call = [sys.executable, "-m", "ldae_hf.cli", *name.split(), *written, *words]
        # Features of another process would be a part of the old result.
        done = subprocess.run(call, env=os.environ | {"LDAE_FEATURE_CACHE": str(Path(folder, "features"))})
        rows = [found for found in read_ledger(ledger) if found.get("task") == row["task"]]
    if done.returncode or not rows:
        reason = f"ended with exit code {done.returncode}" if done.returncode else f"gave no row of {row['task']}"
        raise ValueError(f"`{command}` {reason}, run in {Path.cwd()}; look at what it says above.")
    new = min(rows, key=lambda found: len(differing(row, found, 0)[0]))  # a sweep gives several
    same_place = all(row.get(key) == new[key] for key in ("machine", "versions"))
    if tolerance is None:
        tolerance = 0 if same_place else TOLERANCE
    differs, notes = differing(row, new, tolerance)
    place = "the same machine and versions" if same_place else "another machine or other versions"
    notes.insert(0, f"numbers must be {'equal' if not tolerance else f'equal to {tolerance:.2g} of each'}; {place}")
    if not is_whole:
        notes.insert(0, "an old row without `rerun`: its command as it was typed, with today's defaults")
    return Rerun(command, new, differs, notes)


def differing(row: dict, new: dict, tolerance: float) -> tuple[list[str], list[str]]:
    """Sentences on what a new row has otherwise than the old one, and on what the old one did not record.

    Circumstances and speeds do not count, numbers of the protocol must be equal.
    """
    before, after = (_measured(one) for one in (row, new))
    differs, notes = [], []
    for key in [*before, *(key for key in after if key not in before)]:
        old, now = before.get(key), after.get(key)
        is_number = not key.startswith("protocol.") and all(isinstance(value, int | float) for value in (old, now))
        if old == now or is_number and math.isclose(old, now, rel_tol=tolerance):
            continue
        if key not in before:
            notes.append(f"{key} was not recorded; it is {now!r}")
        elif key.removeprefix("protocol.") in FILES:
            notes.append(f"{key}: {old!r} before, {now!r} now; the images were read from other files")
        else:
            differs.append(f"{key}: {old!r} before, {'nothing' if key not in after else repr(now)} now")
    return differs, notes


def _measured(row: dict) -> dict:
    """What counts of a row, by dotted names; an entry of a list is named by its place."""
    values = flat(_places({key: value for key, value in row.items() if key not in CIRCUMSTANCES}))
    return {key: value for key, value in values.items() if key.rpartition(".")[2] not in SPEEDS}


def _places(value):
    if isinstance(value, list):
        value = dict(enumerate(value))
    return {str(key): _places(one) for key, one in value.items()} if isinstance(value, dict) else value
