"""What the Hub answers: one handler for each of its endpoints."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from typing import Any
from urllib.parse import parse_qs, unquote

from .messages import Call, Response, json_response
from .repos import LFS_SUFFIXES, Commit, Entry, HubError, Repo, Storage, lfs_entry

USER = "tester"

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


def dispatch(storage: Storage, call: Call) -> Response:
    """Fills in `call.args` and gives the call to the first handler whose route it matches."""
    method = "GET" if call.method == "HEAD" else call.method
    for verb, pattern, handler, write in ROUTES:
        match = pattern.fullmatch(call.path) if verb == method else None
        if match is None:
            continue
        if write and call.token is None:
            raise HubError(401, message="Invalid username or password.")
        call.args = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
        return handler(storage, call, _repo(storage, call)) if "name" in call.args else handler(storage, call)
    raise HubError(404, message=f"No such endpoint: {call.method} {call.path}")


def _repo(storage: Storage, call: Call) -> Repo:
    repo = storage.repos.get(call.repo_key)
    if repo is None or (repo.private and call.token != repo.owner):
        # The Hub does not tell a private repo from a missing one, and asks strangers to log in first.
        raise HubError(404 if call.token else 401, "RepoNotFound", "Repository not found")
    return repo


def _check_gate(repo: Repo, call: Call) -> None:
    if repo.gated and call.token != repo.owner:
        message = f"Access to model {repo.key} is restricted and you are not in the authorized list."
        raise HubError(403 if call.token else 401, "GatedRepo", message)


@_route("GET", "/api/whoami-v2", write=True)
def _whoami(storage: Storage, call: Call) -> Response:
    access = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
    return json_response({"type": "user", "id": USER, "name": USER, "fullname": USER, "orgs": [], "auth": access})


@_route("POST", "/api/validate-yaml")
def _validate_yaml(storage: Storage, call: Call) -> Response:
    metadata, errors = read_card(call.json().get("content", ""))
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    status = 400 if errors else 200
    return json_response({"errors": [{"message": error} for error in errors], "warnings": warnings}, status)


@_route("POST", "/api/repos/create", write=True)
def _create_repo(storage: Storage, call: Call) -> Response:
    ask = call.json()
    kind = ask.get("type") or "model"
    repo_id = f"{ask.get('organization') or USER}/{ask['name']}"
    key = repo_id if kind == "model" else f"{kind}s/{repo_id}"
    answer = {"url": f"{call.endpoint}/{key}", "name": repo_id, "id": repo_id}
    if key in storage.repos:
        return json_response({**answer, "error": f"You already created this {kind} repo"}, 409)
    private = ask.get("visibility") == "private" or bool(ask.get("private"))
    repo = storage.repos[key] = Repo(key, call.token or "", private)
    rules = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES).encode()
    first = {".gitattributes": storage.add(".gitattributes", rules)}
    repo.commit("refs/heads/main", None, first, "initial commit")
    return json_response(answer)


@_route("DELETE", "/api/repos/delete", write=True)
def _delete_repo(storage: Storage, call: Call) -> Response:
    ask = call.json()
    call.args = {"kind": f"{ask.get('type') or 'model'}s", "name": f"{ask.get('organization') or USER}/{ask['name']}"}
    del storage.repos[_repo(storage, call).key]
    return json_response({})


@_route("GET", f"{_API}/refs")
def _refs(storage: Storage, call: Call, repo: Repo) -> Response:
    def under(prefix: str) -> list[dict[str, str]]:
        found = [(ref, sha) for ref, sha in repo.refs.items() if ref.startswith(prefix)]
        return [{"name": ref.removeprefix(prefix), "ref": ref, "targetCommit": sha} for ref, sha in found]

    refs = {"branches": under("refs/heads/"), "tags": under("refs/tags/"), "converts": []}
    return json_response({**refs, "pullRequests": under("refs/pr/")} if call.flag("include_prs") else refs)


@_route("GET", f"{_API}/commits{_REV}")
def _commits(storage: Storage, call: Call, repo: Repo) -> Response:
    log = []
    for past in repo.history(repo.resolve(call.args["rev"])):
        about = {"id": past.sha, "title": past.title, "message": past.message, "date": past.date}
        log.append({**about, "authors": [{"user": USER}]})
    return json_response(log)


@_route("GET", f"{_API}/tree{_REV}(?:/(?P<path>.+))?")
def _tree(storage: Storage, call: Call, repo: Repo) -> Response:
    commit = repo.resolve(call.args["rev"])
    paths = repo.tree(commit, call.args.get("path", "").strip("/"), call.flag("recursive"))
    return json_response([repo.describe(commit, path, call.flag("expand")) for path in paths])


@_route("POST", f"{_API}/paths-info{_REV}")
def _paths_info(storage: Storage, call: Call, repo: Repo) -> Response:
    commit = repo.resolve(call.args["rev"])
    form = parse_qs(call.body.decode())
    expand = form.get("expand", [""])[0].lower() == "true"
    found = [repo.describe(commit, path.strip("/"), expand) for path in form.get("paths", [])]
    return json_response([info for info in found if info is not None])


@_route("POST", f"{_API}/branch/(?P<branch>.+)", write=True)
def _create_branch(storage: Storage, call: Call, repo: Repo) -> Response:
    branch = call.args["branch"]
    start = repo.resolve(call.json().get("startingPoint") or "main")
    if branch.startswith("refs/"):
        raise HubError(400, message=f"Invalid reference for a branch: {branch}")
    return _add_ref(repo, f"refs/heads/{branch}", start)


@_route("POST", f"{_API}/tag{_REV}", write=True)
def _create_tag(storage: Storage, call: Call, repo: Repo) -> Response:
    return _add_ref(repo, f"refs/tags/{call.json()['tag']}", repo.resolve(call.args["rev"]))


def _add_ref(repo: Repo, ref: str, commit: Commit) -> Response:
    if ref in repo.refs:
        raise HubError(409, message=f"Reference already exists: {ref}")
    repo.refs[ref] = commit.sha
    return json_response({})


@_route("POST", f"{_API}/preupload{_REV}", write=True)
def _preupload(storage: Storage, call: Call, repo: Repo) -> Response:
    commit = repo.resolve(call.args["rev"])
    modes = []
    for file in call.json()["files"]:
        known = commit.files.get(file["path"])
        mode = "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular"
        # The client leaves a file out of its commit when this id equals that of its own copy.
        oid = known and known.blob
        modes.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return json_response({"files": modes})


@_route("POST", rf"{_PAGE}\.git/info/lfs/objects/batch", write=True)
def _lfs_batch(storage: Storage, call: Call, repo: Repo) -> Response:
    objects = []
    for ask in call.json()["objects"]:
        known = {"oid": ask["oid"], "size": ask["size"]}
        href = {"href": f"{call.endpoint}/lfs-objects/{ask['oid']}"}
        objects.append(known if ask["oid"] in storage.blobs else {**known, "actions": {"upload": href}})
    return json_response({"transfer": "basic", "objects": objects})


@_route("PUT", "/lfs-objects/(?P<oid>[0-9a-f]{64})")
def _lfs_upload(storage: Storage, call: Call) -> Response:
    if hashlib.sha256(call.body).hexdigest() != call.args["oid"]:
        raise HubError(400, message=f"The content received is not that of {call.args['oid']}")
    storage.blobs[call.args["oid"]] = call.body
    return json_response({})


@_route("POST", f"{_API}/commit{_REV}", write=True)
def _commit(storage: Storage, call: Call, repo: Repo) -> Response:
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
        _apply(storage, line["key"], line["value"], files)
    answer: dict[str, Any] = {"success": True}
    if create_pr:
        number = 1 + sum(name.startswith("refs/pr/") for name in repo.refs)
        ref = f"refs/pr/{number}"
        answer["pullRequestUrl"] = f"{call.endpoint}/{repo.key}/discussions/{number}"
    commit = repo.commit(ref, parent, files, header["summary"], header.get("description", ""))
    url = f"{call.endpoint}/{repo.key}/commit/{commit.sha}"
    return json_response({**answer, "commitOid": commit.sha, "commitUrl": url})


def _apply(storage: Storage, key: str, value: dict[str, Any], files: dict[str, Entry]) -> None:
    """Applies one line of a commit to a dict of files."""
    path = value.get("path", "")
    if key == "file":
        files[path] = storage.add_regular(base64.b64decode(value["content"]))
    elif key == "lfsFile":
        data = storage.blobs.get(value["oid"])
        if data is None or value.get("size", len(data)) != len(data):
            raise HubError(400, message=f"LFS object {value['oid']} of {path} was not uploaded")
        files[path] = lfs_entry(value["oid"], len(data))
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
def _info(storage: Storage, call: Call, repo: Repo) -> Response:
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
    card = read_card(storage.blobs[readme.blob].decode(errors="replace"))[0] if readme else None
    first = list(repo.history(commit))[-1]
    info: dict[str, Any] = {"id": call.args["name"], "modelId": call.args["name"], "sha": commit.sha}
    info |= {"author": call.args["name"].split("/")[0], "private": repo.private, "gated": repo.gated}
    info |= {"lastModified": commit.date, "createdAt": first.date, "disabled": False, "downloads": 0, "likes": 0}
    info |= {key: card[key] for key in ("pipeline_tag", "library_name") if card and card.get(key)}
    return json_response({**info, "tags": [], "siblings": siblings})


@_route("GET", f"{_PAGE}/resolve{_REV}/(?P<path>.+)")
def _resolve(storage: Storage, call: Call, repo: Repo) -> Response:
    _check_gate(repo, call)
    commit, path = repo.resolve(call.args["rev"]), call.args["path"]
    entry = commit.files.get(path)
    if entry is None:
        # The client remembers a file's absence under this commit.
        raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
    headers = {"X-Repo-Commit": commit.sha, "ETag": f'"{entry.blob}"', "Accept-Ranges": "bytes"}
    headers["Content-Type"] = "application/octet-stream"
    if entry.sha256:
        headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    data = storage.blobs[entry.blob]
    wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range") or "")
    if wanted is None or wanted[0] == "bytes=-" or call.method == "HEAD":
        return Response(data, 200, headers)
    start = int(wanted[1]) if wanted[1] else max(0, len(data) - int(wanted[2]))
    stop = min(int(wanted[2]) + 1, len(data)) if wanted[1] and wanted[2] else len(data)
    if start >= stop:
        raise HubError(416, message="Range not satisfiable", headers={"Content-Range": f"bytes */{len(data)}"})
    headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
    return Response(data[start:stop], 206, headers)
