"""The house: which room may import which, and that nothing goes round in a circle."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {"manticore_hf": ROOT / "manticore_hf", "manticore_hf.modeling": ROOT / "modeling"}
# From the ground up; a room imports rooms of floors below its own, and itself. `testing` stands apart: it runs before
# huggingface_hub is imported, and imports nothing of ours.
FLOORS = [
    {"modeling", "_version"},
    {"kernels"},
    {"utils"},
    {"evaluation", "hub"},
    {"compose"},
    {"training"},
    {"families", "experiments", "compare", "report", "plan"},
    {"demo", "app"},
    {"cli", "old_modules"},
]
MODELING_MAY_IMPORT = {"torch", "transformers", "safetensors", "huggingface_hub"}
ALIGNED_MAY_IMPORT = {"numpy", "tokenizers"}  # which Transformers itself needs


def modules():
    """{dotted name: file} of all that is ours."""
    found = {}
    for prefix, folder in SOURCES.items():
        for path in folder.rglob("*.py"):
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([prefix, *parts]).removesuffix(".__init__")] = path
    return found


MODULES = modules()


def imported(name):
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


def named(node):
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


def dotted(text):
    """Whether a string with a dot in it names a module of ours, without the package's name."""
    return "." in text and f"manticore_hf.{text}" in MODULES


def room(name):
    """The room of a module; None of the package's own `__init__`, which registers and exports what all have."""
    return None if name == "manticore_hf" else name.split(".")[1]


def test_every_room_has_a_floor():
    rooms = {room(name) for name in MODULES} - {None, "testing"}
    assert rooms == set().union(*FLOORS)


@pytest.mark.parametrize("name", sorted(set(MODULES) - {"manticore_hf"}))
def test_imports_run_down(name):
    floor = {one: number for number, rooms in enumerate(FLOORS) for one in rooms}
    for other in imported(name) - {"manticore_hf"}:
        if room(other) == room(name):
            continue
        if room(other) == "testing":
            assert room(name) in ("demo", *FLOORS[-1]), f"{name} imports {other}"
        else:
            assert room(name) != "testing" and floor[room(other)] < floor[room(name)], f"{name} imports {other}"


def test_only_the_top_imports_the_package_itself():
    importers = [name for name in MODULES if "manticore_hf" in imported(name)]
    assert {room(name) for name in importers} <= {"demo", "cli"}, importers


def test_tables_of_modules_are_imports():
    """What `old_modules` names, and no word that only looks like a room."""
    assert {"manticore_hf.experiments", "manticore_hf.hub.card"} <= imported("manticore_hf.old_modules")
    table = ast.parse('{"a": "report", "b": "hub.card"}; {"a": "report"}; "hub.card"; "report"').body
    assert [{one for one in named(node.value) if one in MODULES} for node in table] == [
        {"manticore_hf.report", "manticore_hf.hub.card"}, set(), {"manticore_hf.hub.card"}, set()
    ]  # fmt: skip


def test_no_circle():
    graph = {name: imported(name) - {"manticore_hf"} for name in MODULES if name != "manticore_hf"}
    while graph:  # take away what imports nothing that is left
        free = [name for name, others in graph.items() if not others & set(graph)]
        assert free, f"these import each other in a circle: {sorted(graph)}"
        for name in free:
            del graph[name]


@pytest.mark.parametrize("path", sorted((ROOT / "modeling").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_what_is_published_imports_its_siblings_and_four_libraries(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1 and (ROOT / "modeling" / f"{node.module}.py").is_file()
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            for name in names:
                top = name.split(".")[0]
                allowed = MODELING_MAY_IMPORT | (ALIGNED_MAY_IMPORT if path.name.startswith("aligned_") else set())
                assert top in allowed or top in sys.stdlib_module_names or in_try(path, node), name


def in_try(path, node):
    """Whether an import is tried, so that its package may be absent."""
    tries = [one for one in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(one, ast.Try)]
    return any(node.lineno in range(one.lineno, one.end_lineno + 1) for one in tries)
