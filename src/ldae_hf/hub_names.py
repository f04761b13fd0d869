"""Names on the Hub: which are safe to use, and what the bare names of our own models mean.

After `import ldae_hf`, reading "ldae-vit-l" reads "OWNER/ldae-vit-l", in transformers too, which knows nothing of it: a
hook of huggingface_hub's public client factory rewrites the address of such a request. Nothing that writes is changed,
so `push_to_hub("ldae-vit-l")` goes to the user's own namespace, as everywhere.
"""

import logging
import os
import re

from huggingface_hub import constants, set_async_client_factory, set_client_factory
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import _http, httpx, validate_repo_id


logger = logging.getLogger(__name__)

MODELS = ("ldae-vit-b", "ldae-vit-half-l", "ldae-vit-l")
NAMES = "|".join(MODELS)
READS = re.compile(rf"/api/models/({NAMES})(?:/(?:revision|tree|refs|commits|paths-info|xet-read-token)/.+|/refs)?")
FILES = re.compile(rf"/({NAMES})/resolve/.+")
LONGEST_NAME, LONGEST_PART = 1024, 255  # bytes of a file's name, and of one folder in it
_announced: set[str] = set()


def check_repo_id(repo_id: str) -> None:
    """Looks at the name of a repository before it gets near the network or the disk.

    Raises:
        ValueError: it is not NAME or OWNER/NAME as the Hub has them.
    """
    try:
        if not isinstance(repo_id, str):
            raise HFValidationError
        validate_repo_id(repo_id)
    except HFValidationError:
        raise ValueError(
            f"{shown(repo_id)} names no repository of the Hub: that is NAME or OWNER/NAME, of letters, digits, '-', "
            "'_' and '.', each at most 96 characters long, without '--' or '..' and with no '-' or '.' at either end."
        ) from None


def check_file_name(name: str) -> None:
    """Looks at the name of a file in a repository, with its folders, before anything is opened or written.

    Raises:
        ValueError: it is absolute or leads out of the repository, is too long, or holds characters (control characters,
            '\\', ':') or a folder (`.git`) that no file of a model needs.
    """
    if reason := _reason(name):
        raise ValueError(f"{shown(name)} is no name for a file of a repository: {reason}.")


def _reason(name: str) -> str | None:
    """What is wrong with a file's name."""
    if not isinstance(name, str) or not name:
        return "it is no text, or empty"
    if not name.isprintable():
        return "it holds a character that cannot be printed"
    if "\\" in name or ":" in name:
        return "it holds a '\\' or a ':'"
    parts = name.split("/")
    if not parts[0]:
        return "it is absolute"
    if ".." in parts or "." in parts or "" in parts:
        return "it has a part that is empty, '.' or '..'"
    if ".git" in name.lower().split("/"):
        return "it lies in a folder .git"
    if len(name.encode()) > LONGEST_NAME or any(len(part.encode()) > LONGEST_PART for part in parts):
        return "it is too long"
    return None


def shown(name: object) -> str:
    """A name that may hold anything, for a message."""
    text = name[:60] + "…" if isinstance(name, str) and len(name) > 60 else name
    return ascii(text) if isinstance(text, str) and not text.isprintable() else repr(text)


def owner() -> str:
    """Whose models the bare names mean: `LDAE_HUB_OWNER`, else "ldae-hf".

    Raises:
        ValueError: the variable holds no name of an owner.
    """
    name = os.environ.get("LDAE_HUB_OWNER") or "ldae-hf"
    try:
        check_repo_id(f"{name}/{MODELS[0]}")
    except ValueError:
        raise ValueError(f"LDAE_HUB_OWNER is {shown(name)}, which names no user or organisation of the Hub.") from None
    return name


def full_name(name: str) -> str:
    """OWNER/NAME for a bare name of ours, any other name as it is; raises ValueError as `check_repo_id` does."""
    check_repo_id(name)
    return f"{owner()}/{name}" if name in MODELS else name


def install() -> None:
    """Gives our bare names their meaning in this process, unless `LDAE_NO_ALIASES` is set or it has other clients.

    Whoever has told huggingface_hub how to make its clients, before or after this, keeps them without the bare names.
    """
    if os.environ.get("LDAE_NO_ALIASES", "0") not in ("", "0"):
        return
    # huggingface_hub has no public way to ask for the factory. If it moves, there are no bare names rather than a
    # client without a user's proxy; a test would tell.
    if _is_default("_GLOBAL_CLIENT_FACTORY", "default_client_factory"):
        set_client_factory(_client)
    if _is_default("_GLOBAL_ASYNC_CLIENT_FACTORY", "default_async_client_factory"):
        set_async_client_factory(_async_client)


def _is_default(current: str, default: str) -> bool:
    return getattr(_http, current, None) is getattr(_http, default, default)


def _client() -> httpx.Client:
    client = _http.default_client_factory()
    client.event_hooks["request"].append(_rewrite)
    return client


def _async_client() -> httpx.AsyncClient:
    async def rewrite(request: httpx.Request) -> None:
        _rewrite(request)

    client = _http.default_async_client_factory()
    client.event_hooks["request"].append(rewrite)
    return client


def _rewrite(request: httpx.Request) -> None:
    """Sends a request that reads one of our bare names from the Hub to the owner's repository."""
    hub, url = httpx.URL(constants.ENDPOINT), request.url
    if (url.scheme, url.host, url.port) != (hub.scheme, hub.host, hub.port):
        return
    root = hub.raw_path.decode().rstrip("/")  # a mirror may lie in a folder
    path, mark, query = url.raw_path.decode().partition("?")
    if not path.startswith(f"{root}/"):
        return
    is_read = request.method in ("GET", "HEAD") or (request.method == "POST" and "/paths-info/" in path)
    match = (READS.fullmatch(path, len(root)) or FILES.fullmatch(path, len(root))) if is_read else None
    if match is None:
        return
    name, begins = match[1], match.start(1)
    request.url = url.copy_with(raw_path=f"{path[:begins]}{owner()}/{path[begins:]}{mark}{query}".encode())
    if name not in _announced:
        _announced.add(name)
        logger.info(
            "%s is read from %s/%s/%s; LDAE_HUB_OWNER names another owner, and LDAE_NO_ALIASES=1 leaves names alone.",
            name,
            constants.ENDPOINT,
            owner(),
            name,
        )
