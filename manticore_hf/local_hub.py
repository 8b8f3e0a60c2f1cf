"""A small Hugging Face Hub on loopback, for tests and rehearsals of uploads.

The real ``huggingface_hub`` client talks to it, so what is exercised is the client's own code with nothing patched.
Everything lives in memory. Only the standard library is used: the client reads its endpoint when it is imported, so
this module has to be usable before that.

Files are stored as on the Hub: small ones as git blobs, large ones through Git LFS. The Xet protocol is not spoken,
which is why :meth:`LocalHub.environment` switches it off in the client.

Any bearer token is accepted as the user ``tester``; a private or gated repo opens only to the token that created it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import itertools
import json
import re
import shlex
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

USER = "tester"
TOKEN = "hf_local_hub_dummy_token"
LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pt", ".png", ".model", ".zip", ".arrow", ".parquet")
BODY_FAULTS = ("cut", "flip", "truncate")
FAULTS = ("status", "gated", "unauthorized", "missing", *BODY_FAULTS)


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


def _lfs_entry(sha256: str, size: int) -> Entry:
    return Entry(_git_oid(_lfs_pointer(sha256, size)), size, sha256)


def _oid_at(commit: Commit, path: str) -> str | None:
    """Id of the file or folder at `path`; a folder's id changes with anything in it."""
    if path in commit.files:
        return commit.files[path].oid
    inside = sorted((name, entry.oid) for name, entry in commit.files.items() if name.startswith(f"{path}/"))
    return hashlib.sha1(json.dumps(inside).encode()).hexdigest() if inside else None


def read_card(text: str) -> tuple[dict[str, str] | None, list[str]]:
    """Top-level scalars of a README's metadata block (None where there is no block), and the errors in it.

    The standard library has no YAML parser: this finds the plain mistakes that would make the Hub refuse a card.
    """
    block = re.match(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|\Z)", text, re.DOTALL)
    metadata: dict[str, str] = {}
    errors = []
    for line in block[1].splitlines() if block else []:
        pair = re.match(r"([^\s:#\-][^:]*):(?:\s+(.*))?$", line)
        if line.startswith("\t") or (pair is None and re.match(r"[^\s#\-]", line)):
            errors.append(f"not YAML: {line!r}")
        elif pair and pair[1] in metadata:
            errors.append(f"duplicated key: {pair[1]!r}")
        elif pair:
            metadata[pair[1]] = (pair[2] or "").strip(" '\"")
    if re.search(r"[^a-z0-9.\-\[\], ]", metadata.get("license", "")):
        errors.append('"license" must be an identifier from the Hub\'s list')
    if metadata.get("tags", "[")[:1] not in ("", "["):
        errors.append('"tags" must be an array')
    return (metadata if block else None), errors


@dataclass
class Call:
    """One request, its path already matched and unquoted into `args`."""

    method: str
    args: dict[str, str]
    query: dict[str, list[str]]
    headers: Mapping[str, str]
    body: bytes
    token: str | None

    @property
    def repo_key(self) -> str:
        kind = self.args.get("kind") or "models"
        return self.args["name"] if kind == "models" else f"{kind}/{self.args['name']}"

    def json(self) -> dict[str, Any]:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    """What goes back; `cut` closes the connection after that many bytes of the body."""

    body: bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Fault:
    pattern: str
    kind: str
    times: int
    options: dict[str, Any]


def _json(data: Any, status: int = 200) -> Response:
    return Response(json.dumps(data).encode(), status, {"Content-Type": "application/json; charset=utf-8"})


def _error(error: HubError) -> Response:
    response = _json({"error": str(error)}, error.status)
    # Header values are latin-1 on the wire, and the client puts this one into its exceptions.
    response.headers["X-Error-Message"] = str(error).encode("ascii", "replace").decode().replace("\n", " ")
    if error.code:
        response.headers["X-Error-Code"] = error.code
    response.headers.update(error.headers)
    return response


ROUTES: list[tuple[str, re.Pattern[str], Callable[..., Response], bool]] = []
_API = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+(?:/[^/]+)?)"
_PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<name>[^/]+(?:/[^/]+)?)"
# The client quotes the slashes of refs/pr/1; people and browsers do not.
_REV = r"/(?P<rev>refs/(?:pr|convert)/[^/]+|[^/]+)"


def _route(method: str, pattern: str, write: bool = False) -> Callable:
    """Adds a handler to the routing table.

    The first match wins, HEAD is served as GET, `write` needs a token. Where the pattern names a repo, the handler
    gets it as its last argument.
    """

    def add(handler: Callable) -> Callable:
        ROUTES.append((method, re.compile(pattern), handler, write))
        return handler

    return add


class LocalHub:
    """A Hub on loopback, in memory.

    Attributes:
        url: ``http://127.0.0.1:PORT``, to give to the client as its endpoint.
        requests: ``(method, path)`` of every request so far, the path unquoted and without its query.
    """

    def __init__(self, port: int = 0):
        self._repos: dict[str, Repo] = {}
        self._blobs: dict[str, bytes] = {}
        self._faults: list[Fault] = []
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._server = _Server(("127.0.0.1", port), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.requests: list[tuple[str, str]] = []

    def start(self) -> LocalHub:
        """Serves from a background thread."""
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def close(self) -> None:
        """Stops serving and drops open connections, so that clients find nobody there."""
        if self._thread is not None:
            self._server.shutdown()
            self._thread.join()
            self._thread = None
        self._server.server_close()
        self._server.drop_connections()

    def __enter__(self):
        return self.start()

    def __exit__(self, *exc: object) -> None:
        self.close()

    def environment(self, home: str | Path) -> dict[str, str]:
        """Variables, to lay over ``os.environ``, that keep a child process on this Hub with its caches in `home`."""
        home = Path(home)
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            # These win over HF_HOME where the calling process has them set.
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_ASSETS_CACHE": str(home / "assets"),
            "HF_MODULES_CACHE": str(home / "modules"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            # Staging mode replaces the endpoint by a public one.
            "HUGGINGFACE_CO_STAGING": "0",
            # A .bin checkpoint makes transformers call a public Space, token in hand, to convert it.
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }

    def clear_requests(self) -> None:
        """Empties the request log."""
        self.requests.clear()

    def add_repo(
        self,
        repo_id: str,
        files: Mapping[str, bytes] | str | Path,
        branch: str = "main",
        *,
        private: bool = False,
        gated: str | bool = False,
    ) -> str:
        """Commits exactly `files` to a branch, making repo and branch as needed; no request is involved.

        Args:
            repo_id: ``owner/name``, or ``datasets/owner/name`` for a dataset.
            files: Contents by path, or a folder.
            branch: Branch to commit to; a new one starts at ``main``.
            private: Whether a new repo is private, hence visible only with this module's `TOKEN`.
            gated: Whether a new repo is gated: False, "auto" or "manual".

        Returns:
            The commit hash.
        """
        if not isinstance(files, Mapping):
            root = Path(files)
            files = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
        with self._lock:
            repo = self._repos.setdefault(repo_id, Repo(repo_id, TOKEN, private, gated))
            if branch != "main" and not repo.refs:
                repo.commit("refs/heads/main", None, {}, "initial commit")
            parent = repo.refs.get(f"refs/heads/{branch}") or repo.refs.get("refs/heads/main")
            entries = {path: self._store(path, data) for path, data in files.items()}
            start = repo.commits[parent] if parent else None
            return repo.commit(f"refs/heads/{branch}", start, entries, "Add files").sha

    def head(self, repo_id: str, revision: str = "main") -> str:
        """Commit hash of a revision."""
        with self._lock:
            return self._repos[repo_id].resolve(revision).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path at a revision."""
        with self._lock:
            commit = self._repos[repo_id].resolve(revision)
            return {path: self._blobs[entry.blob] for path, entry in commit.files.items()}

    def fault(self, pattern: str, kind: str, times: int = 1, **options: Any) -> None:
        """Makes coming requests fail.

        Args:
            pattern: Regular expression searched for in ``"METHOD path"``, path as in `requests`.
            kind: "status" (options `status`=503, `retry_after`=0, `message`); "cut" (only the first `bytes` of the
                body, then the connection closes; half of it by default), "flip" (one byte of the body, at `offset`,
                is wrong), "truncate" (only the first `bytes`, and a Content-Length that agrees): these three leave
                HEAD requests alone; "gated" (`status`=403); "unauthorized"; "missing" (`code`="EntryNotFound").
            times: How many requests it hits; a negative number is no limit.
            **options: See `kind`.
        """
        if kind not in FAULTS:
            raise ValueError(f"kind must be one of {FAULTS}, got {kind!r}")
        with self._lock:
            self._faults.append(Fault(pattern, kind, times, options))

    def clear_faults(self) -> None:
        """Forgets the faults that are still to come."""
        with self._lock:
            self._faults.clear()

    def answer(self, method: str, target: str, headers: Mapping[str, str], body: bytes) -> Response:
        """Response to one request: logs it, applies faults, finds the handler."""
        url = urlsplit(target)
        path = unquote(url.path)
        self.requests.append((method, path))
        token = (headers.get("Authorization") or "").removeprefix("Bearer ").strip() or None
        with self._lock:
            fault = self._take_fault(method, path)
            try:
                if fault is not None:
                    _raise_fault(fault)
                response = self._dispatch(method, url.path, parse_qs(url.query), headers, body, token)
            except HubError as error:
                response = _error(error)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong here, the client must get an answer
                traceback.print_exc(file=sys.stderr)
                response = _error(HubError(500, message=f"LocalHub failed: {error!r}"))
        if fault is not None:
            _spoil(response, fault)
        return response

    def _take_fault(self, method: str, path: str) -> Fault | None:
        for fault in self._faults:
            spoils_nothing = fault.kind in BODY_FAULTS and method == "HEAD"
            if fault.times != 0 and not spoils_nothing and re.search(fault.pattern, f"{method} {path}"):
                fault.times -= 1
                return fault
        return None

    def _dispatch(
        self, method: str, path: str, query: dict, headers: Mapping, body: bytes, token: str | None
    ) -> Response:
        for verb, pattern, handler, write in ROUTES:
            match = pattern.fullmatch(path) if verb == ("GET" if method == "HEAD" else method) else None
            if match is None:
                continue
            if write and token is None:
                raise HubError(401, message="Invalid username or password.")
            args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
            call = Call(method, args, query, headers, body, token)
            return handler(self, call, self._repo(call)) if "name" in args else handler(self, call)
        raise HubError(404, message=f"No such endpoint: {method} {path}")

    def _store(self, path: str, data: bytes) -> Entry:
        # An empty file never goes through LFS: the client sees to that itself.
        if path.endswith(LFS_SUFFIXES) and data:
            entry = _lfs_entry(hashlib.sha256(data).hexdigest(), len(data))
        else:
            entry = Entry(_git_oid(data), len(data))
        self._blobs[entry.blob] = data
        return entry

    def _repo(self, call: Call) -> Repo:
        repo = self._repos.get(call.repo_key)
        if repo is None or (repo.private and call.token != repo.owner):
            # The Hub does not tell a private repo from a missing one, and asks strangers to log in first.
            raise HubError(404 if call.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def _check_gate(self, repo: Repo, call: Call) -> None:
        if repo.gated and call.token != repo.owner:
            message = f"Access to model {repo.key} is restricted and you are not in the authorized list."
            raise HubError(403 if call.token else 401, "GatedRepo", message)

    @_route("GET", "/api/whoami-v2", write=True)
    def _whoami(self, call: Call) -> Response:
        access = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
        return _json({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": access})

    @_route("POST", "/api/validate-yaml")
    def _validate_yaml(self, call: Call) -> Response:
        metadata, errors = read_card(call.json().get("content", ""))
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        status = 400 if errors else 200
        return _json({"errors": [{"message": error} for error in errors], "warnings": warnings}, status)

    @_route("POST", "/api/repos/create", write=True)
    def _create_repo(self, call: Call) -> Response:
        ask = call.json()
        kind = ask.get("type") or "model"
        repo_id = f"{ask.get('organization') or USER}/{ask['name']}"
        key = repo_id if kind == "model" else f"{kind}s/{repo_id}"
        answer = {"url": f"{self.url}/{key}", "name": repo_id, "id": repo_id}
        if key in self._repos:
            return _json({**answer, "error": f"You already created this {kind} repo"}, 409)
        private = ask.get("visibility") == "private" or bool(ask.get("private"))
        repo = self._repos[key] = Repo(key, call.token or "", private)
        rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
        first = {".gitattributes": self._store(".gitattributes", rules)}
        repo.commit("refs/heads/main", None, first, "initial commit")
        return _json(answer)

    @_route("DELETE", "/api/repos/delete", write=True)
    def _delete_repo(self, call: Call) -> Response:
        ask = call.json()
        call.args = {
            "kind": f"{ask.get('type') or 'model'}s",
            "name": f"{ask.get('organization') or USER}/{ask['name']}",
        }
        del self._repos[self._repo(call).key]
        return _json({})

    @_route("GET", f"{_API}/refs")
    def _refs(self, call: Call, repo: Repo) -> Response:
        def under(prefix: str) -> list[dict[str, str]]:
            found = [(ref, sha) for ref, sha in repo.refs.items() if ref.startswith(prefix)]
            return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

        refs = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
        return _json({**refs, "pullRequests": under("refs/pr/")} if call.flag("include_prs") else refs)

    @_route("GET", f"{_API}/commits{_REV}")
    def _commits(self, call: Call, repo: Repo) -> Response:
        log = []
        for past in repo.history(repo.resolve(call.args["rev"])):
            about = {"id": past.sha, "title": past.title, "message": past.message, "date": past.date}
            log.append({**about, "authors": [{"user": USER}]})
        return _json(log)

    @_route("GET", f"{_API}/tree{_REV}(?:/(?P<path>.+))?")
    def _tree(self, call: Call, repo: Repo) -> Response:
        commit = repo.resolve(call.args["rev"])
        paths = repo.tree(commit, call.args.get("path", "").strip("/"), call.flag("recursive"))
        return _json([repo.describe(commit, path, call.flag("expand")) for path in paths])

    @_route("POST", f"{_API}/paths-info{_REV}")
    def _paths_info(self, call: Call, repo: Repo) -> Response:
        commit = repo.resolve(call.args["rev"])
        form = parse_qs(call.body.decode())
        expand = form.get("expand", [""])[0].lower() == "true"
        found = [repo.describe(commit, path.strip("/"), expand) for path in form.get("paths", [])]
        return _json([info for info in found if info is not None])

    @_route("POST", f"{_API}/branch/(?P<branch>.+)", write=True)
    def _create_branch(self, call: Call, repo: Repo) -> Response:
        branch = call.args["branch"]
        start = repo.resolve(call.json().get("startingPoint") or "main")
        if branch.startswith("refs/"):
            raise HubError(400, message=f"Invalid reference for a branch: {branch}")
        return self._add_ref(repo, f"refs/heads/{branch}", start)

    @_route("POST", f"{_API}/tag{_REV}", write=True)
    def _create_tag(self, call: Call, repo: Repo) -> Response:
        return self._add_ref(repo, f"refs/tags/{call.json()['tag']}", repo.resolve(call.args["rev"]))

    def _add_ref(self, repo: Repo, ref: str, commit: Commit) -> Response:
        if ref in repo.refs:
            raise HubError(409, message=f"Reference already exists: {ref}")
        repo.refs[ref] = commit.sha
        return _json({})

    @_route("POST", f"{_API}/preupload{_REV}", write=True)
    def _preupload(self, call: Call, repo: Repo) -> Response:
        commit = repo.resolve(call.args["rev"])
        modes = []
        for file in call.json()["files"]:
            known = commit.files.get(file["path"])
            mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
            # The client leaves a file out of its commit when this id equals that of its own copy.
            oid = known and known.blob
            modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": modes})

    @_route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", write=True)
    def _lfs_batch(self, call: Call, repo: Repo) -> Response:
        objects = []
        for ask in call.json()["objects"]:
            known = {"oid": ask["oid"], "size": ask["size"]}
            href = {"href": f"{self.url}/lfs-objects/{ask['oid']}"}
            objects.append(known if ask["oid"] in self._blobs else {**known, "actions": {"upload": href}})
        return _json({"transfer": "basic", "objects": objects})

    @_route("PUT", "/lfs-objects/(?P<oid>[0-9a-f]{64})")
    def _lfs_upload(self, call: Call) -> Response:
        if hashlib.sha256(call.body).hexdigest() != call.args["oid"]:
            raise HubError(400, message=f"The content received is not that of {call.args['oid']}")
        self._blobs[call.args["oid"]] = call.body
        return _json({})

    @_route("POST", f"{_API}/commit{_REV}", write=True)
    def _commit(self, call: Call, repo: Repo) -> Response:
        ref = repo.writable_ref(call.args["rev"])
        lines = [json.loads(line) for line in call.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        parent, expected = repo.commits[repo.refs[ref]], header.get("parentCommit")
        create_pr = call.flag("create_pr")
        if expected and create_pr:
            parent = repo.resolve(expected)
        elif expected and not parent.sha.startswith(expected.lower()):
            raise HubError(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(parent.files)
        for line in lines:
            self._apply(line["key"], line["value"], files)
        answer: dict[str, Any] = {"success": True}
        if create_pr:
            number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
            ref = f"refs/pr/{number}"
            answer["pullRequestUrl"] = f"{self.url}/{repo.key}/discussions/{number}"
        commit = repo.commit(ref, parent, files, header["summary"], header.get("description", ""))
        return _json({**answer, "commitOid": commit.sha, "commitUrl": f"{self.url}/{repo.key}/commit/{commit.sha}"})

    def _apply(self, key: str, value: dict[str, Any], files: dict[str, Entry]) -> None:
        """Applies one line of a commit to a dict of files."""
        path = value.get("path", "")
        if key == "file":
            data = base64.b64decode(value["content"])
            files[path] = Entry(_git_oid(data), len(data))
            self._blobs[files[path].blob] = data
        elif key == "lfsFile":
            data = self._blobs.get(value["oid"])
            if data is None or value.get("size", len(data)) != len(data):
                raise HubError(400, message=f"LFS object {value['oid']} of {path} was not uploaded")
            files[path] = _lfs_entry(value["oid"], len(data))
        elif key in ("deletedFile", "deletedFolder"):
            folder = path.rstrip("/") + "/"
            gone = [name for name in files if (name == path if key == "deletedFile" else name.startswith(folder))]
            if not gone:
                raise HubError(404, "EntryNotFound", f"A file with this name doesn't exist: {path}")
            for name in gone:
                del files[name]
        elif key != "header":
            raise HubError(400, message=f"Unknown operation: {key}")

    @_route("GET", f"{_API}(?:/revision{_REV})?")
    def _info(self, call: Call, repo: Repo) -> Response:
        commit = repo.resolve(call.args.get("rev", "main"))
        siblings = []
        for path, entry in sorted(commit.files.items()):
            sibling: dict[str, Any] = {"rfilename": path}
            if call.flag("blobs"):
                sibling |= {"size": entry.size, "blobId": entry.oid}
                if entry.sha256:
                    sibling["lfs"] = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size}
            siblings.append(sibling)
        readme = commit.files.get("README.md")
        card = read_card(self._blobs[readme.blob].decode(errors="replace"))[0] if readme else None
        first = list(repo.history(commit))[-1]
        info: dict[str, Any] = {"id": call.args["name"], "modelId": call.args["name"], "sha": commit.sha}
        info |= {"author": call.args["name"].split("/")[0], "private": repo.private, "gated": repo.gated}
        info |= {"lastModified": commit.date, "createdAt": first.date, "disabled": False, "downloads": 0, "likes": 0}
        info |= {key: card[key] for key in ("pipeline_tag", "library_name") if card and card.get(key)}
        return _json({**info, "tags": [], "siblings": siblings})

    @_route("GET", f"{_PAGE}/resolve{_REV}/(?P<path>.+)")
    def _resolve(self, call: Call, repo: Repo) -> Response:
        self._check_gate(repo, call)
        commit, path = repo.resolve(call.args["rev"]), call.args["path"]
        entry = commit.files.get(path)
        if entry is None:
            # The client remembers a file's absence under this commit.
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
        headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.blob}"', "Accept-Ranges": "bytes"}
        headers["Content-Type"] = "application/octet-stream"
        if entry.sha256:
            headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
        data = self._blobs[entry.blob]
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
        if wanted is None or wanted[0] == "bytes=-" or call.method == "HEAD":
            return Response(data, 200, headers)
        start = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
        stop = min(int(wanted[2]) + 1, len(data)) if wanted[1] and wanted[2] else len(data)
        if start >= stop:
            raise HubError(416, message="Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
        return Response(data[start:stop], 206, headers)


def _raise_fault(fault: Fault) -> None:
    """Raises the error of a fault that replaces the response; returns for those that spoil it."""
    options = fault.options
    if fault.kind == "status":
        retry = {"Retry-After": str(options.get("retry_after", 0))}
        raise HubError(options.get("status", 503), "", options.get("message", "Injected fault"), retry)
    if fault.kind == "gated":
        raise HubError(options.get("status", 403), "GatedRepo", "Access to this repo is restricted.")
    if fault.kind == "unauthorized":
        # The Hub's wording: by it the client tells a bad token from a missing repo.
        raise HubError(401, "", "Invalid credentials in Authorization header")
    if fault.kind == "missing":
        raise HubError(404, options.get("code", "EntryNotFound"), "Not found")


def _spoil(response: Response, fault: Fault) -> None:
    size = len(response.body)
    if fault.kind == "cut":
        response.cut = fault.options.get("bytes", size // 2)
    elif fault.kind == "truncate":
        response.body = response.body[: fault.options.get("bytes", size // 2)]
    elif fault.kind == "flip" and size:
        at = min(fault.options.get("offset", 0), size - 1)
        response.body = response.body[:at] + bytes([response.body[at] ^ 0xFF]) + response.body[at + 1 :]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    hub: LocalHub

    def __init__(self, *args: Any):
        self.open_connections: set[socket.socket] = set()
        super().__init__(*args)

    def drop_connections(self) -> None:
        # Idle keep-alive connections would otherwise still be answered after the Hub is closed.
        for connection in list(self.open_connections):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that hangs up is no error of ours
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # headers and body in one packet: written apart, delayed ACKs cost 40 ms a request
    disable_nagle_algorithm = True
    server: _Server

    def setup(self) -> None:
        super().setup()
        self.server.open_connections.add(self.connection)

    def finish(self) -> None:
        self.server.open_connections.discard(self.connection)
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def serve(self) -> None:
        # The body is read before anything else: what is left of it would be taken for the next request.
        body = self._read_body()
        response = self.server.hub.answer(self.command, self.path, self.headers, body)
        self.send_response(response.status)
        for name, value in response.headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(response.body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: response.cut])
        if response.cut is not None:
            self.close_connection = True

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = serve

    def _read_body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(chunks)


def main(argv: list[str] | None = None) -> None:
    """Serves until Ctrl-C, after printing the environment to export."""
    parser = argparse.ArgumentParser(prog="python -m manticore_hf.local_hub", description=main.__doc__)
    parser.add_argument("--port", type=int, default=0, help="0 takes a free one")
    parser.add_argument("--home", help="folder for the client's caches (default: a new temporary one)")
    args = parser.parse_args(argv)
    with LocalHub(args.port) as hub:
        for name, value in hub.environment(args.home or tempfile.mkdtemp(prefix="local-hub-")).items():
            print(f"export {name}={shlex.quote(value)}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
