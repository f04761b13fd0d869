"""A small Hub on the loopback, which the real clients read from and write to, and whatever can go wrong on the way."""

import json
import os
import re
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import parse_qs, unquote

from hub_repositories import Refused, Repository, card_errors, git_sha1, is_large, sha256


SHA = "0123456789abcdef0123456789abcdef01234567"
TOKENS = {"hf_" + "w" * 34: ("me", True), "hf_" + "r" * 34: ("me", False), "hf_" + "o" * 34: ("other", True)}
WRITE, READ, OTHER = TOKENS
NAME = r"(?P<name>[^/?]+/[^/?]+)"
KIND = "(?P<kind>models|datasets|spaces)"
RESOLVE = re.compile(rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
API = re.compile(rf"/api/{KIND}/{NAME}(?:/(?P<verb>[a-z-]+)(?:/(?P<revision>[^/]+)(?:/(?P<path>.+))?)?)?")
LFS = re.compile(rf"/(?:(?P<kind>datasets|spaces)/)?{NAME}\.git/info/lfs/objects/batch")


class Hub:
    """Stores repositories as the Hub does, within a `with` block.

    Args:
        files: read as the data set and the model of every name "someone/…".
        fault: asked before each request with its method, its path and how many requests have come before: a status, a
            status and headers, "drop" (the connection is closed, in the middle of a file or a body if there is one),
            "lost" (what was asked for is done, but nobody hears of it), "late" (the same, after a while), "cut" (the
            same, with half an answer), seconds to wait as a float, or None, if the request is answered.
        tokens: token -> (user, whether it may write); without any, all may do everything.
    """

    def __init__(
        self, files: dict[str, bytes] | None = None, fault: Callable | None = None, tokens: dict | None = None
    ):
        self.files, self.fault = files, fault or (lambda method, path, count: None)
        self.tokens = tokens or {}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.lock, self.closed = threading.Lock(), threading.Event()
        hub = self

        class Handler(_Handler):
            def hub(self):
                return hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.closed.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> Repository:
        """A model that is there from the beginning."""
        self.repositories["models", name] = Repository.new(name, private, files)
        return self.repositories["models", name]

    def repository(self, kind: str, name: str, token: str | None, writes: bool = False) -> Repository:
        user, can_write = self.tokens.get(token, (None, not self.tokens))
        found = self.repositories.get((kind, name))
        if found is None and self.files is not None and name.startswith("someone/"):
            return Repository.new(name, files=self.files, sha=SHA)
        if found is None or (found.private and user != found.owner and self.tokens):
            raise Refused(404 if user else 401, "RepoNotFound", "Repository not found")
        if writes and not (can_write and user in (found.owner, None)):
            raise Refused(403 if user else 401, message="You have read access, but no right to write")
        return found

    def create(self, options: dict, token: str | None) -> tuple[int, dict]:
        user, can_write = self.tokens.get(token, (None, not self.tokens))
        owner = options.get("organization") or user
        if not can_write or user not in (owner, None):
            raise Refused(403 if user else 401, message=f"You don't have the rights to create a model under {owner}")
        kind, name = options.get("type", "model") + "s", f"{owner}/{options['name']}"
        url = f"{self.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        self.repositories[kind, name] = Repository.new(name, options.get("visibility") == "private")
        return 200, {"url": url}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: bytes = b"", headers: dict | None = None) -> None:
        cut = self.fault in ("drop", "cut")
        if self.fault in ("lost", "late"):
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def send_json(self, value, status: int = 200) -> None:
        self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def do_GET(self):
        hub = self.hub()
        fault = self.fault = hub.fault(self.command, self.path, len(hub.requests))
        hub.requests.append(f"{self.command} {self.path} {self.headers.get('Range') or ''} -> {fault or 'answered'}")
        path, _, query = self.path.partition("?")
        is_file = RESOLVE.fullmatch(path)
        body = self.read_body(cut=fault == "drop")
        if fault == "late":
            self.connection.shutdown(socket.SHUT_RDWR)
        if isinstance(fault, float) or fault == "late":
            hub.closed.wait(0.05 if fault == "late" else fault)
        if isinstance(fault, int):
            fault = fault, {}
        if isinstance(fault, tuple):
            return self.answer(fault[0], headers=fault[1])
        if fault == "drop" and not is_file:
            self.close_connection = True
            return
        scheme, _, token = self.headers.get("Authorization", "").partition(" ")
        try:
            if token and hub.tokens and token not in hub.tokens:
                raise Refused(401, message="Invalid credentials in Authorization header")
            with hub.lock:
                answer = self.act(path, parse_qs(query), body, token)
        except Refused as refused:
            return self.answer(refused.status, headers=refused.headers)
        answer()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET

    def read_body(self, cut: bool) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
                if cut:
                    return b""
            self.rfile.readline()
            return body
        size = int(self.headers.get("Content-Length") or 0)
        return self.rfile.read(size // 2 if cut else size)

    def act(self, path: str, query: dict, body: bytes, token: str) -> Callable[[], None]:
        """Does what a request asks for; sends the answer when called."""
        hub = self.hub()
        if path == "/api/repos/create":
            status, created = hub.create(json.loads(body), token)
            return lambda: self.send_json(created, status)
        if path == "/api/validate-yaml":
            errors = card_errors(json.loads(body)["content"])
            return lambda: self.send_json({"errors": errors, "warnings": []}, 400 if errors else 200)
        if path == "/api/whoami-v2" and token:
            user, can_write = hub.tokens[token]
            role = {"accessToken": {"displayName": "test", "role": "write" if can_write else "read"}}
            return lambda: self.send_json({"type": "user", "name": user, "orgs": [], "auth": role})
        if match := re.fullmatch("/lfs/([0-9a-f]{64})", path):
            if sha256(body) != match[1]:
                raise Refused(400, message="The file is not the one that was announced")
            hub.large[match[1]] = body
            return lambda: self.answer(200)
        if path == "/lfs/verify":
            wanted = json.loads(body)
            if len(hub.large.get(wanted["oid"], b"")) != wanted["size"]:
                raise Refused(404, message="Object not found")
            return lambda: self.send_json({})
        if match := LFS.fullmatch(path):
            hub.repository(match["kind"] or "models", match["name"], token, writes=True)
            objects = [self.lfs_action(each) for each in json.loads(body)["objects"]]
            return lambda: self.send_json({"transfer": "basic", "objects": objects})
        if match := RESOLVE.fullmatch(path):
            repository = hub.repository(match["kind"] or "models", match["name"], token)
            commit, path = repository.at(unquote(match["revision"])), unquote(match["path"])
            if path not in commit.files:
                raise_missing(commit.sha)
            content = commit.files[path]
            return lambda: self.send_file(content, is_large(path, len(content)), commit.sha)
        if match := API.fullmatch(path):
            return self.act_on_repository(match, query, body, token)
        raise Refused(404, "RepoNotFound")

    def lfs_action(self, wanted: dict) -> dict:
        if wanted["oid"] in self.hub().large:
            return wanted
        url = f"{self.hub().url}/lfs"
        return wanted | {"actions": {"upload": {"href": f"{url}/{wanted['oid']}"}, "verify": {"href": f"{url}/verify"}}}

    def act_on_repository(self, match: re.Match, query: dict, body: bytes, token: str) -> Callable[[], None]:
        hub, verb = self.hub(), match["verb"]
        revision, folder = unquote(match["revision"] or "main"), unquote(match["path"] or "")
        writes = verb in ("preupload", "commit", "branch", "tag")
        repository = hub.repository(match["kind"], match["name"], token, writes)
        if verb in (None, "revision"):
            answer = repository.info(revision)
        elif verb == "refs":
            answer = repository.refs()
        elif verb == "commits":
            page = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "message": ""}
            answer = [page | {"id": commit.sha, "title": commit.title} for commit in repository.history(revision)]
        elif verb == "tree":
            answer = repository.at(revision).entries(folder, query.get("recursive") == ["true"])
            if folder and not answer:
                raise_missing(repository.at(revision).sha)
        elif verb == "paths-info":
            asked = parse_qs(body.decode())["paths"]
            answer = [entry for entry in repository.at(revision).entries() if entry["path"] in asked]
        elif verb == "preupload":
            answer = repository.preupload(revision, json.loads(body)["files"])
        elif verb == "commit":
            commit = repository.commit(revision, body, hub.large)
            url = f"{hub.url}/{repository.name}/commit/{commit.sha}"
            answer = {"success": True, "commitOid": commit.sha, "commitUrl": url}
        elif verb in ("branch", "tag"):
            options = json.loads(body)
            named, name = (repository.branches, revision) if verb == "branch" else (repository.tags, options["tag"])
            if name in named:
                raise Refused(409, message="Reference already exists")
            named[name] = repository.at(options.get("startingPoint", "main") if verb == "branch" else revision)
            answer = {}
        else:
            raise Refused(404, message=f"this Hub has no {verb}")
        return lambda: self.send_json(answer)

    def send_file(self, content: bytes, large: bool, sha: str) -> None:
        headers = {"ETag": f'"{git_sha1(content)}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if large:
            headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        if self.headers.get("Range"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
            if int(first) >= len(content):
                return self.answer(416, headers=headers)
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[int(first) : last + 1], headers)
        self.answer(200, content, headers)


def raise_missing(sha: str) -> None:
    missing = Refused(404, "EntryNotFound")
    missing.headers["X-Repo-Commit"] = sha
    raise missing


def hub_environment(hub: Hub, home: Path, token: str | None = None, **others: str) -> dict[str, str]:
    """The environment of a process that knows no other Hub than this one, and has its cache in `home`."""
    ours = ("HF_", "HUGGING", "TRANSFORMERS_OFFLINE", "LDAE_HUB", "LDAE_NO")
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.upper().startswith(ours) and not name.upper().endswith("_PROXY")
    }
    return kept | {
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]),
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **({"HF_TOKEN": token} if token else {}),
        **others,
    }


@contextmanager
def connected(hub: Hub, cache: Path) -> Iterator[list[float]]:
    """This process knows no other Hub, keeps its cache there, and does not sleep but lists how long it would have."""
    # Not before: some scripts name the Hub after they have imported this file.
    from huggingface_hub import close_session, constants

    waits, sleep = [], time.sleep
    address = dict(ENDPOINT=hub.url, HUGGINGFACE_CO_URL_TEMPLATE=hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    with (
        mock.patch.multiple(constants, **address, HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(cache)),
        mock.patch("transformers.utils.hub._hf_api", None),  # else one that an earlier test made, for another Hub
        mock.patch("time.sleep", lambda seconds: (waits.append(seconds), sleep(0.001))),
    ):
        yield waits
    close_session()
