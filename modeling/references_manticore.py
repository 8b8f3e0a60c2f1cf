"""What a hybrid takes from its components' repositories: files at a pinned commit, and what was meant.

A component's entry in the configuration records the SHA-256 of each of its weight files (the Hub's LFS id). What the
client says of a file is compared with that at every load; the bytes themselves are hashed once, wherever they came
from, and again whenever the file is another one by its size, time of change or inode.
"""

import contextlib
import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import safe_open
from transformers.utils import logging

from .bounds_manticore import ManticoreError, is_commit, reason

logger = logging.get_logger(__name__)

WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

_HUB_KEYS = ("cache_dir", "token", "local_files_only", "force_download")
_REMEDIES = {
    400: "the request was refused; try again later, and look at the proxy if there is one.",
    401: "it is private or gone; log in with an account that may read it (`hf auth login`), or find a copy.",
    403: "your account or token may not read it; ask its owner for access.",
    404: "it is gone, or private (log in with `hf auth login`); without it the hybrid cannot be loaded.",
    429: "too many requests came from here; try again later, or log in.",
    500: "the Hub has trouble; try again later.",
}
_BUSY = (500, 502, 503, 504)
_WAITS = (1.0, 4.0)


def where(entry: dict) -> str:
    """What a message calls a referenced component."""
    return f"Component {entry['name']!r} ({entry['repo_id']}@{entry['revision'][:12]})"


def commit_in(path: str) -> str | None:
    """The commit in the path of a file in the Hub's cache."""
    found = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)
    return found[1] if found else None


def component_files(entry: dict, hub: dict) -> list[str]:
    """Paths of a referenced component's safetensors files at its pinned commit, downloaded if need be.

    A branch or tag in its entry is replaced by the commit it stands for. `hub` goes to the Hub's client.

    Raises:
        ManticoreError: Names the component, the repository and what to do.
    """
    hub = {key: value for key, value in (hub or {}).items() if key in _HUB_KEYS and value is not None}
    with asking(entry, "its weights"):
        if not is_commit(entry["revision"]):
            _pin(entry, hub)
        if entry.get("files"):  # recorded when it was composed: nothing else is read
            return [fetch(entry, file, hub) for file in sorted(entry["files"]) if file.endswith(".safetensors")]
        try:
            return [fetch(entry, WEIGHT_FILES[0], hub)]
        except (LocalEntryNotFoundError, EntryNotFoundError):
            index = fetch(entry, WEIGHT_FILES[1], hub)
        said = f"{where(entry)}: {WEIGHT_FILES[1]}", "use another commit of the component."
        return [fetch(entry, shard, hub) for shard in shards(index, said)]


@contextlib.contextmanager
def asking(entry: dict, what: str) -> Iterator[None]:
    """Context in which the Hub is asked for a part of a component; whatever fails is a ManticoreError that says so."""
    try:
        yield
    except ManticoreError:
        raise
    except Exception as err:  # the HTTP library's own errors among them
        raise ManticoreError(f"{where(entry)}: {what} cannot be read: {hub_reason(err, entry['repo_id'])}") from err


def hub_reason(err: Exception, repo_id: str) -> str:
    """What the Hub's client says, as the end of a message: the status, and what to do."""
    said, chain, status = err, [], None
    while said is not None and said not in chain:  # the client raises its last error from the one that has the status
        chain.append(said)
        status = status or getattr(getattr(said, "response", None), "status_code", None)
        said = said.__cause__ or said.__context__
    if any(isinstance(one, GatedRepoError) for one in chain):
        remedy = f"{repo_id} is gated: ask for access on its page, then log in (`hf auth login`)."
    elif status is not None:
        remedy = _REMEDIES.get(status, _REMEDIES[500 if status >= 500 else 400])
    elif isinstance(err, LocalEntryNotFoundError):
        return "not in the local cache, and the Hub cannot be reached: go online once, or fetch it with `hf download`."
    else:
        return f"{reason(err)}."
    return f"the Hub answers {status}: {remedy}"


def open_files(files: list, stack: ExitStack, owner: str, prefix: str = "") -> dict:
    """{prefix + key: lazy slice} of safetensors files, kept open by `stack`; `owner` names them in an error."""
    out = {}
    for file in files:
        try:
            handle = stack.enter_context(safe_open(file, framework="pt", device="cpu"))
        except Exception as err:
            raise ManticoreError(
                f"{owner}: {file} is not a readable safetensors file ({err}). Delete it from the local cache and load "
                "again; if it stays so, the repository itself is damaged."
            ) from err
        out.update({prefix + key: handle.get_slice(key) for key in handle.keys()})
    return out


def _pin(entry, hub):
    """Replaces a branch or tag by its commit."""
    moving, commit = entry["revision"], commit_in(_download(entry, "config.json", hub))
    if commit is None:
        raise ManticoreError(f"{where(entry)}: revision {moving!r} did not resolve to a commit.")
    entry["revision"] = commit
    logger.warning(f"{where(entry)} was referenced by {moving!r}, which can move; saving this hybrid pins {commit}.")


def shards(index: str | os.PathLike, what: tuple) -> list[str]:
    """Names of the safetensors files that an index names; `what` begins an error, and ends it with a remedy."""
    try:
        found = sorted(set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()))
        plain = all(re.fullmatch(r"[\w-][\w.-]*\.safetensors", one) for one in found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain:  # it comes from someone else's repository: no paths, no pickles
        raise ManticoreError("{} is not an index of safetensors files beside it; {}".format(*what))
    return found


def fetch(entry: dict, file: str, hub: dict) -> str:
    """Path of one file of a component, checked against what was recorded and what the Hub says it is."""
    path = _download(entry, file, hub)
    recorded, stated = (entry.get("files") or {}).get(file), lfs_id(path)
    if recorded and stated and recorded != stated:
        raise ManticoreError(
            f"{where(entry)}: {file} is not the file this hybrid was made with (SHA-256 {stated[:16]}..., recorded "
            f"{recorded[:16]}...). Do not use it: ask whoever published the hybrid for the right commit."
        )
    if expected := recorded or stated:
        verify(path, expected, f"{where(entry)}: {file}")
    return path


def verify(path: str, expected: str, what: str, anew: bool = False) -> None:
    """Raises ManticoreError unless a file has the SHA-256 that is expected; a damaged one is removed from the cache.

    What passed is remembered beside the Hub's cached files, by the file's size, time of change and inode.

    Args:
        path: The file.
        expected: 64 hex digits.
        what: How a message calls it.
        anew: Whether it is hashed although it has passed before.
    """
    stat, home = os.stat(path), re.search(r"^.*[/\\]models--[^/\\]+(?=[/\\]snapshots[/\\])", os.path.abspath(path))
    note, now = home and Path(home[0], ".verified", expected), f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ino}"
    with contextlib.suppress(OSError, UnicodeDecodeError):
        if note and not anew and note.read_text() == now:
            return
    if sha256(path) != expected:
        for one in {os.path.realpath(path), path}:  # blob and link
            Path(one).unlink(missing_ok=True)
        raise ManticoreError(
            f"{what} is damaged: its SHA-256 is not {expected[:16]}... as recorded. It was removed from the local "
            "cache; load again to fetch it anew."
        )
    with contextlib.suppress(OSError):  # a cache that cannot be written is verified at every load
        if note:
            note.parent.mkdir(exist_ok=True)
            (scratch := note.with_name(f"{expected}.{os.getpid()}")).write_text(now)
            os.replace(scratch, note)


def _download(entry, file, hub):
    """`hf_hub_download`, trying again while the Hub is busy (the client itself does so for 408 and 429 only)."""
    for wait in (*_WAITS, None):
        try:
            return hf_hub_download(
                entry["repo_id"], file, revision=entry["revision"], subfolder=entry["subfolder"] or None, **hub
            )
        except HfHubHTTPError as err:
            if wait is None or err.response is None or err.response.status_code not in _BUSY:
                raise
            logger.warning(f"{where(entry)}: {file}: {err}; trying again in {wait:g} s.")
            time.sleep(wait)


def lfs_id(path: str) -> str | None:
    """The SHA-256 that the Hub states for a cached file, None where it states none (a plain git file, no links)."""
    name = os.path.basename(os.readlink(path)) if os.path.islink(path) else ""
    return name if re.fullmatch(r"[0-9a-f]{64}", name) else None


def sha256(path: str) -> str:
    """A file's SHA-256 in hex digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
