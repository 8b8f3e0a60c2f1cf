"""The Hub as its user sees it: started and closed, filled and looked into, made to fail."""

from __future__ import annotations

import sys
import threading
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from . import faults
from .messages import Call, Response, error_response
from .repos import HubError, Repo, Storage
from .routes import dispatch
from .server import Server

TOKEN = "hf_local_hub_dummy_token"


class LocalHub:
    """A Hub on loopback, in memory.

    Attributes:
        url: ``http://127.0.0.1:PORT``, to give to the client as its endpoint.
        requests: ``(method, path)`` of every request so far, the path unquoted and without its query.
    """

    def __init__(self, port: int = 0):
        self._storage = Storage()
        self._faults: list[faults.Fault] = []
        self._lock = threading.RLock()
        self._thread: threading.Thread | None = None
        self._server = Server(port, self.answer)
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
            "HF_DATASETS_CACHE": str(home / "datasets"),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_HUB_OFFLINE": "0",
            "HF_DATASETS_OFFLINE": "0",
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
            repo = self._storage.repos.setdefault(repo_id, Repo(repo_id, TOKEN, private, gated))
            if branch != "main" and not repo.refs:
                repo.commit("refs/heads/main", None, {}, "initial commit")
            parent = repo.refs.get(f"refs/heads/{branch}") or repo.refs.get("refs/heads/main")
            entries = {path: self._storage.add(path, data) for path, data in files.items()}
            start = repo.commits[parent] if parent else None
            return repo.commit(f"refs/heads/{branch}", start, entries, "Add files").sha

    def head(self, repo_id: str, revision: str = "main") -> str:
        """Commit hash of a revision."""
        with self._lock:
            return self._storage.repos[repo_id].resolve(revision).sha

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Contents by path at a revision."""
        with self._lock:
            commit = self._storage.repos[repo_id].resolve(revision)
            return {path: self._storage.blobs[entry.blob] for path, entry in commit.files.items()}

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
        if kind not in faults.FAULTS:
            raise ValueError(f"kind must be one of {faults.FAULTS}, got {kind!r}")
        with self._lock:
            self._faults.append(faults.Fault(pattern, kind, times, options))

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
            fault = faults.take(self._faults, method, path)
            try:
                if fault is not None:
                    faults.raise_error(fault)
                call = Call(method, url.path, parse_qs(url.query), headers, body, token, self.url)
                response = dispatch(self._storage, call)
            except HubError as error:
                response = error_response(error)
            except Exception as error:  # noqa: BLE001 - whatever goes wrong here, the client must get an answer
                traceback.print_exc(file=sys.stderr)
                response = error_response(HubError(500, message=f"LocalHub failed: {error!r}"))
        if fault is not None:
            faults.spoil(response, fault)
        return response
