"""What a data loader's worker does about signals: nothing, for the main process decides when a run ends."""

import os
import signal
import threading


def shield_from_signals(worker: int) -> None:
    """A worker's start: what is sent to the whole job (Ctrl-C, a scheduler's SIGTERM) does not end it, only its parent.

    Else a worker that is gone would take the run down with it, before the run could save.
    """
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
