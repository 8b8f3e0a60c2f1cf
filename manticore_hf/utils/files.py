"""Files that are written whole or not at all: what is there has been finished."""

import json
import os
from pathlib import Path
from typing import Any


def stays_inside(path: str | os.PathLike, folder: str | os.PathLike) -> bool:
    """Whether a path, all links followed, is in a folder; in a snapshot of the Hub's cache, links to its blobs are.

    Args:
        path: A file or folder, there or not.
        folder: The folder.
    """
    path, folder = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    homes = [folder, *([folder.parent.parent / "blobs"] if folder.parent.name == "snapshots" else [])]
    return any(path.is_relative_to(home) for home in homes)


def replace_text(path: str | os.PathLike, text: str) -> None:
    """Writes a text file as UTF-8, by rename: whoever reads it finds the old one or the new one."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: str | os.PathLike, values: Any) -> None:
    """Writes plain values as a JSON file, by rename."""
    replace_text(path, json.dumps(values, indent=1) + "\n")
