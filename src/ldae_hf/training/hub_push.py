"""Pushing a run to the Hub while it trains, in a process of its own: whatever happens there, the training goes on."""

import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from huggingface_hub import constants

from ..hub import check_repo_id, write_token
from .session import Session


LOG = "push.log"
# What a launcher tells its processes: the pushing one is none of them, and has no business on a GPU.
_LAUNCHER = ("ACCELERATE_", "FSDP_", "LOCAL_", "MASTER_", "GROUP_", "ROLE_", "TORCHELASTIC_", "RANK", "WORLD_SIZE")
POLITE = 10  # added to the niceness
GRACE = 5  # seconds between asking the process to end and ending it


class BackgroundPush:
    """`ldae push RUN REPO`, begun after each checkpoint unless the one before is still under way.

    What it prints goes to `push.log` in the run's folder. One that was broken off is gone on with by the next.

    Args:
        folder: of the run. repo_id: `owner/name`, or None for no push. private: of a repository that is made.
        pictures: with the newest picture of the run, which shows images of the data set.
        session: of the run; in all but the main process nothing is pushed.

    Raises:
        ValueError: the name is none, there is no token, or the Hub is not to be asked: before anything is trained.
    """

    def __init__(self, folder: Path, repo_id: str | None, private: bool, pictures: bool, session: Session):
        if repo_id is not None:
            check_repo_id(repo_id)
            if "/" not in repo_id:
                raise ValueError(f"{repo_id!r} names no owner; write OWNER/NAME.")
            offline = os.environ.get("HF_HUB_OFFLINE") or os.environ.get("TRANSFORMERS_OFFLINE", "")
            if offline.upper() in constants.ENV_VARS_TRUE_VALUES:  # as the pushing process will read it
                raise ValueError(
                    f"Nothing can be pushed to {repo_id} while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset "
                    "it, or train without a push; `ldae push` does it later."
                )
            session.on_main(lambda: write_token(None, repo_id))
        self.folder, self.repo_id, self.session = folder, repo_id, session
        options = ["--private"] * private + ["--no-pictures"] * (not pictures)
        # The path in full: a name that begins with "-" would be an option.
        words = ["push", *options, str(folder.absolute()), str(repo_id)]
        # -P: else a random.py in the working directory would be imported in the place of Python's.
        self.command = [sys.executable, "-P", "-m", "ldae_hf.cli", *words]
        self.by_hand = shlex.join(["ldae", *words])
        self.active = repo_id is not None and session.accelerator.is_main_process
        self._process: subprocess.Popen | None = None
        session.at_exit(self.stop)

    def begin(self) -> None:
        """Starts a push and returns; never raises, since a training goes on without it."""
        if not self.active or (self._process is not None and self._process.poll() is None):
            return
        if self._process is not None and self._process.returncode:
            self._print(f"warning: a push to {self.repo_id} failed: {self.last_words()}")
        self._process = None  # the code of an earlier one says nothing of this
        environment = {name: value for name, value in os.environ.items() if not name.startswith(_LAUNCHER)}
        environment |= {"CUDA_VISIBLE_DEVICES": ""}
        try:
            with open(self.folder / LOG, "ab") as log:
                self._process = subprocess.Popen(
                    self.command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # a Ctrl-C is for the training, which ends this itself
                )
            os.setpriority(os.PRIO_PROCESS, self._process.pid, POLITE)
        except OSError as error:
            self._print(f"warning: no push to {self.repo_id}: {error}")

    def finish(self) -> None:
        """Pushes the run as it is now, and waits for that; a signal ends it."""
        if not self.active:
            return
        self._wait()  # for one that may have begun before the last checkpoint
        self.begin()
        if self._process is None:
            return
        again = f"the same command, or {self.by_hand}, goes on with it"
        self._print(f"pushing to {self.repo_id} ({self.folder / LOG}); after a Ctrl-C {again}")
        code = self._wait()
        if code == 0:
            self._print(f"pushed to {self.repo_id}")
        elif self.session.signals.number:
            self._print(f"not pushed to the end; {again}")
        else:
            self._print(f"warning: the push to {self.repo_id} failed: {self.last_words()}\nNothing is lost; {again}.")

    def stop(self) -> None:
        """Ends a push that is under way; the next one goes on with it."""
        if self._process is not None and self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(GRACE)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def last_words(self) -> str:
        """The last line of the log."""
        try:
            lines = (self.folder / LOG).read_text(errors="replace").split("\n")
        except OSError as error:
            return f"its log cannot be read ({error})"
        return next((line for line in reversed(lines) if line.strip()), "it said nothing")

    def _print(self, text: str) -> None:
        self.session.accelerator.print(text)

    def _wait(self) -> int | None:
        while self._process is not None and self._process.poll() is None:
            if self.session.signals.number:
                self.stop()
            time.sleep(0.1)
        return self._process.returncode if self._process is not None else None
