"""Files that are written whole or not at all: what is there has been finished."""

import json
import os
import secrets
from pathlib import Path
from typing import Any

from manticore_hf.modeling.settings_manticore import ManticoreError


def names_gguf(source: object) -> bool:
    """Whether something is a name that GGUF files have, there or not."""
    return isinstance(source, (str, os.PathLike)) and os.fspath(source).lower().endswith(".gguf")


def stays_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path, all links followed, is in a folder; in a snapshot of the Hub's cache, links to its blobs are.

    Args:
        path: A file or folder, there or not.
        folder: The folder.
    """
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    return any(path.is_relative_to(home) for home in homes)


def check_link(path: str | os.PathLike, folder: str | os.PathLike) -> None:
    """Raises ManticoreError if a path in a folder, all links followed, is not in it: it may be a file of its reader's.

    Args:
        path: A file or folder, there or not.
        folder: The folder; it may be a link itself.
    """
    if not stays_inside(path, folder):
        raise ManticoreError(
            f"{os.path.relpath(path, folder)} in {str(folder)!r} is a link to {os.path.realpath(path)!r}, which is not "
            "in the directory: replace it by a copy if it belongs there, or remove it."
        )


def check_no_pipes(folder: str | os.PathLike) -> None:
    """Raises ManticoreError if something in a folder is neither file nor folder: reading a pipe never ends.

    Args:
        folder: The folder, which may be a stranger's; what is no folder is passed over.
    """
    for one in os.scandir(folder) if os.path.isdir(folder) else ():
        if not one.is_file() and not one.is_dir() and os.path.exists(one.path):
            raise ManticoreError(f"{one.name} in {str(folder)!r} is a pipe or a device, and no file; remove it.")


def read_json(path: str | os.PathLike, form: type = dict) -> Any:
    """The values of a JSON file that a run has written, and goes on from.

    Args:
        path: The file.
        form: What it holds.

    Raises:
        ManticoreError: It is damaged, or another's.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as err:
        raise ManticoreError(
            f"{str(path)!r} is damaged ({' '.join(str(err).split())}); delete it, then run again."
        ) from err
    if not isinstance(values, form):
        raise ManticoreError(
            f"{str(path)!r} holds a {type(values).__name__}, no {form.__name__}; delete it, then run again."
        )
    return values


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as UTF-8, by rename: whoever reads it finds the old one or the new one."""
    path = Path(path)
    scratch = path.with_name(f".{secrets.token_hex(8)}.tmp")  # a name that no stranger's link can have
    try:
        with scratch.open("x", encoding="utf-8") as file:
            file.write(text)
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes plain values as a JSON file, by rename."""
    replace_text(path, json.dumps(values, indent=1) + "\n")
