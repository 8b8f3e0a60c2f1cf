"""The pages say what is there: links, anchors, commands, options, imports, files.

Nothing is run but the README's example; the commands go through the argument parsers that would read them.
"""

import argparse
import ast
import contextlib
import importlib
import io
import pkgutil
import re
import runpy
import shlex
import tomllib
from functools import cache
from pathlib import Path

import hub_models
import published
import pytest
import torch
from safetensors.torch import load

from manticore_hf.cli import main
from manticore_hf.training.stages import STAGES
from manticore_hf.utils.settings import CHOICES

ROOT = Path(__file__).parent.parent
README, FILES = ROOT / "README.md", ROOT / "docs" / "files.md"
PROMISES = [ROOT / "SECURITY.md", ROOT / "UPSTREAM.md"]  # their statements name the tests that show them
PAGES = [
    README, ROOT / "CONTRIBUTING.md", ROOT / "FAMILIES.md", *PROMISES, *sorted((ROOT / "docs").glob("*.md")),
]  # fmt: skip
# These say what was there, and was run, at some time; only their links are held to the present
LINKING = [*PAGES, ROOT / "BENCHMARKS.md", ROOT / "CHANGELOG.md"]
FOLDERS = "modeling|manticore_hf|tests|recipes|benchmarks|docs|hub_cards|examples"
OTHERS = {"--continuous-batching"}  # options of other programs that the text names alone: `transformers serve`

parts = published.parts  # a fixture
on_every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def split(page):
    """A page's blocks of code, [(language, text)], and what is around them."""
    blocks, around, fence = [], [], None
    for line in page.read_text(encoding="utf-8").splitlines():
        if line.startswith("```") and fence is None:
            fence = (line[3:].strip(), [])
        elif line.startswith("```"):
            blocks.append((fence[0], "\n".join(fence[1]) + "\n"))
            fence = None
        elif fence is None:
            around.append(line)
        else:
            fence[1].append(line)
    assert fence is None, f"{page.name}: a block of code has no end"
    return blocks, "\n".join(around)


def blocks_in(page, language):
    return [text for name, text in split(page)[0] if name == language]


def spans(text):
    """Code within prose."""
    return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", text)]


def tables(text):
    """[rows] of every table, a row being its cells; the line under the header is left in."""
    found, last = [], False
    for line in text.splitlines():
        if line.startswith("|"):
            if not last:
                found.append([])
            found[-1].append([cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]])
        last = line.startswith("|")
    return found


def anchors(page):
    """Names of a page's headings, as GitHub makes them."""
    names = []
    for line in split(page)[1].splitlines():
        if heading := re.fullmatch(r"#{1,6} +(.*)", line):
            name = re.sub(r"[^\w\- ]", "", heading[1].strip().lower()).replace(" ", "-")
            again = sum(name == re.sub(r"-\d+$", "", one) for one in names) if name in names else 0
            names.append(f"{name}-{again}" if again else name)
    return names


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = re.sub(r"`[^`]+`", "code", split(page)[1])
    for target in re.findall(r"\]\(([^)]*)\)", text):
        if re.match(r"https?://", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.is_relative_to(ROOT) and place.exists(), f"{page.name}: {target} does not exist"
        if "#" in target:
            assert place.suffix == ".md" and anchor in anchors(place), f"{page.name}: {target} has no such heading"


def test_every_page_is_in_the_index():
    (table,) = (rows for rows in tables(split(README)[1]) if rows[0][0] == "page")
    assert {ROOT / re.search(r"\]\((.*)\)", row[0])[1] for row in table[2:]} == set(LINKING) - {README}


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.name)
def test_tables_are_whole(page):
    for rows in tables(split(page)[1]):
        assert len(rows) > 2 and all(re.fullmatch(r":?-+:?", cell) for cell in rows[1]), rows[0]
        for row in rows:
            assert len(row) == len(rows[0]), f"{page.name}: {row} has another number of cells than {rows[0]}"


@on_every_page
def test_python_compiles_and_imports_what_exists(page):
    for block in blocks_in(page, "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "manticore_hf":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{page.name}: {node.module} has no {missing}"
    for span in spans(split(page)[1]):
        for name in re.findall(r"\bmanticore_hf(?:\.\w+)+", span):
            pkgutil.resolve_name(name)  # a module, or something in one


@cache
def parser_of(*command):
    """The parser whose help `manticore-hf COMMAND --help` prints."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", lambda self, file=None: seen.append(self))
        with pytest.raises(SystemExit):
            main([*command, "--help-all" if set(command) & set(STAGES) - {"compose", "calibrate"} else "--help"])
    return seen[-1]


@cache
def subcommands():
    return {name for action in parser_of()._actions if action.choices for name in action.choices}


@cache
def launcher(name):
    """The options of what starts several processes."""
    if name == "torchrun":
        from torch.distributed.run import get_args_parser

        return get_args_parser()._option_string_actions
    from accelerate.commands.launch import launch_command_parser

    return launch_command_parser()._option_string_actions


def options(words):
    return [word.partition("=")[0] for word in words if word.startswith("--")]


def arguments(words):
    """(what a command line gives to a launcher, to manticore-hf); None where it does not run that."""
    if words[0] == "manticore-hf":
        return [], words[1:]
    if "manticore_hf.cli" in words:
        place = words.index("manticore_hf.cli")
        return words[:place], words[place + 1 :]
    if words[0] == "sbatch":
        assert (ROOT / words[1]).is_file(), words[1]
        return [], words[2:]
    return None


def check(page, words, whole):
    """Asserts that a command line of ours would be read; `whole`: that nothing is missing in it, either."""
    found = arguments(words)
    if found is None:
        return
    before, rest = found
    unknown = [option for option in options(before) if option not in launcher(before[0])]
    assert not unknown, f"{page.name}: {before[0]} has no {unknown}"
    if not rest or rest[0] in ("...", "COMMAND", "--help"):
        return
    assert rest[0] in subcommands(), f"{page.name}: there is no manticore-hf {rest[0]}"
    parser = parser_of(rest[0])
    unknown = [option for option in options(rest[1:]) if option not in parser._option_string_actions]
    assert not unknown, f"{page.name}: manticore-hf {rest[0]} has no {unknown}"
    if whole and "..." not in rest and "--help" not in rest:
        says = io.StringIO()
        try:
            with contextlib.redirect_stderr(says):
                parser.parse_args(rest[1:])
        except SystemExit:
            pytest.fail(f"{page.name}: {shlex.join(words)}: {says.getvalue().splitlines()[-1]}")


def command_lines(block):
    """The commands of a block of shell, in words, comments left out."""
    for line in block.replace("\\\n", " ").splitlines():
        words = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word not in ("&&", "||", "|", ";"):
                words.append(word)
            elif words:
                yield words
                words = []


@on_every_page
def test_commands_and_their_options_exist(page):
    for block in blocks_in(page, "bash"):
        for words in command_lines(block):
            check(page, words, whole=True)
    ours = {option for name in subcommands() for option in parser_of(name)._option_string_actions}
    for span in spans(split(page)[1]):
        if span.startswith("manticore-hf "):
            check(page, shlex.split(span), whole=False)
        for option in options(span.split()[:1]):
            assert option in ours | OTHERS, f"{page.name}: no command has {option}"


def test_the_readme_lists_every_command():
    (table,) = (rows for rows in tables(split(README)[1]) if rows[0][0] == "command")
    assert sorted(row[0].strip("`") for row in table[2:]) == sorted(subcommands())


def test_extras_are_those_of_the_project():
    extras = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"])
    (table,) = (rows for rows in tables(split(README)[1]) if rows[0][0] == "NAME")
    assert {name for row in table[2:] for name in spans(row[0])} == extras
    for page in PAGES:
        named = re.findall(r"(?:manticore-hf|-e '\.)\[(\w+)\]", page.read_text(encoding="utf-8"))
        assert set(named) <= extras | {"NAME"}, page.name


@on_every_page
def test_paths_in_code_exist(page):
    blocks, around = split(page)
    for text in [*spans(around), *(text for _, text in blocks)]:
        for path in re.findall(rf"(?<![\w/.-])(?:{FOLDERS})/[\w./*-]*", text):
            assert list(ROOT.glob(path.rstrip("/."))), f"{page.name}: {path} does not exist"


@pytest.mark.parametrize("page", PROMISES, ids=lambda page: page.name)
def test_the_tests_that_show_it_exist(page):
    found = re.findall(r"`(tests/[\w./]+\.py)(?:::(\w+))?`", page.read_text(encoding="utf-8"))
    assert len(found) > 5
    for path, name in found:
        text = (ROOT / path).read_text(encoding="utf-8")
        pattern = rf"^def {name}\(" if name else r"^def test_"
        assert re.search(pattern, text, flags=re.MULTILINE), f"{page.name}: {path} has no {name}"


def test_every_fault_of_another_library_is_listed():
    tests = [
        f"tests/{path.name}::{name}"
        for path in sorted((ROOT / "tests").glob("test_*.py"))
        for name in re.findall(r"^def (test_upstream_still_\w+)", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    ]
    page = (ROOT / "UPSTREAM.md").read_text(encoding="utf-8")
    assert len(tests) > 15 and not [test for test in tests if f"`{test}`" not in page]


def test_the_list_of_files_is_up_to_date():
    list_files = runpy.run_path(str(ROOT / "docs" / "list_files.py"))
    assert FILES.read_text(encoding="utf-8") == list_files["page"](), "run `python docs/list_files.py`"
    rooms = [ROOT / room for room in list_files["ROOMS"]]
    folders = {path.parent for path in (ROOT / "manticore_hf").rglob("*.py")} - {ROOT / "manticore_hf"}
    left_out = [folder for folder in folders if not {folder, *folder.parents} & set(rooms[2:])]
    assert not left_out, "docs/list_files.py does not know these rooms"
    assert all(len(list_files["summary"](path)) > 10 for room in rooms for path in room.rglob("*.py"))


def test_the_tables_of_settings_and_stages_are_up_to_date():
    list_tables = runpy.run_path(str(ROOT / "docs" / "list_tables.py"))
    assert list_tables["main"](["--check"]) == 0, "run `python docs/list_tables.py`"
    for name, page in list_tables["PAGES"].items():
        assert all(f"`{one}`" in page.read_text(encoding="utf-8") for one in (STAGES if name == "stages" else CHOICES))


def test_the_readmes_example(parts, hub, owner, tmp_path, monkeypatch):
    """It runs as it stands, trains the gate, uploads nothing but the hybrid's own; what is loaded is what was made."""
    (code,) = blocks_in(README, "python")
    names = {"EleutherAI/pythia-410m-deduped": parts[0], "state-spaces/mamba-370m-hf": parts[1], "you/": f"{owner}/"}
    for name, tiny in names.items():
        assert name in code
        code = code.replace(name, tiny)
    monkeypatch.chdir(tmp_path)
    Path("our_text.txt").write_text("w3 w4 w5 w3 w4 w6 w7 " * 200)
    first, last = re.split(r"(?=^model = AutoModel)", code, flags=re.MULTILINE)
    state = {}
    exec(first, state)
    made = state["model"]
    gate = made.hybrid_mixer.token_gate.state_dict()
    assert any(value.abs().sum() > 0 for value in gate.values())  # it starts at zero
    (weights,) = (data for path, data in hub.files(f"{owner}/manticore-pythia-mamba").items() if "safetensors" in path)
    assert load(weights).keys() == {f"hybrid_mixer.{name}" for name in made.hybrid_mixer.state_dict()}
    exec(last, state)
    assert state["model"] is not made
    assert torch.equal(hub_models.logits(state["model"].eval()), hub_models.logits(made.eval()))
