"""Components that were converted from GGUF files, which are mostly quantised: whose losses these are."""

import re
from collections.abc import Sequence
from pathlib import Path

from manticore_hf.utils.formatting import listed

_CONVERTED = re.compile(r"^Converted by manticore-hf from .*\(the GGUF file (.+)\)\. The weights", re.MULTILINE)
_LONGEST = 10_000  # characters of a card, of which `convert` writes some hundreds


def say_gguf(sources: Sequence[str | None] | None) -> str:
    """A sentence on components that come from GGUF files, "" where none is known to.

    Args:
        sources: Where the components are: a directory that `convert` made says in its card what of.
    """
    files = [name for source in sources or () if source and (name := _gguf_file(Path(source) / "README.md"))]
    if not files:
        return ""
    what, are = ("a GGUF file", "it is") if len(files) == 1 else ("GGUF files", "they are")
    return (
        f"Weights come from {what} ({listed(files)}): if {are} quantised, these are the losses of the quantised "
        "weights, and the original models' may be lower."
    )


def _gguf_file(card):
    try:
        with open(card, encoding="utf-8") as file:
            found = _CONVERTED.search(file.read(_LONGEST))
    except (OSError, UnicodeDecodeError):  # a repository's address, or no card of ours
        return None
    return found and re.sub(r"\\(.)", r"\1", found[1])
