"""Ctrl-C in a measurement: one line that says what is kept, and an exit code; an error in one of several processes."""

import os
import signal
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import datasets
import pytest
from forked_runs import Child, in_processes
from test_fid import OPTIONS, checkpoint, extractor, images, processor, small_shards
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.evaluation.fid import run_fid
from ldae_hf.evaluation.samples import SampleStore


__all__ = ["checkpoint", "extractor", "images", "processor", "small_shards"]  # fixtures


def interrupted(words: list, when) -> tuple[int, str]:
    """Exit code and messages of a command that gets a SIGINT as soon as `when()` is true."""

    def run():
        def press():
            while not when():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGINT)

        signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Thread(target=press, daemon=True).start()
        result = CliRunner().invoke(app, [str(word) for word in words])
        return result.exit_code, result.stderr

    return Child(run).join()


def test_ctrl_c_in_a_generation_says_that_the_same_command_goes_on_and_it_does(checkpoint, extractor, tmp_path):
    words = ["fid", checkpoint, "--extractor", extractor, "--num-workers", 0, "--samples-dir", tmp_path, "--steps", 3]
    shard = tmp_path / "shard-00000.safetensors"
    code, messages = interrupted([*words, "--num-samples", 10**6, "--batch-size", 1], shard.exists)
    assert code == 75
    assert messages.splitlines()[-1] == "Stopped; the samples that were whole are kept, and the same command goes on."
    assert "Traceback" not in messages
    made = shard.stat().st_mtime_ns
    result = CliRunner().invoke(app, [str(word) for word in (*words, "--num-samples", 8)])
    assert result.exit_code == 0, result.output
    assert shard.stat().st_mtime_ns == made


@pytest.mark.parametrize(
    "command", [("probe", "--epochs", 10**6), ("sweep", "layers", "--epochs", 10**6)], ids=lambda words: words[0]
)
def test_ctrl_c_in_a_probe_writes_one_line_and_no_result(command, checkpoint, images, tmp_path):
    began, output, ledger = time.monotonic(), tmp_path / "row.json", tmp_path / "ledger.jsonl"
    name = command[:1] if command[0] == "probe" else command[:2]
    words = [*name, checkpoint, "--dataset", images, "--num-workers", 0, *command[len(name) :]]
    words += ["--output", output, "--ledger", ledger]
    code, messages = interrupted(words, lambda: time.monotonic() > began + 8)
    assert code == 130
    assert messages.splitlines()[-1] == "Stopped; what was complete is kept, and nothing else was written."
    assert "Traceback" not in messages and not output.exists() and not ledger.exists()


def messages_of(processes: int, folder: Path, run) -> list[str]:
    """What `run` raises in each process."""

    def each():
        with pytest.raises(ValueError) as raised:
            run()
        (folder / os.environ["RANK"]).write_text(str(raised.value))

    in_processes(each, processes)
    return [(folder / str(rank)).read_text() for rank in range(processes)]


def test_an_image_that_the_main_process_cannot_read_ends_the_others_too(checkpoint, extractor, tmp_path):
    rows = {"image": [{"bytes": b"broken", "path": None}] * 8}
    data = {
        split: datasets.Dataset.from_dict(rows, datasets.Features({"image": datasets.Image()}))
        for split in ("train", "test")
    }
    options = OPTIONS | dict(extractor=extractor, dataset=data, samples_dir=tmp_path / "samples", cache_dir=None)
    main, other = messages_of(2, tmp_path, lambda: run_fid(checkpoint, **options))
    assert "The image file is unreadable" in main
    assert other == "Another process of this measurement has failed; its message says why."


def test_a_disk_that_another_process_cannot_write_to_ends_the_main_one_too(checkpoint, extractor, tmp_path):
    options = OPTIONS | dict(extractor=extractor, samples_dir=tmp_path / "samples")

    def run():
        if os.environ["RANK"] == "1":
            (tmp_path / "samples").mkdir()
            (tmp_path / "samples" / ".shard-00001.safetensors.writing").mkdir()  # where its first shard is to go
        run_fid(checkpoint, **options)

    def as_value_errors():
        try:
            run()
        except OSError as error:
            raise ValueError(f"OSError: {error.strerror}") from error

    main, other = messages_of(2, tmp_path, as_value_errors)
    assert main == "Another process of this measurement has failed; its message says why."
    assert other == "OSError: Is a directory"


def as_nobody(work):
    """What `work` raises, or None, in a process without root's right to write anywhere."""

    def run():
        if os.geteuid() == 0:
            os.seteuid(65534)
        try:
            return work()
        except ValueError as error:
            return str(error)

    return Child(run).join()


@pytest.fixture
def open_folder():
    """One that others may enter, as they may not pytest's."""
    with TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_a_folder_that_lacks_samples_and_is_read_only_is_refused_before_they_are_made(open_folder):
    folder = open_folder / "samples"
    folder.mkdir()
    store = SampleStore(folder, {"model": "m"}, 16, 8)
    store.begin()
    folder.chmod(0o555)
    message = as_nobody(store.begin)
    assert message == f"Samples cannot be written to {folder}: Permission denied; name another folder."
    assert as_nobody(SampleStore(folder / "new", {}, 16, 8).begin).startswith("Samples cannot be written to")
    folder.chmod(0o755)
    store.file(0).touch()
    folder.chmod(0o555)
    assert as_nobody(store.begin) is None  # nothing is missing
    folder.chmod(0o755)


@pytest.mark.parametrize("place", ["file", "file/samples"])
def test_a_file_in_the_place_of_the_samples_is_refused_before_they_are_made(place, checkpoint, extractor, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file; samples need a folder|Not a directory; name another folder"):
        run_fid(checkpoint, extractor=extractor, **OPTIONS, samples_dir=tmp_path / place)
