"""A folder to the Hub and back: in one commit, patiently, without a token in any message and without any pickle."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token, snapshot_download
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.utils import (
    are_progress_bars_disabled,
    disable_progress_bars,
    enable_progress_bars,
    filter_repo_objects,
    httpx,
)

from .hub_names import check_file_name, check_repo_id, full_name
from .patience import LOG_IN, ReadingPatience, WritingPatience, patiently


__all__ = ["check_file_name", "check_repo_id", "download", "fetch", "full_name", "upload", "write_token"]

KEPT = ".gitattributes"  # the Hub's own: without it large files are no longer seen as such
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
NOT_FETCHED = [KEPT] + ["*" + "".join(f"[{letter}{letter.upper()}]" for letter in ending) for ending in PICKLES]


def upload(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    message: str = "Upload with ldae",
    delete_patterns: str | list[str] | None = None,
    progress: bool = True,
) -> str:
    """Puts all files of a folder into a model repository, which is made if it is not there, in one commit.

    Failures that pass are waited for. What has arrived is not sent again, neither then nor when the same upload is
    started anew; where nothing has changed there is no commit.

    Args:
        repo_id: OWNER/NAME; a bare NAME is one of the token's own user, whatever it means for reading.
        private: of a new repository; default as its owner has it.
        revision: a branch, made from `main` if it is not there; default `main`.
        token: with the right to write; default the one of `hf auth login` or HF_TOKEN.
        message: of the commit.
        delete_patterns: files of the repository that match one of these and are not in the folder are deleted.
        progress: show huggingface_hub's bars.

    Returns:
        The address of the commit that holds the folder.

    Raises:
        ValueError: a name is none, the folder is none or empty, there is no token, or the Hub refuses.
        ConnectionError: the Hub could not be reached, or failed, over and over.
    """
    check_repo_id(repo_id)
    files = _files(Path(folder))
    if constants.HF_HUB_OFFLINE:
        raise ValueError(f"Nothing can be uploaded to {repo_id} while HF_HUB_OFFLINE is set: unset it.")
    api = HfApi(token=write_token(token, repo_id))

    def create() -> str:
        # In full from here on: to read a bare name of ours would be to read the owner's.
        name = repo_id if "/" in repo_id else f"{api.whoami()['name']}/{repo_id}"
        api.create_repo(name, private=private, exist_ok=True)
        if revision not in (None, constants.DEFAULT_REVISION):
            api.create_branch(name, branch=revision, exist_ok=True)
        return name

    def commit() -> str:
        # The parent makes a second try safe: if the first has arrived after all, this does nothing or is refused.
        parent = api.model_info(name, revision=revision).sha
        operations = [CommitOperationAdd(path, file) for path, file in files.items()]
        if delete_patterns is not None:
            there = filter_repo_objects(api.list_repo_files(name, revision=parent), allow_patterns=delete_patterns)
            operations += [CommitOperationDelete(path) for path in there if path not in files and path != KEPT]
        return api.create_commit(
            name, operations, commit_message=message, revision=revision, parent_commit=parent
        ).commit_url

    with _bars(progress):
        name = patiently(create, WritingPatience(f"Making the repository {repo_id}", repo_id, api.token))
        return patiently(commit, WritingPatience(f"Uploading {folder} to {name}", name, api.token))


def fetch(
    name: str,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: str | list[str] | None = None,
) -> Path:
    """A model repository in the cache of huggingface_hub; nothing in it is run or unpickled.

    Without a network, or offline, it is what an earlier call has left there.

    Args:
        name: OWNER/NAME, or a bare name of ours. revision: a branch, a tag or a commit.
        token: default the one of `hf auth login` or HF_TOKEN.
        allow_patterns: only files that match one of these. Pickles (`.bin`, `.pt`, `.pth`, …) are never fetched.

    Returns:
        A folder of links, which is not to be written to.

    Raises:
        ValueError: the name is none, a file has a name that is not safe, or the Hub refuses.
        ConnectionError: the Hub could not be reached, or failed, over and over.
    """
    repo_id = full_name(name)
    api = HfApi(token=_checked(token) if token else None)

    def ask() -> str:
        try:
            for path in api.list_repo_files(repo_id, revision=revision):
                check_file_name(path)
        except (httpx.TransportError, OfflineModeIsEnabled):
            pass  # what is in the cache was looked at when it came
        return snapshot_download(
            repo_id,
            revision=revision,
            token=api.token,
            allow_patterns=allow_patterns,
            ignore_patterns=NOT_FETCHED,
        )

    return Path(patiently(ask, ReadingPatience(f"Downloading {repo_id}", repo_id, api.token, revision)))


def download(
    name: str,
    folder: str | Path,
    *,
    revision: str | None = None,
    token: str | None = None,
    allow_patterns: str | list[str] | None = None,
) -> Path:
    """A new folder of a model repository's files, whole or not at all; takes and raises what [`fetch`] does.

    Raises:
        ValueError: the folder is there already, or no file matches.
        OSError: the disk is full, or something else is wrong with it.
    """
    folder = Path(folder)
    check_repo_id(name)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"{folder} is there already; name a folder that is not, or remove it.")
    snapshot = fetch(name, revision=revision, token=token, allow_patterns=allow_patterns)
    # What an earlier download has left in the cache may be more.
    there = [path.relative_to(snapshot).as_posix() for path in sorted(snapshot.rglob("*")) if path.is_file()]
    files = list(filter_repo_objects(there, allow_patterns=allow_patterns, ignore_patterns=NOT_FETCHED))
    if not files:
        raise ValueError(f"{name} holds no file that matches {allow_patterns or 'anything but pickles'}.")
    aside = folder.with_name(f".{folder.name}.writing")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        for path in files:
            (aside / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(snapshot / path, aside / path)  # the cache holds links
        aside.rename(folder)  # one that is there is empty
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return folder


def _files(folder: Path) -> dict[str, Path]:
    """Name in the repository -> file, of all files of a folder but those that huggingface_hub or git keep there."""
    if not folder.is_dir():
        raise ValueError(f"There is no folder {folder} to upload.")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    files = {name: path for name, path in paths.items() if not {".git", ".cache"} & set(name.split("/"))}
    for name in files:
        check_file_name(name)
    if not files:
        raise ValueError(f"{folder} holds no file to upload.")
    return files


def write_token(token: str | None, repo_id: str) -> str:
    """The token to write with. Raises ValueError if there is none, or none that could be sent."""
    if token := token or get_token():
        return _checked(token)
    raise ValueError(
        f"{repo_id} cannot be written without a token, and none was found: {LOG_IN}, to one of "
        f"{constants.ENDPOINT}/settings/tokens that may write."
    )


def _checked(token: str) -> str:
    if not (token.isascii() and token.isprintable()) or " " in token:
        raise ValueError("The token holds a space, a line end or another character that no token has: copy it anew.")
    return token


@contextmanager
def _bars(shown: bool) -> Iterator[None]:
    """Without huggingface_hub's progress bars, unless they are to be shown."""
    if shown or are_progress_bars_disabled():
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()
