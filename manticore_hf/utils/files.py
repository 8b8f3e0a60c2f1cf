"""Files that are written whole or not at all: what is there has been finished."""

import json
import os
from pathlib import Path


def replace_text(path, text):
    """Writes a text file, by rename."""
    path = Path(path)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text(text, encoding="utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path, values):
    """Writes plain values as a JSON file, by rename."""
    replace_text(path, json.dumps(values, indent=1) + "\n")
