"""Does what is missing of an experiment, one command after the other, each as a user would type it."""

import math
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from ..training.session import EXIT_CODE, SIGNALS
from .jobs import Job, Options


End = Literal["finished", "time", "signal"]


def run_jobs(
    jobs: Sequence[Job],
    options: Options,
    max_hours: float | None = None,
    say: Callable[[str], None] = print,
) -> End:
    """Runs the commands in their order. What was done stays done: run again, it goes on.

    A command that can stop is told how much time is left; no command begins after `max_hours`. A signal is passed on
    to the command, which saves what it has.

    Returns:
        "finished" if all of them are done; "time" or "signal" for what ended it before.

    Raises:
        ValueError: a command failed; its own words stand above.
    """
    began = time.monotonic()
    for number, job in enumerate(jobs, start=1):
        words, minutes = list(job.words), math.inf if max_hours is None else 60 * max_hours
        if max_hours is not None:
            left = minutes - (time.monotonic() - began) / 60
            if left <= 0:
                say(f"stopped after {max_hours:g} hours, before {job.title}; the same command goes on")
                return "time"
            if job.stops:
                words += ["--max-minutes", f"{math.ceil(10 * left) / 10:g}"]
        say(f"\n[{number}/{len(jobs)}] {job.title}\n$ {shlex.join(['ldae', *words])}")
        code, was_asked = _run([*_program(job, options), *words])
        if was_asked or code == EXIT_CODE:
            say(f"stopped in {job.title}; the same command goes on")
            return "signal"
        if code:
            how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
            raise ValueError(
                f"`{job.command}` ended with {how}; see what it says above. What was done before it is kept: mend it "
                "and run the same command again."
            )
        # Of a measurement that stops early only the time says so.
        is_over = job.stops and time.monotonic() - began >= 60 * minutes
        if not job.is_done() and (job.output is not None or is_over):
            say(f"the time is over in {job.title}; the same command goes on")
            return "time"
    return "finished"


def _program(job: Job, options: Options) -> list[str]:
    if job.on_all and options.processes > 1:
        launch = ["-m", "accelerate.commands.launch", "--num_processes", str(options.processes), "-m", "ldae_hf.cli"]
        return [sys.executable, *launch]
    script = Path(sys.executable).with_name("ldae")  # so that the command in the ledger is the one that was said
    return [str(script)] if os.access(script, os.X_OK) else [sys.executable, "-m", "ldae_hf.cli"]


def _run(command: list[str]) -> tuple[int, bool]:
    """Its exit code, and whether a signal asked for its end."""
    asked, process = [], None

    def pass_on(number: int, frame) -> None:
        asked.append(number)
        if process is not None:
            process.send_signal(number)

    # As in a training: a SIGHUP that is ignored is nohup's.
    caught = [one for one in SIGNALS if one != signal.SIGHUP or signal.getsignal(one) == signal.SIG_DFL]
    before = {number: signal.signal(number, pass_on) for number in caught}
    try:
        process = subprocess.Popen(command)
        for number in asked:  # while it was being started
            process.send_signal(number)
        return process.wait(), bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
