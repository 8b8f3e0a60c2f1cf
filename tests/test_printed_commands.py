"""Whatever commands, messages and cards tell people to type exists: commands, options, extras.

What the demo and a report say to do next is also run: in `test_demo.py` and here.
"""

import ast
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path

import click
import pytest
import yaml
from huggingface_hub.cli.hf import app
from test_docs import OTHERS, check, parser_of, subcommands
from tiny_hybrid import WORDS, mamba, neox, save

from manticore_hf.cli import main
from manticore_hf.report import write_report
from manticore_hf.training.recipe import run_recipe

ROOT = Path(__file__).parent.parent
COMMAND = re.compile(r"(?:^|[`(>\s])(manticore-hf [a-z][a-z-]*(?: [^`,;:()<&\n]*)?)", re.MULTILINE)
OPTION = re.compile(r"(?:^|[`( '])(--[a-z][a-z0-9-]+)")
HF = re.compile(r"(?:^|[`(\s])(hf (?:auth|download|upload|repos|cache)\b[a-z ]*)")
PROSE = ("installed", "from")  # "with manticore-hf installed", "converted by manticore-hf from"
EXTRA = re.compile(r"manticore-hf\[(\w+)\]")


def texts(file):
    """The strings of a file that people may read; of what is filled in, "X"."""
    if file.suffix != ".py":
        text = file.read_text()
        if file.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        yield re.sub(r"\{\{.*?\}\}", "X", re.sub("^# ?", "", text, flags=re.MULTILINE))
        return
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def words_of(command):
    """A command without the prose that may follow it: words up to an end of a sentence."""
    words = re.sub(r"\.(?=\s|$).*", "", command).replace("'", " ").replace('"', " ").split()
    return [word for word in words if word != "..."]


FILES = sorted(
    file
    for pattern in ("manticore_hf/**/*.py", "modeling/*.py", "hub_cards/*.jinja", "recipes/**/*.*", "examples/*.*")
    for file in ROOT.glob(pattern)
)


def found(pattern):
    return {(file, match[1]) for file in FILES for text in texts(file) for match in pattern.finditer(text)}


def test_commands_and_options_that_are_printed_exist():
    commands = [(file, words_of(command)) for file, command in sorted(found(COMMAND))]
    commands = [(file, words) for file, words in commands if words[1:2] and words[1] not in PROSE]
    assert len(commands) > 80
    for file, words in commands:
        check(file, words, whole=False)
    assert {file.suffix for file, _ in commands} == {".py", ".jinja", ".yaml", ".ipynb"}
    with pytest.raises(AssertionError, match="there is no manticore-hf publish"):
        check(ROOT, words_of("manticore-hf publish X you/name"), whole=False)
    with pytest.raises(AssertionError, match="has no ..--code"):
        check(ROOT, words_of("manticore-hf push X --code. Then --go."), whole=False)


def test_options_that_are_printed_without_their_command_exist():
    """In what the package says; style sheets name their variables like options."""
    ours = {option for name in subcommands() for option in parser_of(name)._option_string_actions}
    files = {file for room in ("manticore_hf", "modeling") for file in (ROOT / room).rglob("*.py")}
    styled = {file for file in files if file.parent.name == "hybrid_page"}
    named = {option for file, option in found(OPTION) if file in files - styled}
    assert len(named) > 50 and not named - ours - OTHERS - {"--home"}  # the last of the local Hub's own program


def test_commands_of_the_hub_s_client_that_are_printed_exist():
    named = {words for _, words in found(HF)}
    assert {"hf auth login", "hf download", "hf upload"} <= named
    for words in named:
        at, context = app, click.Context(app)
        for word in words.split()[1:]:
            at = at.get_command(context, word)
            assert at is not None, words


def test_extras_that_are_printed_exist():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {name for _, name in found(EXTRA)}
    assert named >= {"app", "gguf", "harness"} and named <= set(extras)


@pytest.mark.slow
@pytest.mark.usefixtures("counted_once")
def test_what_a_report_says_to_do_next_works(tmp_path, monkeypatch):
    """Of the run and of its last stage: from another directory, with the recipe that is kept beside the hybrid."""
    for name, part in (("first", neox()), ("second", mamba())):
        save(part, tmp_path / name)
    records = [{"kind": kind, "text": " ".join(WORDS[i:] * 40)} for i in range(12) for kind in ("a", "b")]
    for name in ("train", "test"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    trained = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "use_cpu": True}
    recipe = {
        "components": ["first", "second"],
        "hybrid": {"num_blocks": 1},
        "data": {"data": "train.jsonl", "block_size": 32, "validation_fraction": 0.0},
        "stages": [{"pretrain": trained}, {"finetune": trained}],
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    run_recipe(tmp_path / "recipe.yaml", tmp_path / "run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for directory in (tmp_path / "run", tmp_path / "run" / "2-finetune"):
        verdict = write_report(directory, data=tmp_path / "test.jsonl", measured=False)[0]
        (step,) = [one for one in verdict.steps if "manticore-hf compare" in one]
        command = shlex.split(step[step.index("manticore-hf ") :])
        assert main([*command[1:], "--seeds", "0", "--learning-rates", "1e-2", "--gate-learning-rates", "1e-2"]) == 0
        verdict, page, _ = write_report(directory, data=tmp_path / "test.jsonl", measured=False)
        assert not any("manticore-hf compare" in one for one in verdict.steps)  # the report finds it
        assert "All models compared" in page.read_text()
        shutil.rmtree(tmp_path / "run" / "compared")
