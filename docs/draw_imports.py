"""Draws which room imports which, into CONTRIBUTING.md, from the imports themselves.

python docs/draw_imports.py            # `--check` only says whether it is up to date (exit status 1: it is not)

The drawing is between two comments, `<!-- imports: made by docs/draw_imports.py -->` and `<!-- end -->`.
`tests/test_house.py` says which room may import which, and reads the imports by the functions here.
"""

import ast
import sys
from pathlib import Path

from generated import with_part, write

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
SOURCES = {"manticore_hf": ROOT / "manticore_hf", "manticore_hf.modeling": ROOT / "modeling"}
NOT_DRAWN = {None, "_version", "old_modules"}  # the package itself, a constant, a table: no rooms


def modules() -> dict[str, Path]:
    """{dotted name: file} of all that is ours."""
    found = {}
    for prefix, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name: str) -> set[str]:
    """Modules of ours that a module imports, anywhere in it: at its top, in a function, or only for type checkers."""
    path, found = MODULES[name], set()
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                up = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*up, base]).rstrip(".")
            found |= {f"{base}.{alias.name}" if f"{base}.{alias.name}" in MODULES else base for alias in node.names}
        else:
            found |= named(node)
    return {one for one in found if one in MODULES and one != name}


def named(node: ast.AST) -> set[str]:
    """Modules of ours that a node names by strings, to import them later.

    A string is the whole name ("manticore_hf.hub.card") or what follows the package's ("hub.card"). A single word
    ("report") is one only in a table whose other values are such names.
    """
    if isinstance(node, ast.Dict):
        strings = {one.value for one in node.values if isinstance(one, ast.Constant) and isinstance(one.value, str)}
        return {f"manticore_hf.{one}" for one in strings} if any(map(dotted, strings)) else set()
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return {node.value, f"manticore_hf.{node.value}"} if "." in node.value else set()
    return set()


def dotted(text: str) -> bool:
    """Whether a string with a dot in it names a module of ours, without the package's name."""
    return "." in text and f"manticore_hf.{text}" in MODULES


def room(name: str) -> str | None:
    """The room of a module; None of the package's own `__init__`, which registers and exports what all have."""
    return None if name == "manticore_hf" else name.split(".")[1]


def rooms() -> dict[str, set[str]]:
    """{room: rooms that its modules import}."""
    found = {}
    for name in MODULES:
        if room(name) not in NOT_DRAWN:
            found.setdefault(room(name), set()).update(map(room, imported(name)))
    return {one: others - NOT_DRAWN - {one} for one, others in found.items()}


def below(one: str, graph: dict[str, set[str]]) -> set[str]:
    """Rooms that a room imports, directly or through others."""
    return graph[one].union(*(below(other, graph) for other in graph[one]))


def drawing() -> str:
    """The rooms and their imports in Mermaid's language, without arrows that others imply."""
    graph = rooms()
    lines = ["flowchart TD"]
    for one in sorted(graph, key=lambda one: (-len(below(one, graph)), one)):
        implied = set().union(*(below(other, graph) for other in graph[one]))
        lines += [f"    {one} --> {other}" for other in sorted(graph[one] - implied)]
    lines += [f"    {one}" for one in sorted(graph) if not any(one in line.split() for line in lines)]
    return "\n".join(lines)


def page() -> str:
    """The page with its drawing as it should be."""
    return with_part(PAGE, "imports", "draw_imports.py", f"```mermaid\n{drawing()}\n```")


def main(argv=None) -> int:
    """Writes the page, or with `--check` compares it; returns the exit status."""
    return write({PAGE: page()}, argv)


if __name__ == "__main__":
    sys.exit(main())
