"""A folder is whole or not there, and every bit of it is known, those of its manifest too."""

import json
import os
import signal

import pytest
import torch
from forked_runs import Child
from safetensors.torch import save_file

from ldae_hf.manifest import (
    MANIFEST,
    DamagedError,
    check_folder,
    manifest_text,
    read_manifest,
    sha256,
    write_folder,
    write_text,
)


CONTENTS = {"weights.bin": bytes(range(16)), "inside/state.json": b'{"step": 7}', "inside/empty": b""}


def write(folder):
    for name, content in CONTENTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.fixture
def written(tmp_path):
    write_folder(tmp_path / "written", write)
    return tmp_path / "written"


# ---- whole or not there


def test_a_folder_is_replaced_as_a_whole(tmp_path):
    folder = tmp_path / "encoder"
    for content in ("old", "new"):
        write_folder(folder, lambda path, content=content: (path / f"{content}.txt").write_text(content))
        check_folder(folder, needed=(f"{content}.txt",))
    assert {path.name for path in folder.iterdir()} == {"new.txt", MANIFEST}
    assert list(tmp_path.iterdir()) == [folder]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt(), ValueError("a bug")])
def test_an_error_leaves_what_was_there_and_nothing_of_the_new_one(written, error):
    def fail(path):
        (path / "half").write_bytes(b"1" * 1000)
        raise error

    with pytest.raises(type(error)):
        write_folder(written, fail)
    check_folder(written, tuple(CONTENTS))
    assert list(written.parent.iterdir()) == [written]


def test_what_a_killed_process_left_behind_is_cleared_up(tmp_path):
    def die(path):
        (path / "half").write_bytes(b"1" * 1000)
        os.kill(os.getpid(), signal.SIGKILL)

    with pytest.raises(ChildProcessError, match="signal 9"):
        Child(lambda: write_folder(tmp_path / "written", die)).join()
    assert [path.name for path in tmp_path.iterdir()] == [".written.writing"]
    write_folder(tmp_path / "written", write)
    assert [path.name for path in tmp_path.iterdir()] == ["written"]
    assert set(read_manifest(tmp_path / "written")) == set(CONTENTS)


def test_what_the_disk_refuses_is_an_os_error_from_safetensors_too(tmp_path):
    def fill(path):
        (path / "weights.safetensors").mkdir()  # in the place of a file
        save_file({"weights": torch.zeros(9)}, path / "weights.safetensors")

    with pytest.raises(OSError, match="Is a directory") as caught:
        write_folder(tmp_path / "written", fill)
    assert caught.value.filename == str(tmp_path / "written")


def test_a_text_file_is_replaced_as_a_whole(tmp_path):
    write_text(tmp_path / "run.json", "old")
    write_text(tmp_path / "run.json", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"run.json": "new"}


# ---- every bit


def test_a_flipped_bit_in_any_byte_and_every_truncation_of_any_file_is_found(written):
    for name in (*CONTENTS, MANIFEST):
        file, content = written / name, (written / name).read_bytes()
        for place in range(len(content)):
            damaged = bytearray(content)
            damaged[place] ^= 1 << place % 8
            file.write_bytes(damaged)
            with pytest.raises(DamagedError, match=file.name):
                check_folder(written)
        for length in range(len(content)):
            file.write_bytes(content[:length])
            with pytest.raises(DamagedError, match=file.name):
                check_folder(written)
        file.write_bytes(content + b"\n")
        with pytest.raises(DamagedError, match=file.name):
            check_folder(written)
        file.unlink()
        with pytest.raises(DamagedError, match=file.name):
            check_folder(written)
        file.write_bytes(content)
    check_folder(written)


@pytest.mark.parametrize(
    "manifest",
    [
        "",
        "[]",
        "3",
        "null",
        '"model.safetensors"',
        "{}",
        '{"files": 3}',
        '{"files": [], "sha256": ""}',
        "[" * 100_000,
        "\x00",
        b"\xff",
        manifest_text({"weights.bin": 3}),
        manifest_text(["weights.bin"]),
    ],
)
def test_a_manifest_that_is_no_list_of_files_is_refused(written, manifest):
    (written / MANIFEST).write_bytes(manifest if isinstance(manifest, bytes) else manifest.encode())
    with pytest.raises(DamagedError, match="has no manifest.json, or a damaged one"):
        check_folder(written)


def test_a_manifest_that_leaves_out_a_needed_file_does_not_let_it_through(written):
    digests = read_manifest(written)
    del digests["weights.bin"]
    (written / MANIFEST).write_text(manifest_text(digests))
    check_folder(written)
    with pytest.raises(DamagedError, match="weights.bin is missing or damaged"):
        check_folder(written, needed=("weights.bin",))


def test_a_manifest_whose_list_was_changed_by_hand_is_refused(written):
    manifest = json.loads((written / MANIFEST).read_text())
    (written / "weights.bin").write_bytes(b"others")
    manifest["files"]["weights.bin"] = sha256(written / "weights.bin")
    (written / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
    with pytest.raises(DamagedError, match="damaged"):
        check_folder(written)


@pytest.mark.parametrize("inside", ["../secret", "inside/../../secret", "{absolute}", "\0", "\ud800", "inside", ""])
def test_a_manifest_cannot_name_what_is_outside_the_folder_or_no_file(written, inside):
    secret = written.parent / "secret"
    secret.write_text("not yours")
    name = inside.format(absolute=secret)
    (written / MANIFEST).write_text(manifest_text(read_manifest(written) | {name: sha256(secret)}))
    with pytest.raises(DamagedError, match="missing or damaged"):
        check_folder(written)


def test_a_pipe_in_the_place_of_a_file_keeps_nobody_waiting(written):
    (written / "weights.bin").unlink()
    os.mkfifo(written / "weights.bin")
    with pytest.raises(DamagedError, match="weights.bin is missing or damaged"):
        check_folder(written)


def test_whoever_may_read_one_file_of_a_folder_may_read_all(tmp_path):
    write_folder(tmp_path / "model", lambda path: save_file({"a": torch.ones(2)}, path / "a.safetensors"))
    modes = {file.stat().st_mode for file in (tmp_path / "model").iterdir()}
    (tmp_path / "plain").write_text("")
    assert modes == {(tmp_path / "plain").stat().st_mode}
