"""Pushing: of a run while it trains, which nothing that happens there can disturb, and by command."""

import fcntl
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from forked_runs import Child, lines
from hub_server import Hub, connected, hub_environment
from safetensors.torch import load_file
from test_repository import contents, run_in, train

from ldae_hf.manifest import check_folder
from ldae_hf.repository import one_at_a_time, push_repository


TOKEN = "hf_" + "Secret0" * 5
NAME = "someone/encoder"


@pytest.fixture
def hub():
    with Hub(tokens={TOKEN: ("someone", True)}) as hub:
        yield hub


def push(folder: Path, hub: Hub, token: str | None = TOKEN, **options) -> Path:
    """A run with a push, in a fork with its own Hub."""
    environment = hub_environment(hub, folder.parent / "home", **({"HF_TOKEN": token} if token else {}))
    return train(folder, environment=environment, push_to_hub=NAME, **options)


def files_on(hub: Hub) -> dict[str, bytes]:
    return hub.repositories["models", NAME].files


def test_a_run_is_pushed_while_it_trains_and_is_the_same_run(hub, tmp_path, capfd):
    run = push(tmp_path / "run", hub, checkpoint_every=1)
    printed = capfd.readouterr()
    assert f"pushed to {NAME}" in printed.out
    there, here = files_on(hub), run / "hub"
    assert {name: (here / name).read_bytes() for name in contents(here)} == there
    check_folder(here)
    encoder = load_file(run / "encoder" / "model.safetensors")
    published = load_file(here / "model.safetensors")
    assert all((published[name] == value).all() for name, value in encoder.items())
    assert TOKEN not in printed.out + printed.err + (run / "push.log").read_text()

    alone = train(tmp_path / "alone", checkpoint_every=1)
    assert [line["loss"] for line in lines(run)] == [line["loss"] for line in lines(alone)]

    commits = len(hub.repositories["models", NAME].history())
    push(run, hub)  # of a run that is finished and pushed
    assert "this run is finished" in capfd.readouterr().out
    assert len(hub.repositories["models", NAME].history()) == commits


def test_a_hub_that_refuses_takes_nothing_from_the_run_and_the_reason_is_said(hub, tmp_path, capfd):
    wrong = "hf_" + "Wrong00" * 5
    run = push(tmp_path / "run", hub, token=wrong)
    printed = capfd.readouterr()
    check_folder(run / "encoder")
    assert f"warning: the push to {NAME} failed: " in printed.out and "token" in printed.out
    assert "Nothing is lost; the same command, or ldae push" in printed.out
    assert wrong not in printed.out + printed.err + (run / "push.log").read_text()
    push(run, hub)
    assert "README.md" in files_on(hub)


@pytest.mark.parametrize(
    ("token", "name", "sentence"),
    [(None, NAME, "no"), (TOKEN, "some/../one", "names no"), (TOKEN, "encoder", "names no owner")],
)
def test_without_a_token_or_with_a_name_that_is_none_nothing_is_trained(hub, tmp_path, token, name, sentence):
    environment = hub_environment(hub, tmp_path / "home", **({"HF_TOKEN": token} if token else {}))
    with pytest.raises(ValueError, match=sentence):
        train(tmp_path / "run", environment=environment, push_to_hub=name)
    assert not (tmp_path / "run").exists()


def test_a_signal_leaves_a_push_that_hangs_and_the_same_command_goes_on_with_it(hub, tmp_path, capfd):
    hub.fault = lambda method, path, count: 600.0 if "/commit/" in path else None
    environment = hub_environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    child = Child(run_in(tmp_path / "run", push_to_hub=NAME, checkpoint_every=4), environment)
    while not any("/commit/" in request for request in hub.requests):
        assert child.process.is_alive()
        time.sleep(0.1)
    os.kill(child.process.pid, signal.SIGTERM)
    child.process.join(30)
    assert not child.process.is_alive()
    assert "not pushed to the end" in capfd.readouterr().out
    check_folder(tmp_path / "run" / "encoder")
    hub.fault = lambda method, path, count: None
    push(tmp_path / "run", hub)
    assert "README.md" in files_on(hub)


def test_a_run_that_was_killed_leaves_a_push_for_which_that_of_the_next_one_waits(hub, tmp_path, capfd):
    arrived, released = threading.Event(), threading.Event()

    def hold(method, path, count):
        if "/commit/" in path:
            arrived.set()
            while not (released.wait(0.1) or hub.closed.is_set()):
                pass

    hub.fault = hold
    run, home = tmp_path / "run", tmp_path / "home"
    environment = hub_environment(hub, home, HF_TOKEN=TOKEN)
    child = Child(run_in(run, push_to_hub=NAME, checkpoint_every=4), environment)
    while not arrived.wait(0.1):
        assert child.process.is_alive()
    os.kill(child.process.pid, signal.SIGKILL)
    child.process.join(30)

    def push_again():
        with connected(hub, home):
            return push_repository(run, NAME)

    child, printed = Child(push_again, environment), ""
    while "is being pushed by another process; waiting until that ends" not in printed:
        assert child.process.is_alive()
        printed += capfd.readouterr().err
        time.sleep(0.1)
    released.set()
    assert child.join()
    assert {name: (run / "hub" / name).read_bytes() for name in contents(run / "hub")} == files_on(hub)


def test_a_push_of_a_training_has_no_picture_if_it_is_not_to_and_no_module_of_the_working_directory(
    hub, tmp_path, monkeypatch
):
    for module in ("random", "torch"):
        (tmp_path / f"{module}.py").write_text("raise AssertionError('this was imported')")
    monkeypatch.chdir(tmp_path)
    environment = hub_environment(hub, tmp_path / "home", HF_TOKEN=TOKEN)
    run = train(Path("-run"), environment=environment, push_to_hub=NAME, hub_pictures=False)
    assert list((run / "pictures").iterdir())
    assert [name for name in files_on(hub) if name.startswith("pictures/")] == ["pictures/directions.png"]


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_a_run_that_may_not_ask_the_hub_is_not_begun_with_a_push(hub, tmp_path, variable):
    environment = hub_environment(hub, tmp_path / "home", HF_TOKEN=TOKEN) | {"HF_HUB_OFFLINE": "", variable: "1"}
    with pytest.raises(ValueError, match="while HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: unset it"):
        train(tmp_path / "run", environment=environment, push_to_hub=NAME)
    assert not (tmp_path / "run").exists()


def test_one_run_is_pushed_by_one_process_at_a_time_and_by_none_without_a_token(tmp_path, monkeypatch, capfd):
    (tmp_path / "checkpoints").mkdir()

    def hold():
        with open(tmp_path / "push.lock", "ab") as stream:
            fcntl.lockf(stream, fcntl.LOCK_EX)
            (tmp_path / "held").touch()
            time.sleep(60)

    child = Child(hold)
    while not (tmp_path / "held").exists():
        time.sleep(0.01)
    killed = threading.Event()

    def kill():
        killed.set()
        child.process.kill()

    threading.Timer(0.5, kill).start()
    with one_at_a_time(tmp_path / "push.lock"):
        assert killed.is_set()
    child.process.join(30)
    assert "is being pushed by another process; waiting until that ends" in capfd.readouterr().err
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(ValueError, match="cannot be written without a token"):
        push_repository(tmp_path, NAME)
