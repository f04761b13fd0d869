"""The workers of a data loader outlive a signal to the whole job, and not their parent."""

import os
import signal
import subprocess
import time

import pytest
from forked_runs import Child
from torch.utils.data import DataLoader

from ldae_hf.training.workers import shield_from_signals


def alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until(condition) -> bool:
    for _ in range(200):
        if condition():
            return True
        time.sleep(0.05)
    return False


def loader_with_one_worker():
    iterator = iter(DataLoader(range(100), num_workers=1, worker_init_fn=shield_from_signals))
    next(iterator)
    return iterator, iterator._workers[0].pid


@pytest.mark.parametrize("name", ["TERM", "INT", "USR1", "HUP"])
def test_a_worker_outlives_a_signal_from_another_process_than_its_parent(name):
    def run():
        iterator, worker = loader_with_one_worker()
        subprocess.run(["kill", f"-{name}", str(worker)], check=True)
        time.sleep(0.3)
        return alive(worker) and len(list(iterator)) == 99

    assert Child(run).join()


def test_a_worker_ends_when_its_parent_says_so():
    def run():
        iterator, worker = loader_with_one_worker()
        iterator._workers[0].terminate()
        return wait_until(lambda: not alive(worker))

    assert Child(run).join()


def test_a_worker_does_not_outlive_a_killed_parent(tmp_path):
    def run():
        iterator, worker = loader_with_one_worker()
        (tmp_path / "worker").write_text(str(worker))
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError):
        Child(run).join()
    worker = int((tmp_path / "worker").read_text())
    assert wait_until(lambda: not alive(worker))
