"""One start of a run: its processes, its lock, and what ends it early.

A signal is only noted where it comes; at the next step boundary the processes agree that there was one, save and leave
together. Only what can be broken off without loss (an evaluation, the preparation of a data set) is broken off at once.
"""

import fcntl
import json
import os
import signal
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.distributed import ReduceOp, all_reduce, new_group

from .checkpointing import checkpoints
from .circumstances import circumstances
from .output import unminding_output


EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command again goes on
# SIGUSR1: what SLURM's --signal is mostly told to send. SIGHUP: a terminal that is closed.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
PATIENCE = 5  # seconds, after which another Ctrl-C is meant as it is; launchers pass on the first one twice
# The other processes wait while the main one evaluates, saves or trains the network of a perceptual loss.
TIMEOUT = timedelta(hours=2)

Result = TypeVar("Result")


class RunError(ValueError):
    """A run that cannot start or go on; the message says why and what to do."""


class Interrupted(SystemExit):
    """A signal ended the run, and all that it had done is saved; the exit code is 75."""

    def __init__(self, number: int):
        super().__init__(EXIT_CODE)
        self.number, self.signal = number, signal.Signals(number).name

    def __reduce__(self):  # else a copy would be made of the exit code
        return Interrupted, (self.number,)


@dataclass
class Signals:
    """The first signal that came, 0 if none has."""

    number: int = 0
    came: float = 0.0
    breakable: bool = False
    process: int = field(default_factory=os.getpid)

    def __call__(self, number: int, frame) -> None:
        if os.getpid() != self.process:
            return  # a data loader's worker, which got it from the terminal too: the main process decides
        if number == signal.SIGINT and self.number and time.monotonic() - self.came > PATIENCE:
            raise KeyboardInterrupt
        if not self.number:
            self.number, self.came = number, time.monotonic()
            # Not `print`, which the signal may have interrupted.
            with suppress(OSError):  # as when whoever read it got the signal too
                os.write(2, f"\n{signal.Signals(number).name}: the run stops as soon as all is saved\n".encode())
        if self.breakable:
            self.breakable = False
            raise Interrupted(self.number)

    @contextmanager
    def breaking_off(self) -> Iterator[None]:
        """Within it a signal raises Interrupted at once, also one that came before."""
        self.breakable = True  # first: a signal that comes now must not only be noted
        try:
            if self.number:
                raise Interrupted(self.number)
            yield
        finally:
            self.breakable = False


@dataclass
class Session:
    """A context: signals are caught within it, and its end is written to `sessions.jsonl`, with the reason.

    Attributes:
        accelerator: accelerate's view of the machine. folder: of the run.
        signals: given by the session around this one, if there is one.
    """

    accelerator: Accelerator
    folder: Path
    signals: Signals | None = None
    step: int = 0
    stopped_by_limit: bool = False

    def __post_init__(self):
        self._is_outermost = self.signals is None
        self.signals = self.signals or Signals()
        # Votes are exchanged between the hosts, so that no device has to wait for one.
        several = self.accelerator.num_processes > 1
        self._votes = new_group(backend="gloo", timeout=TIMEOUT) if several else None
        self._lock, self._begun = None, False

    def __enter__(self) -> "Session":
        self._within = ExitStack()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                if number != signal.SIGHUP or signal.getsignal(number) == signal.SIG_DFL:  # else it is nohup's
                    self._within.callback(signal.signal, number, signal.signal(number, self.signals))
        self._within.enter_context(unminding_output())
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._begun:
            ended = "limit" if self.stopped_by_limit else "finished"
            reason = ended if error is None else getattr(error, "signal", "error")
            detail = "" if error is None or isinstance(error, Interrupted) else f"{kind.__name__}: {error}"
            self.note({"event": "end", "time": time.time(), "step": self.step, "reason": reason, "detail": detail})
        if self._lock is not None:
            os.close(self._lock)
        # DDP goes before its process group: if it held the last reference, the group would end its threads while the
        # interpreter is locked, and now and then wait for one of them for ever.
        traceback.clear_frames(trace)
        self.accelerator.free_memory()
        if self._is_outermost and (error is None or isinstance(error, Interrupted)):
            self.accelerator.end_training()  # after another error other processes may not be there to end it with
        self._within.close()  # last: a launcher may send its signal once more

    def at_exit(self, callback: Callable[[], None]) -> None:
        """Has it called when the session ends, however it does."""
        self._within.callback(callback)

    # ---- the run's folder

    def own(self) -> None:
        """Makes the folder and locks it, until this process ends however it may end.

        Raises:
            RunError: another run lives in it.
        """

        def lock() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.folder / "run.lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, no worker inherits it
            except OSError as error:
                owner = os.read(descriptor, 200).decode(errors="replace").strip()
                os.close(descriptor)
                raise RunError(
                    f"{self.folder} is in use by another run ({owner}); wait until it ends, stop it, or choose "
                    "another --output-dir."
                ) from error
            os.ftruncate(descriptor, 0)
            os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}".encode())
            self._lock = descriptor

        self.on_main(lock)

    def begin(self, **facts) -> None:
        """Notes in `sessions.jsonl` that the run is taken up, from which step, with which code and where."""
        found = checkpoints(self.folder / "checkpoints")
        self.step, self._begun = int(found[-1].name.partition("-")[2]) if found else 0, True
        if self.accelerator.is_main_process:
            layout = {name: getattr(self.accelerator, name) for name in ("num_processes", "mixed_precision")}
            self.note({"event": "start", **circumstances(), "time": time.time(), "step": self.step, **layout, **facts})

    def note(self, event: dict) -> None:
        """Appends a line to `sessions.jsonl`; a full disk does not hide what is being noted."""
        if self.accelerator.is_main_process:
            try:
                with open(self.folder / "sessions.jsonl", "a+b") as stream:
                    stream.seek(max(0, stream.tell() - 1))
                    torn = stream.read() not in (b"", b"\n")  # by a full disk: it stays a line of its own
                    stream.write((torn * "\n" + json.dumps(event) + "\n").encode())
            except OSError as error:
                self.accelerator.print(f"sessions.jsonl: {error}")

    # ---- what processes agree on

    def agree(self, *votes: int) -> list[int]:
        """The largest vote of all processes on each question; all of them call it."""
        if self._votes is None:
            return [int(vote) for vote in votes]
        ballot = torch.tensor(votes, dtype=torch.int64)
        all_reduce(ballot, ReduceOp.MAX, group=self._votes)
        return ballot.tolist()

    def together(self, work: Callable[[], Result], at_once: bool = False) -> Result:
        """What `work` returns, called in every process; what it raises in one ends all.

        Args:
            at_once: nothing is lost if it is broken off: a signal does so.

        Raises:
            RunError: it failed in another process. Interrupted: it was broken off in one.
        """
        result, error = None, None
        try:
            with self.signals.breaking_off() if at_once else nullcontext():
                result = work()
        except BaseException as raised:
            error = raised
        by_signal = self.signals.number if isinstance(error, Interrupted) else 0
        failed, number = self.agree(error is not None and not by_signal, by_signal)
        if error is not None:
            raise error
        if failed:
            raise RunError("Another process of this run has failed; its message says why.")
        if number:
            raise Interrupted(number)
        return result

    def on_main(self, work: Callable[[], None], at_once: bool = False) -> None:
        """As `together`, with the others waiting for the main process."""
        self.together(work if self.accelerator.is_main_process else lambda: None, at_once)

    def leave_if_asked(self) -> None:
        """Where nothing is lost: raises Interrupted in all processes if a signal came in one."""
        if number := self.agree(self.signals.number)[0]:
            raise Interrupted(number)


def make_accelerator(output_dir: Path, mixed_precision: str, report_to, deterministic: bool = False) -> Accelerator:
    """Accelerate's view of the machine.

    Args:
        deterministic: the same bits from the same machine, on a GPU too, where some kernels are slower then.

    Raises:
        RunError: a tracker is not installed, or `accelerate config` asks for a way of training that this is not.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
        torch.use_deterministic_algorithms(True)
    accelerator = Accelerator(
        mixed_precision=mixed_precision,
        log_with=list(report_to) or None,
        project_dir=output_dir,
        # Accumulation is ours: the one that `accelerate config` may have set would divide the loss once more.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            InitProcessGroupKwargs(timeout=TIMEOUT),
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # else each gradient is there twice
        ],
    )
    kind = accelerator.distributed_type
    sharded_otherwise = kind == DistributedType.FSDP and not accelerator.is_fsdp2
    if sharded_otherwise or kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise RunError(f"accelerate is configured for {kind.value}; use DDP, or FSDP with fsdp_version: 2.")
    if missing := {*report_to} - {"all", *map(str, accelerator.log_with)}:
        raise RunError(f"The tracker {', '.join(sorted(missing))} is not installed.")
    return accelerator
