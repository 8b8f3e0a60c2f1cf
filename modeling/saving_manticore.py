"""Writing a directory whole.

A new directory appears by one rename. In an existing one files are replaced one after the other, under a note
(`.saving`) that names them: where a process was killed meanwhile, whoever loads it is told. The package
(`manticore_hf.utils.saving`), where it is imported, finishes what such a note promises, so that the old files count or
the new ones, clears up after killed processes, and lets those that save into one directory wait for each other.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from .settings_manticore import ManticoreError

NOTE = ".saving"
WEIGHT_FILE = re.compile(r"model(\.[\w-]+)?(-\d{5}-of-\d{5})?\.safetensors(\.index(\.[\w-]+)?\.json)?")

_installed = []


def install_saving(whole_directory: Callable, check_whole: Callable) -> None:
    """Makes these two the `whole_directory` and the `check_whole` of this process."""
    _installed.append((whole_directory, check_whole))


def whole_directory(target: str | os.PathLike, active: bool) -> AbstractContextManager[str]:
    """Gives a scratch directory whose files are moved into `target` when the block ends well, if `active`.

    In an existing one other files stay, but for weights of an earlier save.
    """
    return (_installed[-1][0] if _installed else _whole_directory)(target, active)


def check_whole(directory: str | os.PathLike) -> bool:
    """Whether no save is moving files into a directory, or was cut off while it did.

    Raises:
        ManticoreError: It was so, and config.json may have been read before it changed.
    """
    if _installed:
        return _installed[-1][1](directory)
    if not os.path.lexists(Path(os.path.realpath(directory)) / NOTE):
        return True
    raise ManticoreError(
        f"{str(directory)!r} is being saved, or a save was interrupted. Load it again later; if it stays so, load it "
        "with the package, which completes it (pip install manticore-hf; import manticore_hf), or save it again."
    )


@contextlib.contextmanager
def _whole_directory(target, active) -> Iterator[str]:
    target = Path(os.path.realpath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=scratch_prefix(target), dir=scratch_place(target)))
    try:
        inner = scratch / target.name
        inner.mkdir()
        yield str(inner)
        if active and target.exists():
            write_note(inner, target)
            move_files(inner, target)
        elif active:
            os.replace(inner, target)
    finally:
        if not os.path.lexists(target / NOTE):  # else what is left is needed to finish
            shutil.rmtree(scratch, ignore_errors=True)


def scratch_place(target: Path) -> Path:
    """Where the scratch directories of a target are: beside it, or in it."""
    place = target.parent
    # Renaming works within one file system only, and `target` may be a mounted one.
    if target.exists() and (target.stat().st_dev != place.stat().st_dev or not os.access(place, os.W_OK)):
        return target
    return place


def scratch_prefix(target: Path) -> str:
    """How the scratch directories of a target begin; a file system allows a name 255 bytes."""
    name = target.name
    return f".{name if len(os.fsencode(name)) < 100 else hashlib.sha256(os.fsencode(name)).hexdigest()[:24]}.saving-"


def write_note(inner: Path, target: Path) -> None:
    """Notes in a directory which files of a scratch directory are moved into it, and whether its config.json stays."""
    files = sorted(file.relative_to(inner).as_posix() for file in inner.rglob("*") if file.is_file())
    if not all(is_below(target, name) for name in files):
        raise ManticoreError(f"{str(target)!r} has a folder that is a link out of it; remove the link, then save.")
    note = inner.with_name(NOTE)
    at = Path(os.path.relpath(inner, target)).as_posix()
    both = [folder / "config.json" for folder in (inner, target)]
    same = all(map(Path.is_file, both)) and both[0].read_bytes() == both[1].read_bytes()
    note.write_text(json.dumps({"from": at, "files": files, "same": same}), encoding="utf-8")
    os.replace(note, target / NOTE)


def move_files(inner: Path, target: Path, files: list[str] | None = None) -> None:
    """Moves files, or all, from a scratch directory, removes other weights of the target, and then its note."""
    files = [file.relative_to(inner).as_posix() for file in inner.rglob("*")] if files is None else files
    for name in files:
        if (inner / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(inner / name, target / name)
    variants = {match[1] for name in files if (match := WEIGHT_FILE.fullmatch(name))}
    for file in list(target.iterdir()):
        if (match := WEIGHT_FILE.fullmatch(file.name)) and match[1] in variants and file.name not in files:
            file.unlink()
    (target / NOTE).unlink(missing_ok=True)


def is_below(root: Path, name: str) -> bool:
    """Whether a file of that name is in a directory, also where folders on the way are links."""
    inside = Path(os.path.realpath((root / name).parent)).is_relative_to(os.path.realpath(root))
    return inside and Path(name).name != ".."
