"""A small Hub on the loopback: data sets, models, and whatever can go wrong on the way to them."""

import json
import re
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


NAME = "someone/[^/?]+"
SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` as the Hub does, as a data set or a model of any name "someone/…", within a `with` block.

    Args:
        fault: asked before each request with its method, its path and how many requests have come before: a status,
            a status and headers, "drop" (the connection is closed, in the middle of a file if one is asked for), or
            None, if the request is answered.
    """

    def __init__(self, files: dict[str, bytes], fault: Callable | None = None):
        self.files, self.fault = files, fault or (lambda method, path, count: None)
        self.requests: list[str] = []
        hub = self

        class Handler(_Handler):
            def hub(self):
                return hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: bytes = b"", headers: dict | None = None, cut: bool = False) -> None:
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self.close_connection = True

    def do_GET(self):
        hub, path = self.hub(), self.path
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        fault = hub.fault(self.command, path, len(hub.requests))
        hub.requests.append(f"{self.command} {path} {self.headers.get('Range') or ''} -> {fault or 'answered'}")
        drop = fault == "drop"
        if isinstance(fault, int):
            fault = fault, {}
        if isinstance(fault, tuple):
            return self.answer(fault[0], headers=fault[1])
        listing = [{"type": "file", "path": p, "size": len(c), "oid": "0" * 40} for p, c in hub.files.items()]
        if (file := re.fullmatch(rf"(?:/datasets)?/{NAME}/resolve/[^/]+/(.+?)(\?.*)?", path)) and file[1] in hub.files:
            return self.send_file(hub.files[file[1]], drop)
        if drop:
            self.close_connection = True
        elif re.match(rf"(?:/datasets)?/{NAME}/resolve/", path):
            self.answer(404, headers={"X-Error-Code": "EntryNotFound", "X-Repo-Commit": SHA})
        elif re.match(rf"/api/(?:datasets|models)/{NAME}/tree/[^/]+(\?.*)?$", path):
            self.send_json(listing)
        elif re.match(rf"/api/(?:datasets|models)/{NAME}/tree/", path):  # no file lies in a folder
            self.answer(404, headers={"X-Error-Code": "EntryNotFound"})
        elif re.match(rf"/api/(?:datasets|models)/{NAME}/paths-info/", path):
            self.send_json([entry for entry in listing if entry["path"] in body.replace("%2F", "/")])
        elif re.match(rf"/api/(?:datasets|models)/{NAME}(/revision/.*)?(\?.*)?$", path):
            siblings = [{"rfilename": entry["path"]} for entry in listing]
            self.send_json(
                {
                    "id": re.match(rf"/api/\w+/({NAME})", path)[1],
                    "sha": SHA,
                    "siblings": siblings,
                    "private": False,
                    "tags": [],
                }
            )
        else:
            self.answer(404, headers={"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_POST = do_GET

    def send_json(self, value) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def send_file(self, content: bytes, cut: bool) -> None:
        headers = {"ETag": f'"{hash(content):x}"', "X-Repo-Commit": SHA, "Accept-Ranges": "bytes"}
        if self.headers.get("Range"):
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
            if int(first) >= len(content):
                return self.answer(416, headers=headers)
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            return self.answer(206, content[int(first) : last + 1], headers, cut)
        self.answer(200, content, headers, cut)
