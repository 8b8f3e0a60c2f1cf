"""Where a hybrid comes from: its repository's files and code, and its components' repositories, from metadata alone.

Code is compared with the installed package's by git's own hashes, weights with the recorded SHA-256 by the Hub's: no
file of code or weights is downloaded for that.
"""

import hashlib
import json
import re
import struct
from pathlib import Path
from typing import BinaryIO

from huggingface_hub import HfApi, HfFileSystem, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, HTTPError, RepositoryNotFoundError, RevisionNotFoundError

from manticore_hf import modeling
from manticore_hf.hub.upload import FOLDERS
from manticore_hf.modeling.bounds_manticore import ManticoreError
from manticore_hf.modeling.carried_manticore import CODE, ENTRY, PARTS
from manticore_hf.modeling.references_manticore import hub_reason, lfs_id, verify, where
from manticore_hf.utils.carried import entry_code
from manticore_hf.utils.formatting import listed_some

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_LARGEST_HEADER = 50_000_000
_MOST_PARTS = 64


def repository(source: str, revision: str | None = None) -> dict:
    """What is in a hybrid's directory or repository.

    Args:
        source: Directory or Hub repo.
        revision: Revision of a Hub repo.

    Returns:
        {"commit", "private", "gated": None for a directory; "files": {path: bytes}, "code": {file: "same", "different"
        or "unknown" to the installed package}, "pickles": [path], "own": {weight file: {component or "": tensors}},
        "ignored": [folder of a directory of which nothing is ever published, as a run's checkpoints]}.
    """
    out = {"commit": None, "private": None, "gated": None, "ignored": []}
    if Path(source).is_dir():
        top = sorted(Path(source).iterdir())
        out["ignored"] = [one.name for one in top if one.is_dir() and not any(map(one.match, FOLDERS))]
        kept = [path for one in top if one.name not in out["ignored"] for path in (one, *sorted(one.rglob("*")))]
        paths = {path.relative_to(source).as_posix(): path for path in kept if path.is_file()}
        files = {name: path.stat().st_size for name, path in paths.items()}
        blobs = {name: _git_hash(path.read_bytes()) for name, path in paths.items() if name.endswith(".py")}
    else:
        info = HfApi().model_info(source, revision=revision, files_metadata=True)
        out |= {"commit": info.sha, "private": info.private, "gated": bool(info.gated)}
        files = {file.rfilename: file.size or 0 for file in info.siblings}
        blobs = {file.rfilename: file.blob_id for file in info.siblings if file.rfilename.endswith(".py")}
    ours = Path(modeling.__file__).parent.glob("*.py")
    installed = {path.name: _git_hash(path.read_bytes()) for path in ours if CODE.fullmatch(path.name)}
    installed[ENTRY] = _git_hash(entry_code([name for name in PARTS if f"{name}.py" in blobs]).encode())
    code = {
        name: "unknown" if name not in installed else "same" if blobs[name] == installed[name] else "different"
        for name in blobs
    }
    weights = [name for name in files if re.fullmatch(r"model[\w.-]*\.safetensors", name)]
    return {
        **out,
        "files": files,
        "code": code,
        "pickles": [name for name in files if name.endswith(_PICKLES)],
        "own": {name: _count_tensors(source, name, out["commit"]) for name in weights},
    }


def component_state(entry: dict) -> dict:
    """What the Hub says of a referenced component.

    Args:
        entry: Its entry in the configuration.

    Returns:
        {"access": "public", "gated", "private", "missing" or "unknown" (then "reason" says why), "bytes": of its
        recorded files or None, "changed": recorded files that the Hub now states another SHA-256 for}.
    """
    state = {"access": "unknown", "bytes": None, "changed": []}
    try:
        info = HfApi().model_info(entry["repo_id"], revision=entry["revision"], files_metadata=True)
    except GatedRepoError:
        return {**state, "access": "gated"}
    except (RepositoryNotFoundError, RevisionNotFoundError):
        return {**state, "access": "missing"}
    except (HTTPError, OSError) as err:
        said = hub_reason(err, entry["repo_id"])
        return {**state, "reason": said if said.startswith("the Hub answers") else "the Hub does not answer"}
    folder, recorded = f"{entry['subfolder']}/" if entry["subfolder"] else "", entry["files"] or {}
    there = {file.rfilename: file for file in info.siblings}
    stated = {
        name: there[folder + name].lfs.sha256
        for name in recorded
        if folder + name in there and there[folder + name].lfs is not None
    }
    sizes = [there[folder + name].size or 0 for name in recorded if folder + name in there]
    gone = [name for name in recorded if folder + name not in there]
    return {
        "access": "private" if info.private else "gated" if info.gated else "public",
        "bytes": sum(sizes) if recorded else None,
        "changed": sorted([name for name, sha in stated.items() if sha != recorded[name]] + gone),
    }


def verify_cached(entry: dict) -> dict[str, list[str]]:
    """Hashes a referenced component's files in the local cache, whether they have passed before or not.

    Args:
        entry: Its entry in the configuration.

    Returns:
        {"verified", "damaged" (and removed from the cache), "absent": names of its recorded files}.
    """
    out = {"verified": [], "damaged": [], "absent": []}
    for name, digest in sorted((entry["files"] or {}).items()):
        in_repo = f"{entry['subfolder']}/{name}" if entry["subfolder"] else name
        path = try_to_load_from_cache(entry["repo_id"], in_repo, revision=entry["revision"])
        kind = "absent"
        if isinstance(path, str):
            try:
                verify(path, digest, f"{where(entry)}: {name}", anew=True)
                kind = "verified"
            except ManticoreError:
                kind = "damaged"
        out[kind].append(name)
    return out


def verify_own(source: str, found: dict) -> list[str]:
    """Hashes a hybrid's own weight files in the local cache, which knows them by their SHA-256; damaged ones go.

    Args:
        source: Directory (where nothing says what its files were) or Hub repo.
        found: What `repository` says of it.

    Returns:
        The damaged ones.
    """
    damaged = []
    for name in found["own"] if found["commit"] is not None else ():
        path = try_to_load_from_cache(source, name, revision=found["commit"])
        if isinstance(path, str) and (stated := lfs_id(path)) is not None:
            try:
                verify(path, stated, f"{source}: {name}", anew=True)
            except ManticoreError:
                damaged.append(f"{source}: {name}")
    return damaged


def read_header(opened: BinaryIO) -> tuple[dict, int]:
    """The header of an opened safetensors file, and the offset at which its data begin.

    Raises:
        ValueError: It is none.
    """
    raw = opened.read(8)
    (length,) = struct.unpack("<Q", raw) if len(raw) == 8 else (_LARGEST_HEADER + 1,)
    if length > _LARGEST_HEADER:
        raise ValueError(f"a header of {length} bytes")
    header = json.loads(opened.read(length))
    if not isinstance(header, dict):
        raise ValueError("a header that is not a JSON object")
    return header, 8 + length


def open_weights(source: str, name: str, revision: str | None = None) -> BinaryIO:
    """Opens a file of a hybrid for reading by byte ranges, without fetching the rest of it."""
    if Path(source).is_dir():
        return open(Path(source) / name, "rb")
    at = "" if revision is None else f"@{revision}"
    return HfFileSystem().open(f"{source}{at}/{name}", "rb", block_size=2**16)


def _count_tensors(source, name, revision):
    """{component or "hybrid_mixer": number of tensors} of a weight file; empty where its header cannot be read."""
    try:
        with open_weights(source, name, revision) as opened:
            header, _ = read_header(opened)
    except (OSError, ValueError, HTTPError, RecursionError):
        return {}
    out = {}
    for key in header:
        if key != "__metadata__":
            part = key.partition(".")[0]
            known = len(part) <= 100 and (part in out or len(out) < _MOST_PARTS)
            out[part if known else "others"] = out.get(part if known else "others", 0) + 1
    return out


def _git_hash(data):
    """The id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def print_repository(source: str, found: dict) -> None:
    """Prints what `repository` found."""
    access = "" if found["commit"] is None else ", private" if found["private"] else ", gated" if found["gated"] else ""
    at = "" if found["commit"] is None else f"@{found['commit']}"
    print(f"\nrepository: {source}{at}{access}: {len(found['files'])} files, {sum(found['files'].values()):,} bytes")
    for name, parts in list(found["own"].items())[:_MOST_PARTS]:
        held = ", ".join(f"{count} of {part}" for part, count in parts.items()) or "its header cannot be read"
        print(f"  {name}: {found['files'][name]:,} bytes, tensors: {held}")
    by_kind = {kind: [name for name, one in found["code"].items() if one == kind] for kind in ("different", "unknown")}
    same = len(found["code"]) - sum(map(len, by_kind.values()))
    print(f"  code: {same} files identical to the installed manticore-hf (run only with trust_remote_code=True)")
    for kind, word in (("different", "different from"), ("unknown", "not in")):
        if by_kind[kind]:
            print(f"  CODE {word} the installed manticore-hf, read it before running it: {listed_some(by_kind[kind])}")
    if found["pickles"]:
        print(f"  PICKLES (never read): {listed_some(found['pickles'])}")
    if found["ignored"]:
        print(f"  folders not looked at, of which nothing is published: {listed_some(found['ignored'])}")


def print_state(state: dict) -> str:
    """What `component_state` found, as the end of a line."""
    size = "" if state["bytes"] is None else f", {state['bytes']:,} bytes"
    changed = f", NOT the recorded files: {', '.join(state['changed'])}" if state["changed"] else ""
    why = state.get("reason", "").rstrip(".")
    access = {"missing": "MISSING: the hybrid cannot be loaded", "unknown": why}
    return f"{access.get(state['access'], state['access'])}{size}{changed}{_print_cache(state.get('cache'))}"


def _print_cache(cache):
    if cache is None:
        return ""
    count = len(cache["verified"])
    damaged = f", DAMAGED, removed from the cache: {', '.join(cache['damaged'])}" if cache["damaged"] else ""
    absent = f", {len(cache['absent'])} not here" if cache["absent"] else ""
    return f"; {count} {'file' if count == 1 else 'files'} verified{damaged}{absent}"
