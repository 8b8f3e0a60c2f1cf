"""Where a checkpoint that is to be converted comes from, and its tensors: read from pickles without running them."""

import json
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file

from manticore_hf.compose.components import PICKLE_FILES
from manticore_hf.hub.bare_names import check_bare_name
from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.modeling.references_manticore import WEIGHT_FILES, hub_reason
from manticore_hf.utils.files import names_gguf


@dataclass
class Source:
    """A checkpoint's directory, or its repository.

    Args:
        folder: The directory; None for a repository.
        repo_id: The repository; None for a directory.
        revision: Of the repository: as given at first, the commit once a file was fetched.
    """

    folder: Path | None = None
    repo_id: str | None = None
    revision: str | None = None

    @property
    def what(self) -> str:
        """What messages call it."""
        return f"The checkpoint {self.repo_id or os.path.abspath(self.folder)!r}"

    @property
    def address(self) -> tuple[str, dict]:
        """What a tokenizer's class takes, with its keyword arguments."""
        return (str(self.folder), {}) if self.repo_id is None else (self.repo_id, {"revision": self.revision})

    def file(self, name: str, needed: bool = False) -> Path | None:
        """Path of one file, fetched if need be; None where there is none.

        Raises:
            ManticoreError: The repository cannot be read, or it is needed and not there.
        """
        if self.repo_id is not None:
            path = self._fetch(name)
        else:
            path = self.folder / name if (self.folder / name).is_file() else None
        if path is None and needed:
            raise ManticoreError(f"{self.what} has no {name}; name a directory or repository that has it.")
        return path

    def _fetch(self, name):
        try:
            path = hf_hub_download(self.repo_id, name, revision=self.revision)
        except RepositoryNotFoundError as err:
            raise ManticoreError(
                f"{self.what}: no such repository, or it is private or gated (log in with `hf auth login`)."
            ) from err
        except RevisionNotFoundError as err:
            raise ManticoreError(f"{self.what}: the repository has no revision {self.revision!r}.") from err
        except Exception as err:  # the HTTP library's own errors among them
            if isinstance(err, EntryNotFoundError) and not isinstance(err, LocalEntryNotFoundError):
                return None
            raise ManticoreError(f"{self.what}: {name} cannot be fetched: {hub_reason(err, self.repo_id)}") from err
        commit = re.search(r"[/\\]snapshots[/\\]([0-9a-f]{40})[/\\]", path)
        if commit is None:
            raise ManticoreError(f"{self.what}: revision {self.revision!r} did not resolve to a commit.")
        self.revision = commit[1]
        return Path(path)


def is_gguf(source: object) -> bool:
    """Whether something is a GGUF file on this machine."""
    return names_gguf(source) and os.path.isfile(source)


def find_source(
    source: str | os.PathLike, revision: str | None = None, gguf_file: str | None = None
) -> tuple[Source, str | None]:
    """(Source, name of the GGUF file in it or None) of what a user names.

    Args:
        source: Directory, .gguf file, or repository ("org/name", "org/name@revision").
        revision: Branch, tag or commit of a repository.
        gguf_file: A GGUF file in the directory or repository.

    Raises:
        ManticoreError: It is none of these.
    """
    text = os.fspath(source)
    if is_gguf(text):
        return Source(Path(text).parent), os.path.basename(text)
    if os.path.isdir(text):
        if revision is not None:
            raise ManticoreError(f"The checkpoint {text!r} is a directory: it has no revision {revision!r}.")
        return Source(Path(text)), gguf_file
    repo_id, _, at = text.partition("@")
    if at and revision and at != revision:
        raise ManticoreError(f"The checkpoint {text!r}: revision {revision!r} contradicts '@{at}'.")
    named = re.fullmatch(r"[\w.-]+(/[\w.-]+)?", repo_id) and ".." not in repo_id
    if not named or names_gguf(text) or os.path.exists(text):
        raise ManticoreError(
            f"The checkpoint {text!r} is no existing directory or .gguf file, nor a Hub repository id ('org/name')."
        )
    check_bare_name(f"The checkpoint {text!r}", repo_id)
    return Source(repo_id=repo_id, revision=at or revision or "main"), gguf_file


def read_tensors(source: Source) -> dict[str, torch.Tensor]:
    """{name: tensor} of a checkpoint's weight files, mapped into memory where their format allows it.

    Args:
        source: A Source.

    Raises:
        ManticoreError: There is none, one is damaged, or a pickle holds anything but tensors; nothing of it is run.
    """
    out = {}
    for file in _weight_files(source):
        read = _read_safetensors if file.suffix == ".safetensors" else _read_pickle
        found = read(source.what, file)
        twice = sorted(set(out) & set(found))
        if twice:
            raise ManticoreError(f"{source.what} has the tensor {twice[0]!r} in two of its files; it is damaged.")
        out.update(found)
    return out


def _weight_files(source):
    for single, index in (WEIGHT_FILES, PICKLE_FILES):
        if (path := source.file(single)) is not None:
            return [path]
        if (path := source.file(index)) is not None:
            return [source.file(shard, needed=True) for shard in _shards(source.what, path, single.rpartition(".")[2])]
    raise ManticoreError(f"{source.what} has no {WEIGHT_FILES[0]} and no {PICKLE_FILES[0]}: nothing to convert.")


def _shards(what, index, suffix):
    try:
        shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        plain = all(re.fullmatch(rf"[\w-][\w.-]*\.{suffix}", shard) for shard in shards)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        plain = False
    if not plain:
        raise ManticoreError(f"{what}: {index.name} is not an index of .{suffix} files beside it; it is damaged.")
    return shards


def _read_safetensors(what, path):
    try:
        return load_file(path)
    except Exception as err:
        said = f"{path.name} is not a readable safetensors file ({err}); fetch it again."
        raise ManticoreError(f"{what}: {said}") from err


def _read_pickle(what, path):
    why = "a pickle can run code when it is read, so nothing but tensors is. Ask its authors for safetensors"
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as err:
        named = re.search(r"GLOBAL ([\w.]+)", str(err))
        held = f"holds {named[1]}" if named else "is no pickle of tensors"
        raise ManticoreError(f"{what}: {path.name} {held}; {why}.") from err
    except Exception as err:  # a damaged archive has many ways to fail
        reason = " ".join(str(err).split())[:300]
        raise ManticoreError(f"{what}: {path.name} cannot be read ({reason}); it is damaged, fetch it again.") from err
    if not isinstance(found, dict) or not found:
        raise ManticoreError(f"{what}: {path.name} holds no named tensors but a {type(found).__name__}; {why}.")
    for name, tensor in found.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise ManticoreError(f"{what}: {path.name} holds a {type(tensor).__name__} at {name!r}; {why}.")
        # A few bytes can be said to be a tensor of any size
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ManticoreError(f"{what}: {path.name}: {name!r} is not a plain tensor; {why}.")
    return found
