"""Writes docs/files.md: a line for every file of the code, the first sentence of its own docstring.

python docs/list_files.py             # `--check` only says whether the page is up to date (exit status 1: it is not)
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "files.md"
HEAD = """# Where things are

A line for every file, made by `python docs/list_files.py` from the files' own docstrings.
[CONTRIBUTING.md](../CONTRIBUTING.md#layout) says which room may import which, and the rules of `modeling/`.
"""
# In the order in which rooms build on each other; `modeling/` is installed as `manticore_hf.modeling`.
ROOMS = (
    "modeling", "manticore_hf", "manticore_hf/kernels", "manticore_hf/utils", "manticore_hf/evaluation",
    "manticore_hf/hub", "manticore_hf/compose", "manticore_hf/training", "manticore_hf/families",
    "manticore_hf/experiments", "manticore_hf/compare", "manticore_hf/report", "manticore_hf/plan",
    "manticore_hf/testing", "manticore_hf/demo", "manticore_hf/app",
)  # fmt: skip


def summary(path: Path) -> str:
    """The first paragraph of a module's docstring, on one line."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(text.split("\n\n")[0].split()).replace("|", "\\|")


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for room in ROOMS:
        folder = ROOT / room
        deep = room not in ("modeling", "manticore_hf")
        files = sorted(folder.rglob("*.py") if deep else folder.glob("*.py"), key=lambda file: (file.parent, file.name))
        rows = [f"| `{file.relative_to(ROOT)}` | {summary(file)} |" for file in files if file.name != "__init__.py"]
        parts.append(
            f"## `{room}/`\n\n{summary(folder / '__init__.py')}\n\n| file | what |\n|---|---|\n" + "\n".join(rows)
        )
    return "\n\n".join(part.strip() for part in parts) + "\n"


def main(argv=None) -> int:
    """Writes the page, or with `--check` compares it; returns the exit status."""
    text = page()
    if "--check" in (sys.argv[1:] if argv is None else argv):
        return 0 if PAGE.read_text(encoding="utf-8") == text else 1
    PAGE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
