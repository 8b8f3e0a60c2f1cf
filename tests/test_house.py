"""The house: which room may import which, and that nothing goes round in a circle."""

import ast
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DRAW = runpy.run_path(str(ROOT / "docs" / "draw_imports.py"))
MODULES, imported, named, room = (DRAW[name] for name in ("MODULES", "imported", "named", "room"))
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


def test_every_room_has_a_floor():
    rooms = {room(name) for name in MODULES} - {None, "testing"}
    assert rooms == set().union(*FLOORS)


def test_no_two_files_have_one_name():
    names = Counter(path.name for path in (ROOT / "manticore_hf").rglob("*.py") if path.name[0] != "_")
    assert [name for name, count in names.items() if count > 1] == []


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
        {"manticore_hf.report", "manticore_hf.hub.card"},
        set(),
        {"manticore_hf.hub.card"},
        set(),
    ]


def test_the_drawing_of_the_imports_is_up_to_date():
    assert DRAW["main"](["--check"]) == 0, "run `python docs/draw_imports.py`"


def test_the_drawing_implies_every_import_and_no_other():
    arrows = {tuple(line.split(" --> ")) for line in map(str.strip, DRAW["drawing"]().splitlines()) if "-->" in line}

    def reached(arrows):
        """Pairs of rooms with a way from one to the other."""
        more = {(a, d) for a, b in arrows for c, d in arrows if b == c} - arrows
        return reached(arrows | more) if more else arrows

    graph = {(one, other) for one, others in DRAW["rooms"]().items() for other in others}
    assert {"modeling", "utils", "cli"} <= {one for pair in graph for one in pair}
    assert reached(arrows) == reached(graph) and arrows <= graph
    assert not [one for one in arrows if one in reached(arrows - {one})]  # none of them could be left out


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
