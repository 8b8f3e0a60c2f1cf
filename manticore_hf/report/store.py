"""What was measured for a report, kept beside it: a second report is quick, and an interrupted one resumes."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from manticore_hf.utils.files import replace_text


class Store:
    """Measurements in a JSON file, each written as soon as it is made.

    Args:
        path: The file; one of other weights, text or settings is not used.
        key: What the measurements depend on: plain values, of which "hybrid" is what `stamp` says.
        about: What else the report says about the measurements; kept with them.
    """

    def __init__(self, path: str | os.PathLike, key: dict[str, Any], about: dict[str, Any] | None = None):
        self.path, self.about = Path(path), about or {}
        self.digest, self.hybrid = _digest(key), _digest(key.get("hybrid"))
        values = _read(self.path)
        parts = values.get("parts") if values.get("digest") == self.digest else None
        self.parts = parts if isinstance(parts, dict) else {}
        if self.parts and (values.get("hybrid"), values.get("about")) != (self.hybrid, self.about):
            self._write()  # of an earlier version, or asked for in other words

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The measurement of that name; made and written if it is not there."""
        if name not in self.parts:
            value = make()
            self.parts[name] = json.loads(json.dumps(value))  # what a second run reads is what the first one used
            self._write()
        return self.parts[name]

    def _write(self):
        values = {"version": 1, "digest": self.digest, "hybrid": self.hybrid, "about": self.about, "parts": self.parts}
        replace_text(self.path, json.dumps(values) + "\n")


def kept(path: str | os.PathLike, folder: str | os.PathLike) -> tuple[dict[str, Any], str | None]:
    """What was measured earlier of a hybrid, for a report that measures nothing.

    Args:
        path: The file of a `Store`.
        folder: Directory of the hybrid.

    Returns:
        ({name: measurement, and what the store says about them}, {} where there are none of this hybrid as it is now;
        a sentence on why what is there is not used, or None).
    """
    values, files = _read(Path(path)), stamp(folder)
    parts, about = (values.get(key) if isinstance(values.get(key), dict) else {} for key in ("parts", "about"))
    if not isinstance(parts.get("losses"), dict):  # the first of all; without it there is nothing to report
        return {}, None
    if "hybrid" in values:
        same = values["hybrid"] == _digest(files)
    else:  # earlier versions kept no stamp by itself
        same = all(changed <= Path(path).stat().st_mtime_ns for _, _, changed in files)
    if not same:
        return {}, f"{Path(path).name} is not used: the hybrid's files were changed or copied after it was measured."
    return {**parts, "text": "the text measured before", **about}, None


def _read(path):
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _digest(values):
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


def stamp(directory: str | os.PathLike) -> list[tuple[str, int, int]]:
    """[(name, bytes, time of change in ns)] of the files that make a saved hybrid what it is."""
    files = [*Path(directory).glob("*.safetensors"), Path(directory) / "config.json"]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files) if file.is_file()]
