"""What was measured for a report, kept beside it: a second report is quick, and a killed one goes on."""

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
        key: What the measurements depend on: plain values.
    """

    def __init__(self, path: str | os.PathLike, key: Any):
        self.path = Path(path)
        self.digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()
        try:
            values = json.loads(self.path.read_text(encoding="utf-8"))
            self.parts = values["parts"] if values["digest"] == self.digest else {}
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            self.parts = {}

    def get(self, name: str, make: Callable[[], Any]) -> Any:
        """The measurement of that name; made and written if it is not there."""
        if name not in self.parts:
            value = make()
            self.parts[name] = json.loads(json.dumps(value))  # what a second run reads is what the first one used
            replace_text(self.path, json.dumps({"version": 1, "digest": self.digest, "parts": self.parts}) + "\n")
        return self.parts[name]


def stamp(directory: str | os.PathLike) -> list[tuple[str, int, int]]:
    """[(name, bytes, time of change in ns)] of the files that make a saved hybrid what it is."""
    files = [*Path(directory).glob("*.safetensors"), Path(directory) / "config.json"]
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(files) if file.is_file()]
