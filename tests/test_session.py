"""Signals, the lock of a run's folder, and what processes agree on."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked_runs import Child, dataset_of, encoded, in_processes, lines
from test_pretrain import NUM_IMAGES, assert_same_run, train

from ldae_hf.training import EXIT_CODE, Interrupted, RunError, checkpoints
from ldae_hf.training.session import Session, make_accelerator


@pytest.fixture(scope="module")
def images():
    return dataset_of([encoded(number) for number in range(NUM_IMAGES)])


@pytest.fixture(scope="module")
def evaluated(images, tmp_path_factory) -> Path:
    """A finished run of ten steps with evaluations at 4, 8 and 10."""
    folder = tmp_path_factory.mktemp("evaluated")
    train(folder, images, evaluations=[drawn], evaluate_every=4)
    return folder


def drawn(model, processor) -> dict[str, float]:
    """An evaluation that draws from torch's generator."""
    return {"drawn": torch.rand(()).item()}


def sessions(folder: Path) -> list[tuple]:
    return [(line["event"], line["step"], line.get("reason")) for line in lines(folder, "sessions.jsonl")]


def session(folder: Path) -> Session:
    return Session(make_accelerator(folder, "no", ()), folder)


def sent_at(step: int, number: int, folder: Path, rank: int = 0):
    """Sends this process a signal as soon as the log has a line of a step."""

    def watch():
        while (
            not (folder / "metrics.jsonl").exists() or len((folder / "metrics.jsonl").read_bytes().splitlines()) < step
        ):
            time.sleep(0.001)
        os.kill(os.getpid(), number)

    def prepare():
        if os.environ.get("RANK", "0") == str(rank):
            threading.Thread(target=watch, daemon=True).start()

    return prepare


# ---- signals


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"])
def test_a_signal_while_evaluating_breaks_it_off_and_the_next_start_makes_up_for_it(images, evaluated, tmp_path, name):
    def slow(model, processor):
        drawn(model, processor)
        os.kill(os.getpid(), getattr(signal, name))
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(Interrupted) as interrupted:
        train(tmp_path, images, evaluations=[slow], evaluate_every=4)
    assert interrupted.value.code == EXIT_CODE == 75
    assert time.monotonic() - began < 30
    assert [path.name for path in checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]
    assert not any("drawn" in line for line in lines(tmp_path))
    train(tmp_path, images, evaluations=[drawn], evaluate_every=4)
    assert_same_run(evaluated, tmp_path)
    assert sessions(tmp_path) == [("start", 0, None), ("end", 4, name), ("start", 4, None), ("end", 10, "finished")]


def test_a_signal_while_training_saves_at_the_end_of_the_step(images, evaluated, tmp_path, capfd):
    run = dict(evaluations=[drawn], evaluate_every=4)
    with pytest.raises(Interrupted):
        train(tmp_path, images, prepare=sent_at(3, signal.SIGTERM, tmp_path), **run)
    [saved] = checkpoints(tmp_path / "checkpoints")
    assert int(saved.name[5:]) in (3, 4)
    assert "SIGTERM: the run stops as soon as all is saved" in capfd.readouterr().err
    train(tmp_path, images, **run)
    assert_same_run(evaluated, tmp_path)


@pytest.mark.slow
def test_a_signal_to_one_of_two_processes_ends_both_after_the_same_step(images, tmp_path):
    run = dict(processes=2, per_device_batch_size=2, num_workers=1)
    train(tmp_path / "whole", images, **run)
    with pytest.raises(Interrupted):
        train(tmp_path / "parts", images, prepare=sent_at(3, signal.SIGTERM, tmp_path / "parts", rank=1), **run)
    train(tmp_path / "parts", images, **run)
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


def test_a_signal_while_the_pca_is_fitted_keeps_the_sums_and_the_next_start_goes_on(images, tmp_path):
    module = sys.modules["ldae_hf.training.fit_pca"]
    read = tmp_path / "read"

    def prepare(signals: bool):
        def prepared():
            module.BATCH = 4
            crop_loader = module.crop_loader

            def counted(*arguments, **options):
                for number, crops in enumerate(crop_loader(*arguments, **options)):
                    with open(read, "a") as stream:
                        stream.write(f"{len(crops)}\n")
                    if signals and number == 1:
                        os.kill(os.getpid(), signal.SIGTERM)
                    yield crops

            module.crop_loader = counted

        return prepared

    with pytest.raises(Interrupted):
        train(tmp_path / "run", images, prepare=prepare(True), max_steps=1)
    assert (tmp_path / "run" / "processor.partial").is_dir() and not (tmp_path / "run" / "processor").exists()
    train(tmp_path / "run", images, prepare=prepare(False), max_steps=1)
    assert sum(map(int, read.read_text().split())) == NUM_IMAGES  # each image once
    assert not (tmp_path / "run" / "processor.partial").exists()
    train(tmp_path / "whole", images, max_steps=1)
    fitted = [(tmp_path / run / "processor" / "patch_pca.safetensors").read_bytes() for run in ("run", "whole")]
    assert fitted[0] == fitted[1]


def test_another_ctrl_c_after_a_while_ends_the_run_as_it_stands(tmp_path):
    def run():
        with session(tmp_path) as one:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)  # which a launcher passes on
            one.signals.came -= 60
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
                time.sleep(1)
        return signal.getsignal(signal.SIGINT) is signal.default_int_handler

    assert Child(run).join()


# ---- the folder


def test_a_folder_is_one_runs_until_that_ends_however_it_ends(images, tmp_path):
    def hold():
        with session(tmp_path) as one:
            one.own()
            (tmp_path / "held").touch()
            time.sleep(60)

    holder = Child(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    with pytest.raises(RunError, match=f"is in use by another run .process {holder.process.pid} on "):
        train(tmp_path, images)
    assert not (tmp_path / "run.json").exists()
    holder.process.kill()
    holder.process.join()
    train(tmp_path, images, max_steps=1)


def test_a_worker_that_outlives_its_run_does_not_hold_the_folder(tmp_path):
    def own_and_die():
        with session(tmp_path) as one:
            one.own()
            if os.fork() == 0:
                time.sleep(3)
                os._exit(0)
            os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError):
        Child(own_and_die).join()

    def own():
        with session(tmp_path) as one:
            one.own()
        return True

    assert Child(own).join()


# ---- what processes agree on


def test_alone_a_process_agrees_with_itself(tmp_path):
    def run():
        with session(tmp_path) as one:
            return one.agree(0, 3, True)

    assert Child(run).join() == [0, 3, 1]


@pytest.mark.slow
def test_several_processes_agree_on_the_largest_vote_and_end_together(tmp_path):
    def run():
        rank = int(os.environ["RANK"])
        with session(tmp_path) as one:
            agreed = one.agree(rank, 5 * (1 - rank))

            def fail_in_the_second():
                if rank == 1:
                    raise OSError("no room")

            try:
                one.together(fail_in_the_second)
            except (OSError, RunError) as error:
                return agreed, str(error)

    assert in_processes(run, 2) == ([1, 5], "Another process of this run has failed; its message says why.")
