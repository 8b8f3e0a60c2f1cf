"""What the scripts beside this one share: they write pages, or parts of pages, from the code."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path


def with_part(page: Path, name: str, script: str, part: str) -> str:
    """A page's text with its part NAME, between `<!-- NAME: made by docs/SCRIPT -->` and `<!-- end -->`, made anew."""
    start, end = f"<!-- {name}: made by docs/{script} -->", "<!-- end -->"
    text = page.read_text(encoding="utf-8")
    found = re.search(f"(?s){re.escape(start)}\n.*?\n{re.escape(end)}", text)
    return text[: found.start()] + f"{start}\n\n{part}\n\n{end}" + text[found.end() :]


def write(pages: dict[Path, str], argv: Sequence[str] | None = None) -> int:
    """Writes pages, or with `--check` compares them; returns the exit status: 1 where one is not up to date."""
    if "--check" in (sys.argv[1:] if argv is None else argv):
        return int(any(page.read_text(encoding="utf-8") != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    return 0
