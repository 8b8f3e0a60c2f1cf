"""Repositories, their commits and the contents of their files, all in memory."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".png", ".model", ".zip", ".arrow", ".parquet")


class HubError(Exception):
    """An answer other than success: HTTP status, the Hub's error code and a message."""

    def __init__(self, status: int, code: str = "", message: str = "", headers: Mapping[str, str] | None = None):
        super().__init__(message or code)
        self.status, self.code, self.headers = status, code, dict(headers or {})


@dataclass(frozen=True)
class Entry:
    """One file of a commit. `oid` is the git blob id (of the pointer, for LFS); `sha256` is set for LFS files only."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def blob(self) -> str:
        """Key of the content, also the file's ETag."""
        return self.sha256 or self.oid

    @property
    def pointer_size(self) -> int:
        """Bytes of the LFS pointer that stands for the file in git."""
        return len(_lfs_pointer(self.sha256 or "", self.size))


@dataclass(frozen=True)
class Commit:
    """An immutable snapshot of a repo."""

    sha: str
    parent: str | None
    files: Mapping[str, Entry]
    title: str
    message: str
    date: str


@dataclass
class Repo:
    """Commits and refs of one repo; refs are kept under their full git names (``refs/heads/main``)."""

    key: str  # as in a Hub URL: "owner/name", "datasets/owner/name"
    owner: str
    private: bool = False
    gated: str | bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def resolve(self, revision: str) -> Commit:
        """Commit that a branch, a tag, a full ref name or a commit hash (7 digits at least) points to."""
        for ref in (f"refs/heads/{revision}", f"refs/tags/{revision}", revision):
            if ref in self.refs:
                return self.commits[self.refs[ref]]
        if re.fullmatch(r"[0-9a-f]{7,40}", revision.lower()):
            found = [commit for sha, commit in self.commits.items() if sha.startswith(revision.lower())]
            if len(found) == 1:
                return found[0]
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def writable_ref(self, revision: str) -> str:
        """Full name of an existing branch or pull request: tags and bare commits cannot be committed to."""
        for ref in (f"refs/heads/{revision}", revision):
            if ref in self.refs and not ref.startswith("refs/tags/"):
                return ref
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")

    def commit(
        self, ref: str, parent: Commit | None, files: Mapping[str, Entry], title: str, message: str = ""
    ) -> Commit:
        """Adds a commit and moves `ref` to it."""
        now = time.time()
        date = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        # The number of commits is hashed too, else two equal commits within a millisecond would share an id.
        seed = [self.key, len(self.commits), parent and parent.sha, sorted((p, e.blob) for p, e in files.items())]
        sha = hashlib.sha1(json.dumps([*seed, title, message, date]).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent and parent.sha, dict(files), title, message, date)
        self.refs[ref] = sha
        return self.commits[sha]

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        current: Commit | None = commit
        while current is not None:
            yield current
            current = self.commits[current.parent] if current.parent else None

    def describe(self, commit: Commit, path: str, expand: bool = False) -> dict[str, Any] | None:
        """The Hub's JSON for a file or folder, None where there is neither."""
        oid = _oid_at(commit, path)
        if oid is None:
            return None
        entry = commit.files.get(path)
        if entry is None:
            info: dict[str, Any] = {"type": "directory", "oid": oid, "size": 0, "path": path}
        else:
            info = {"type": "file", "oid": entry.oid, "size": entry.size, "path": path}
            if entry.sha256:
                info["lfs"] = {"oid": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
        if expand:
            *_, last = itertools.takewhile(lambda past: _oid_at(past, path) == oid, self.history(commit))
            info["lastCommit"] = {"id": last.sha, "title": last.title, "date": last.date}
        return info

    def tree(self, commit: Commit, folder: str, recursive: bool) -> list[str]:
        """Paths in a folder, sub-folders first, as the Hub lists them."""
        prefix = f"{folder}/" if folder else ""
        inside = [path for path in commit.files if path.startswith(prefix)]
        if folder and not inside:
            raise HubError(404, "EntryNotFound", f"{folder} does not exist on this revision")
        folders, leaves = set(), []
        for path in inside:
            parts = path[len(prefix) :].split("/")
            for depth in range(1, len(parts) if recursive else min(2, len(parts))):
                folders.add(prefix + "/".join(parts[:depth]))
            if recursive or len(parts) == 1:
                leaves.append(path)
        return sorted(folders) + sorted(leaves)


def _lfs_pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def _git_oid(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def lfs_entry(sha256: str, size: int) -> Entry:
    """Entry of a file whose content is kept under its SHA-256 and whose git blob is a pointer to it."""
    return Entry(_git_oid(_lfs_pointer(sha256, size)), size, sha256)


def _oid_at(commit: Commit, path: str) -> str | None:
    """Id of the file or folder at `path`; a folder's id changes with anything in it."""
    if path in commit.files:
        return commit.files[path].oid
    inside = sorted((name, entry.oid) for name, entry in commit.files.items() if name.startswith(f"{path}/"))
    return hashlib.sha1(json.dumps(inside).encode()).hexdigest() if inside else None


class Storage:
    """All that a Hub holds: repos by key, contents by `Entry.blob`."""

    def __init__(self):
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}

    def add(self, path: str, data: bytes) -> Entry:
        """Keeps the content of a file, as a git blob or through LFS according to its name."""
        # An empty file never goes through LFS: the client sees to that itself.
        if not (path.endswith(LFS_SUFFIXES) and data):
            return self.add_regular(data)
        entry = lfs_entry(hashlib.sha256(data).hexdigest(), len(data))
        self.blobs[entry.blob] = data
        return entry

    def add_regular(self, data: bytes) -> Entry:
        """Keeps the content of a file as a git blob."""
        entry = Entry(_git_oid(data), len(data))
        self.blobs[entry.blob] = data
        return entry
