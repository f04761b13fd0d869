"""What a Hub keeps: repositories with their commits, and the large files that lie beside them."""

import base64
import hashlib
import json
from dataclasses import dataclass, field

import yaml


LARGE = 50_000  # bytes from which a file is kept with LFS, as are these
LARGE_ENDINGS = (".safetensors", ".png", ".parquet", ".tar", ".bin")
FIRST = ".gitattributes"  # what the Hub puts into a new repository


class Refused(Exception):
    """An answer that is none of the good ones: a status, and the Hub's code or a message for it."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(status, code, message)
        self.status = status
        named = {"X-Error-Code": code, "X-Error-Message": message}
        self.headers = {name: value for name, value in named.items() if value}


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def is_large(path: str, size: int) -> bool:
    return size > 0 and (size >= LARGE or path.endswith(LARGE_ENDINGS))


@dataclass
class Commit:
    """All files as they are then."""

    sha: str
    files: dict[str, bytes]
    title: str = "initial commit"
    parent: "Commit | None" = None

    def entries(self, folder: str = "", recursive: bool = True) -> list[dict]:
        """The files below a folder, as the Hub lists them, with the folders that these lie in."""
        listed, folders, start = [], set(), f"{folder}/" if folder else ""
        for path, content in self.files.items():
            inside = path[len(start) :] if path.startswith(start) else ""
            if not inside:
                continue
            parts = inside.split("/")
            depth = len(parts) if recursive else 2
            folders.update(start + "/".join(parts[:end]) for end in range(1, min(depth, len(parts))))
            if recursive or len(parts) == 1:
                listed.append(self.entry(path, content))
        return [{"type": "directory", "oid": "0" * 40, "size": 0, "path": path} for path in sorted(folders)] + listed

    @staticmethod
    def entry(path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}
        if is_large(path, len(content)):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
        return entry


@dataclass
class Repository:
    """Files under commits, branches and tags; `owner` sees it if it is private, and alone may write to it."""

    name: str
    private: bool = False
    branches: dict[str, Commit] = field(default_factory=dict)
    tags: dict[str, Commit] = field(default_factory=dict)
    commits: dict[str, Commit] = field(default_factory=dict)

    @classmethod
    def new(cls, name: str, private: bool = False, files: dict[str, bytes] | None = None, sha: str | None = None):
        commit = Commit(
            sha or sha256(name.encode())[:40], {FIRST: b"*.safetensors filter=lfs\n"} if files is None else files
        )
        return cls(name, private, {"main": commit}, {}, {commit.sha: commit})

    @property
    def owner(self) -> str:
        return self.name.split("/")[0]

    @property
    def files(self) -> dict[str, bytes]:
        """Of `main`, but for the Hub's own."""
        return {path: content for path, content in self.branches["main"].files.items() if path != FIRST}

    def history(self, branch: str = "main") -> list[Commit]:
        """Newest first."""
        commits, commit = [], self.branches[branch]
        while commit:
            commits.append(commit)
            commit = commit.parent
        return commits

    def at(self, revision: str) -> Commit:
        for found in (self.branches, self.tags, self.commits):
            if revision in found:
                return found[revision]
        raise Refused(404, "RevisionNotFound")

    def info(self, revision: str) -> dict:
        commit = self.at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": self.name, "sha": commit.sha, "siblings": siblings, "private": self.private, "tags": []}

    def refs(self) -> dict:
        return {
            kind: [{"name": name, "ref": f"refs/{ref}/{name}", "targetCommit": c.sha} for name, c in commits.items()]
            for kind, ref, commits in (("branches", "heads", self.branches), ("tags", "tags", self.tags))
        } | {"converts": []}

    def preupload(self, revision: str, files: list[dict]) -> dict:
        """How each file is to be sent, and the digest of the one that is there."""
        present, answers = self.at(revision).files, []
        for path, size in ((file["path"], file["size"]) for file in files):
            large, content = is_large(path, size), present.get(path)
            oid = None if content is None else sha256(content) if large else git_sha1(content)
            mode = "lfs" if large else "regular"
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def commit(self, branch: str, lines: bytes, large: dict[str, bytes]) -> Commit:
        """Applies the operations of a commit, one JSON object a line."""
        operations = [json.loads(line) for line in lines.splitlines()]
        header, before = operations[0]["value"], self.branches.get(branch)
        if before is None:
            raise Refused(404, "RevisionNotFound")
        if header.get("parentCommit") not in (None, before.sha):
            raise Refused(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(before.files)
        for key, value in ((operation["key"], operation["value"]) for operation in operations[1:]):
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if value["oid"] not in large:
                    raise Refused(
                        400, message=f"Your push was rejected because an LFS pointer is dangling: {value['path']}"
                    )
                files[value["path"]] = large[value["oid"]]
            elif key == "deletedFile":
                if files.pop(value["path"], None) is None:
                    raise Refused(404, "EntryNotFound", "A file with this name doesn't exist")
            elif key == "deletedFolder":
                files = {path: content for path, content in files.items() if not path.startswith(value["path"])}
        sha = sha256(before.sha.encode() + lines)[:40]
        commit = Commit(sha, files, header["summary"], before)
        self.branches[branch] = self.commits[sha] = commit
        return commit


def card_errors(content: str) -> list[dict]:
    """What is wrong with the metadata of a card."""
    parts = content.split("---\n")
    try:
        metadata = yaml.safe_load(parts[1]) if content.startswith("---\n") and len(parts) > 2 else {}
    except yaml.YAMLError as error:
        return [{"message": str(error)}]
    return [] if isinstance(metadata, dict) else [{"message": "the metadata is no mapping"}]
