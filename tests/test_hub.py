"""A folder to the Hub and back, over a Hub on the loopback that the real client talks to."""

import logging
import os
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from hostile_uploads import contents, hostile_upload, write_files
from hub_repositories import FIRST
from hub_server import OTHER, READ, TOKENS, WRITE, Hub, connected
from huggingface_hub import HfApi, close_session, constants
from hypothesis import example, given
from hypothesis import strategies as st
from numpy.random import default_rng
from typer.testing import CliRunner

from ldae_hf.cli import app
from ldae_hf.hub import check_file_name, check_repo_id, download, fetch, upload


NAME = "me/model"
WRONG = "hf_" + "z" * 34


@pytest.fixture
def waits(tmp_path, hub):
    """How long the client would have slept, if it did."""
    with connected(hub, tmp_path / "cache") as waits:
        yield waits


@pytest.fixture
def hub(monkeypatch):
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    with Hub(tokens=TOKENS) as hub:
        yield hub


@pytest.fixture
def source(tmp_path) -> Path:
    write_files(tmp_path / "source", default_rng(0), 1)
    return tmp_path / "source"


def sent(hub: Hub) -> list[str]:
    """The requests that brought content or changed something."""
    return [request for request in hub.requests if "PUT" in request or "/commit/" in request]


# ---- there and back


def test_a_folder_arrives_in_one_commit_and_comes_back_as_it_was(hub, waits, source, tmp_path):
    address = upload(source, NAME, token=WRITE, message="A model", progress=False)
    commits = hub.repositories["models", NAME].history()
    assert [commit.title for commit in commits] == ["A model", "initial commit"]
    assert address == f"{hub.url}/{NAME}/commit/{commits[0].sha}"
    assert hub.repositories["models", NAME].files == contents(source)
    (source / ".cache/huggingface").mkdir(parents=True)
    (source / ".cache/huggingface/lock").touch()
    (source / ".git").mkdir()
    (source / ".git/config").touch()
    hub.requests.clear()
    assert upload(source, NAME, token=WRITE, progress=False) == address and sent(hub) == []
    folder = download(NAME, tmp_path / "new")
    assert contents(folder) == hub.repositories["models", NAME].files
    assert not any(path.is_symlink() for path in folder.rglob("*")) and waits == []


def test_a_second_version_sends_what_has_changed_and_deletes_what_is_asked_for(hub, waits, source, tmp_path):
    first = upload(source, NAME, token=WRITE, progress=False).rpartition("/")[2]
    HfApi(token=WRITE).create_tag(NAME, tag="v1")
    old = contents(source)
    (source / "version-1.txt").rename(source / "version-2.txt")
    (source / "model.safetensors").write_bytes(b"other weights")
    hub.requests.clear()
    upload(source, NAME, token=WRITE, delete_patterns=["*.txt", FIRST], progress=False)
    repository = hub.repositories["models", NAME]
    assert repository.files == contents(source) and FIRST in repository.branches["main"].files
    assert len(sent(hub)) == 2  # the weights and the commit
    for number, revision in enumerate((first, "v1")):
        assert contents(download(NAME, tmp_path / str(number), revision=revision)) == old
    assert contents(download(NAME, tmp_path / "new", revision="main")) == contents(source)


def test_a_branch_is_made_and_leaves_main_alone(hub, waits, source, tmp_path):
    upload(source, NAME, token=WRITE, revision="run/7", progress=False)
    assert hub.repositories["models", NAME].files == {}
    assert contents(download(NAME, tmp_path / "new", revision="run/7")) == contents(source)


def test_a_bare_name_is_uploaded_to_the_users_own_namespace_even_if_it_is_one_of_ours(hub, waits, source, monkeypatch):
    monkeypatch.setenv("LDAE_HUB_OWNER", "other")
    hub.add("other/ldae-vit-l", {"config.json": b"{}"})
    upload(source, "ldae-vit-l", token=WRITE, progress=False)
    assert hub.repositories["models", "me/ldae-vit-l"].files == contents(source)
    assert hub.repositories["models", "other/ldae-vit-l"].files == {"config.json": b"{}"}
    for token, sentence in ((READ, "may not write to me/ldae-vit-l: take one"), (WRONG, "Hub does not know the token")):
        with pytest.raises(ValueError, match=sentence):
            upload(source, "ldae-vit-l", token=token, progress=False)


def test_part_of_a_repository_and_a_name_of_ours_can_be_downloaded(hub, waits, tmp_path, monkeypatch):
    monkeypatch.setenv("LDAE_HUB_OWNER", "other")
    hub.add("other/ldae-vit-l", {"config.json": b"{}", "vit/config.json": b"{ }", "vit/model.safetensors": b"x"})
    assert contents(fetch("ldae-vit-l")).keys() == {"config.json", "vit/config.json", "vit/model.safetensors"}
    assert contents(download("ldae-vit-l", tmp_path / "vit", allow_patterns="vit/*.json")) == {
        "vit/config.json": b"{ }"
    }
    with pytest.raises(ValueError, match="no file that matches onnx/*"):
        download("ldae-vit-l", tmp_path / "onnx", allow_patterns="onnx/*")
    assert not (tmp_path / "onnx").exists()


def test_the_command_makes_a_folder_of_the_names_last_part(hub, waits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    hub.add(NAME, {"config.json": b"{}", "vit/config.json": b"{ }"})
    done = CliRunner().invoke(app, ["download", NAME])
    assert (done.exit_code, done.stdout) == (0, "model\n")
    assert contents(tmp_path / "model") == {"config.json": b"{}", "vit/config.json": b"{ }"}
    assert CliRunner().invoke(app, ["download", NAME, "vit", "--only", "vit/*", "--revision", "main"]).exit_code == 0
    assert contents(tmp_path / "vit") == {"vit/config.json": b"{ }"}
    for name, sentence in (
        (NAME, "Error: model is there already"),
        ("../evil", "Error: '../evil' names no repository"),
    ):
        done = CliRunner().invoke(app, ["download", name])
        assert done.exit_code == 2 and done.stderr.startswith(sentence)


# ---- tokens


def test_a_private_repository_is_read_with_its_owners_token_only(hub, waits, source, tmp_path):
    upload(source, NAME, token=WRITE, private=True, progress=False)
    assert hub.repositories["models", NAME].private
    for token in (None, OTHER, WRONG):
        with pytest.raises(ValueError, match=f"(no model {NAME}, or a private one|not know the token)") as caught:
            download(NAME, tmp_path / "refused", token=token)
        assert "hf auth login" in str(caught.value)
    assert contents(download(NAME, tmp_path / "new", token=READ)) == contents(source)
    assert not (tmp_path / "refused").exists() and waits == []


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (None, f"{NAME} cannot be written without a token, and none was found: log in with `hf auth login` or set HF_"),
        (READ, f"The token that was used may not write to {NAME}: take one that may, from http"),
        (OTHER, f"The token that was used may not write to {NAME}: take one that may, from http"),
        (WRONG, f"The Hub does not know the token that was used for {NAME}: take one from http"),
        ("hf_a\nX-Evil: 1", "The token holds a space, a line end or another character"),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_an_upload_without_the_right_to_write_is_refused_at_once_in_a_sentence(
    hub, waits, source, token, sentence, there
):
    if there:
        hub.add(NAME, {})
    with pytest.raises(ValueError) as caught:
        upload(source, NAME, token=token, progress=False)
    assert str(caught.value).startswith(sentence) and len(str(caught.value).splitlines()) == 1
    assert waits == [] and sent(hub) == []
    assert token is None or token not in "".join(traceback.format_exception(caught.value))


@pytest.mark.parametrize("answer", [503, 400])
def test_a_token_that_a_server_repeats_is_in_no_message_and_no_log(hub, waits, source, answer, caplog):
    caplog.set_level(logging.INFO, "ldae_hf")
    hub.fault = lambda method, path, count: (answer, {"X-Error-Message": f"sorry, {WRITE} and {READ}"})
    with pytest.raises((ConnectionError, ValueError)) as caught:
        upload(source, NAME, token=WRITE, progress=False)
    told = "".join(traceback.format_exception(caught.value)) + caplog.text
    assert WRITE not in told and READ not in told and NAME in told


# ---- failures


def test_what_fails_is_tried_again_and_a_server_that_says_when_is_obeyed(hub, waits, source, caplog):
    hub.fault = lambda method, path, count: (
        (429, {"Retry-After": "300"}) if count < 3 else "drop" if count < 6 else None
    )
    upload(source, NAME, token=WRITE, progress=False)
    assert hub.repositories["models", NAME].files == contents(source)
    assert len(waits) == 6 and min(waits[:3]) >= 300
    assert f"Making the repository {NAME} failed (429 Too Many Requests for url" in caplog.text


@pytest.mark.parametrize("way", ["lost", "late", "cut"])
def test_a_commit_whose_answer_is_lost_is_not_made_twice(hub, waits, source, way):
    commits = []

    def fault(method, path, count):
        if "/commit/" in path:
            commits.append(path)
            return way if len(commits) == 1 else None

    hub.fault = fault
    upload(source, NAME, token=WRITE, progress=False)
    hub.closed.wait(0.1)
    assert len(hub.repositories["models", NAME].history()) == 2
    assert hub.repositories["models", NAME].files == contents(source)


def test_an_upload_that_is_given_up_goes_on_where_it_was(hub, waits, source):
    hub.fault = lambda method, path, count: 504 if "/commit/" in path else None
    with pytest.raises(ConnectionError, match=f"to {NAME} failed 10 times, the last time with: Server error '504"):
        upload(source, NAME, token=WRITE, progress=False)
    assert 300 < sum(waits) < 600
    large = sum("PUT" in request for request in hub.requests)
    hub.fault, hub.requests = lambda *_: None, []
    upload(source, NAME, token=WRITE, progress=False)
    assert large == 3 and not any("PUT" in request for request in hub.requests)
    assert hub.repositories["models", NAME].files == contents(source)


@pytest.mark.parametrize("seed", range(5))
def test_over_a_hub_that_fails_at_random_every_upload_arrives_once(tmp_path, seed):
    trial = hostile_upload(seed, tmp_path)
    assert not trial.wrong and trial.faults > 5


def test_a_card_that_the_hub_does_not_take_is_refused_with_its_reason(hub, waits, source):
    (source / "README.md").write_text("---\nlicense: [mit\n---\n")
    with pytest.raises(ValueError, match=f"The Hub refused {NAME}: Invalid metadata in README.md. - while parsing"):
        upload(source, NAME, token=WRITE, progress=False)
    assert waits == [] and sent(hub) == []


def test_what_the_hub_refuses_to_give_is_said_in_a_sentence(hub, waits, tmp_path):
    hub.add(NAME, {"config.json": b"{}"})
    hub.repositories["datasets", "me/pictures"] = hub.repositories["models", NAME]
    for name, revision, sentence in (
        ("me/nothing", None, "no model me/nothing, or a private one: check the name"),
        ("me/pictures", None, "me/pictures is a dataset on the Hub, not a model"),
        (NAME, "v9", f"{NAME} has no branch, tag or commit v9"),
    ):
        with pytest.raises(ValueError, match=sentence):
            download(name, tmp_path / "new", revision=revision)
    hub.fault = lambda method, path, count: (403, {"X-Error-Code": "GatedRepo"})
    with pytest.raises(ValueError, match=f"{NAME} is gated: accept its terms on {hub.url}/{NAME}, then log in"):
        download(NAME, tmp_path / "new")
    assert waits == [] and not (tmp_path / "new").exists()


def test_a_download_that_breaks_off_leaves_nothing_and_another_one_goes_on(hub, waits, source, tmp_path, monkeypatch):
    upload(source, NAME, token=WRITE, progress=False)
    hub.fault = lambda method, path, count: 503 if path.endswith("/vit/model.safetensors") else None
    with pytest.raises(ConnectionError, match=f"Downloading {NAME} failed 10 times"):
        download(NAME, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))
    hub.fault, hub.requests = lambda *_: None, []

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr("shutil.copyfile", full)
        download(NAME, tmp_path / "new")
    assert not list(tmp_path.glob("*new*"))
    assert contents(download(NAME, tmp_path / "new")) == contents(source)
    fetched = [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]
    assert len(fetched) == 1 and "vit/model.safetensors" in fetched[0]
    with pytest.raises(ValueError, match="is there already"):
        download(NAME, tmp_path / "new")


def test_without_a_network_what_was_read_before_is_read_and_nothing_is_written(hub, source, tmp_path, monkeypatch):
    with connected(hub, tmp_path / "cache") as waits:
        upload(source, NAME, token=WRITE, progress=False)
        download(NAME, tmp_path / "before")
        close_session()
        hub.fault = lambda *_: "drop"
        hub.__exit__()
        assert contents(download(NAME, tmp_path / "unplugged")) == contents(source)
        with pytest.raises(ConnectionError, match="Downloading me/unknown failed 10 times, the last time with: "):
            download("me/unknown", tmp_path / "new")
        with pytest.raises(ConnectionError, match="refused. Try again later"):
            upload(source, "me/unknown", token=WRITE, progress=False)
        waits.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert contents(download(NAME, tmp_path / "offline")) == contents(source)
        with pytest.raises(
            ValueError, match="me/unknown is not in the cache, or not all of it, and HF_HUB_OFFLINE is set"
        ):
            download("me/unknown", tmp_path / "new")
        with pytest.raises(ValueError, match=f"Nothing can be uploaded to {NAME} while HF_HUB_OFFLINE is set"):
            upload(source, NAME, token=WRITE, progress=False)
        assert waits == []


# ---- names

BAD_IDS = [
    "..",
    "../x",
    "a/../b",
    "/etc/passwd",
    "a/b/c",
    "a//b",
    "a/",
    "/a",
    "",
    ".",
    "a\0b",
    "a\\b",
    "a\n",
    "-a",
    "a..b",
]
BAD_IDS += ["x" * 97, "C:/x", "a b", "a/.git", "ünï/code", "a/b\u202e", 3, None]
BAD_FILES = [
    "../evil",
    "a/../../evil",
    "/etc/passwd",
    "a//b",
    "./a",
    "a/.",
    "a\0b",
    "a\nb",
    "a\\b",
    "..\\evil",
    "C:evil",
    "",
]
BAD_FILES += [
    ".git/hooks/post-checkout",
    "vit/.GIT/config",
    "x" * 256,
    "x/" * 600 + "x",
    "ä" * 130,
    "a\x1b[2Jb",
    "a\u202eb",
    3,
]


@pytest.mark.parametrize("name", BAD_IDS)
def test_a_name_that_is_none_is_refused_before_network_and_disk_see_it(hub, waits, source, tmp_path, name):
    before = contents(tmp_path)
    for attempt in (
        lambda: upload(source, name, token=WRITE),
        lambda: download(name, tmp_path / "new"),
        lambda: fetch(name),
    ):
        with pytest.raises(ValueError, match="names no repository of the Hub") as caught:
            attempt()
        assert len(str(caught.value)) < 400 and str(caught.value).isprintable()
    assert hub.requests == [] and contents(tmp_path) == before and not (tmp_path / "cache").exists()


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_has_no_safe_name_is_refused(name):
    with pytest.raises(ValueError, match="is no name for a file of a repository: it") as caught:
        check_file_name(name)
    assert len(str(caught.value)) < 400 and str(caught.value).isprintable()


TEXTS = st.text() | st.text("ab./\\-_~:\0\n%?# ", max_size=12)


@given(TEXTS)
@example("a" * 96 + "/" + "b" * 96)
def test_whatever_is_given_as_a_repository_is_refused_or_stays_within_its_folder_and_address(name):
    try:
        check_repo_id(name)
    except ValueError:
        return
    assert name.isascii() and name.count("/") <= 1 and len(name) <= 193
    assert all(letter.isalnum() or letter in "-_./" for letter in name)
    assert os.path.normpath(name) == name and not name.startswith(("/", "."))


@given(TEXTS)
def test_whatever_is_given_as_a_file_is_refused_or_lies_in_its_folder(name):
    try:
        check_file_name(name)
    except ValueError:
        return
    path = Path("/base", name)
    assert os.path.normpath(path) == str(path) and path.is_relative_to("/base") and path != Path("/base")
    assert name.isprintable() and max(len(part.encode()) for part in path.parts) <= 255


WORDS = st.from_regex(r"[A-Za-z0-9](?:[A-Za-z0-9_]{0,20}[A-Za-z0-9])?", fullmatch=True)


@given(st.lists(WORDS, min_size=1, max_size=2), st.lists(WORDS, min_size=1, max_size=4))
def test_ordinary_names_are_taken(repository, file):
    check_repo_id("/".join(repository))
    check_file_name("/".join(file) + ".safetensors")


# ---- hostile repositories

SOUND = {"config.json": b"{}", "model.safetensors": b"tensors"}


@pytest.mark.parametrize(
    "name", ["../evil", "../../../evil", "/evil", "a/../../evil", "x" * 300, "a\\..\\evil", ".git/config"]
)
def test_a_repository_that_lists_a_file_outside_is_refused_and_nothing_of_it_is_written(hub, waits, tmp_path, name):
    hub.add(NAME, SOUND | {name: b"evil"})
    for number, allow in enumerate((None, "config.json")):
        with pytest.raises(ValueError, match="is no name for a file of a repository"):
            download(NAME, tmp_path / f"new-{number}", allow_patterns=allow)
    assert contents(tmp_path) == {} and not Path("/evil").exists()


def test_a_pickle_is_neither_fetched_nor_copied_nor_opened(hub, waits, tmp_path):
    pickles = ["pytorch_model.bin", "training/optimizer.pt", "a.PTH", "b.Ckpt", "c.pkl", "training_args.bin"]
    hub.add(NAME, SOUND | dict.fromkeys(pickles, b"cos\nsystem\n(S'touch evil'\ntR."))
    assert contents(download(NAME, tmp_path / "new")) == SOUND
    assert not any(name in request for name in pickles for request in hub.requests)
    HfApi().snapshot_download(NAME)  # as another program may have left them in the cache
    assert contents(download(NAME, tmp_path / "again")) == SOUND


def test_a_file_of_the_folder_that_has_no_safe_name_is_not_uploaded(hub, waits, source, tmp_path):
    (source / "a\nb.txt").touch()
    with pytest.raises(ValueError, match="is no name for a file"):
        upload(source, NAME, token=WRITE)
    for folder, sentence in ((tmp_path / "none", "There is no folder"), (tmp_path / "empty", "holds no file")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=sentence):
            upload(folder, NAME, token=WRITE)
    assert hub.requests == []


# ---- the process


def test_uploading_needs_no_data_sets():
    script = "import sys, ldae_hf.hub; print(*{name.split('.')[0] for name in sys.modules})"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert "huggingface_hub" in done.stdout.split() and not {"datasets", "diffusers"} & set(done.stdout.split())
