"""What a release states about itself: one version, and a changelog, a citation and a wheel that agree with it."""

import ast
import os
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import PathDistribution
from pathlib import Path

import pytest
import yaml

import manticore_hf

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_the_build_reads_the_version_of_the_package_without_running_it():
    assert "version" not in PROJECT["project"] and PROJECT["project"]["dynamic"] == ["version"]
    module, _, name = PROJECT["tool"]["setuptools"]["dynamic"]["version"]["attr"].rpartition(".")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text(encoding="utf-8"))
    assert not [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
    (value,) = (
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and node.targets[0].id == name
    )
    assert manticore_hf.__version__ == value


def test_the_changelog_begins_with_this_version():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    found = re.findall(r"^## \[(.+)\] - (unreleased|\d{4}-\d\d-\d\d)$", text, flags=re.MULTILINE)
    assert len(found) == len(re.findall(r"^## ", text, flags=re.MULTILINE))
    release, _, development = manticore_hf.__version__.partition(".dev")
    assert found[0][0] == release and (found[0][1] == "unreleased") == bool(development)
    assert all(date != "unreleased" for _, date in found[1:])
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE)) <= kinds


def test_the_citation_names_the_paper_and_leaves_the_version_to_the_package():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"] and citation["authors"]
    assert "version" not in citation and citation["license"] == PROJECT["project"]["license"]
    paper = citation["preferred-citation"]
    assert paper["title"] == "Pretrained Hybrids with MAD Skills" and paper["url"].endswith("arxiv.org/abs/2406.00894")
    assert [author["family-names"] for author in paper["authors"]][::7] == ["Roberts", "Sala"]


def test_hooks_need_no_network_and_run_what_ci_runs():
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    hooks = {hook["id"]: hook for hook in config["repos"][0]["hooks"]}
    assert all(hook["language"] == "system" for hook in hooks.values())
    entries = [hook["entry"] for hook in hooks.values()]
    assert [entry.split()[:2] for entry in entries[:2]] == [["ruff", "check"], ["ruff", "format"]]
    assert all((ROOT / entry.split()[1]).is_file() for entry in entries[2:])


@pytest.mark.parametrize(
    "content, mended, says",
    [
        (b"a \r\nb\t\n\n\n", b"a\nb\n", "mended"),
        (b"a\n\n  b", b"a\n\n  b\n", "mended"),
        (b"a\n\n  b\n", b"a\n\n  b\n", ""),
        (b"", b"", ""),
        (b"\0 \n", b"\0 \n", ""),
        (b"<" * 7 + b" HEAD\n", b"<" * 7 + b" HEAD\n", "conflict"),
        (b"\0" * 1_000_001, b"\0" * 1_000_001, "1,000,001 bytes"),
    ],
)
def test_ends_of_lines_are_mended_and_the_rest_is_said(tmp_path, capsys, content, mended, says):
    main = runpy.run_path(str(ROOT / ".ci" / "check_files.py"))["main"]
    (tmp_path / "file").write_bytes(content)
    assert main([str(tmp_path / "file"), str(tmp_path / "none")]) == bool(says)
    assert (tmp_path / "file").read_bytes() == mended and says in capsys.readouterr().out


@pytest.mark.slow
def test_a_wheel_has_the_version_of_the_package(tmp_path):
    pytest.importorskip("setuptools", minversion="77")  # as pyproject.toml asks of the build
    for name in ("pyproject.toml", "README.md", "LICENSE", "manticore_hf", "modeling", "hub_cards", "recipes"):
        (tmp_path / name).symlink_to(ROOT / name)
    code = "import sys; from setuptools import build_meta; build_meta.prepare_metadata_for_build_wheel(sys.argv[1])"
    (tmp_path / "out").mkdir()
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code, "out"], cwd=tmp_path, env=env, check=True, capture_output=True)
    (folder,) = (tmp_path / "out").glob("*.dist-info")
    assert PathDistribution(folder).version == manticore_hf.__version__
