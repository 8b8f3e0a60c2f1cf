"""Ends of files and lines, left-over conflicts, large files: what pre-commit's own hooks do, without the network.

python .ci/check_files.py FILE...     # mends what it can; exit status 1 if it changed or found something
"""

import re
import sys
from pathlib import Path

MOST = 1_000_000
"""Bytes of a file; larger ones are committed by hand (`git commit --no-verify`), as the demo's weights were."""

CONFLICT = re.compile(rb"^(<{7}|>{7}|={7})( |$)", re.MULTILINE)


def check(path: Path) -> list[str]:
    """Mends a text file in place.

    Args:
        path: The file.

    Returns:
        A sentence for each thing that was changed, or that a person must look at.
    """
    content, found = path.read_bytes(), []
    if len(content) > MOST:
        found.append(f"{path}: {len(content):,} bytes; at most {MOST:,} are committed without being asked for.")
    if b"\0" in content:  # no text
        return found
    if CONFLICT.search(content):
        found.append(f"{path}: a merge conflict is left in it.")
    lines = content.replace(b"\r\n", b"\n").split(b"\n")
    mended = b"\n".join(line.rstrip(b" \t") for line in lines).rstrip(b"\n") + b"\n" if content else content
    if mended != content:
        path.write_bytes(mended)
        found.append(f"{path}: ends of lines or of the file were mended.")
    return found


def main(paths: list[str]) -> int:
    """Checks files; returns the exit status."""
    found = [sentence for path in paths if Path(path).is_file() for sentence in check(Path(path))]
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
