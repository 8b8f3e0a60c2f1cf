"""The documentation as a site: every page is in it, nothing is loaded from elsewhere, a broken link is an error."""

import importlib.util
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def load_script(root=ROOT):
    spec = importlib.util.spec_from_file_location("build_site", root / "docs" / "build_site.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_page_is_in_the_navigation():
    nav = (ROOT / "mkdocs.yml").read_text().split("\nnav:\n")[1]
    named = re.findall(r": (\S+\.md)$", nav, re.MULTILINE)
    assert len(named) == len(set(named))
    made = {"reference/package.md", "reference/subpackages.md"}
    assert set(named) == {str(page.relative_to(ROOT)) for page in load_script().pages()} | made


def test_pages_keep_their_paths_and_bring_what_they_link_to(tmp_path):
    load_script().copy_pages(tmp_path)
    for page in ("README.md", "docs/composing.md", "docs/benchmarks/log.md", "recipes/poc.yaml", "examples/tour.ipynb"):
        assert (tmp_path / page).is_file(), page
    assert "(examples)" not in (tmp_path / "README.md").read_text()  # a folder has no page
    assert (tmp_path / "docs" / "pairs.md").read_text() == (ROOT / "docs" / "pairs.md").read_text()


def test_the_reference_names_what_there_is(tmp_path):
    load_script().write_reference(tmp_path)
    package, others = ((tmp_path / "reference" / f"{name}.md").read_text() for name in ("package", "subpackages"))
    assert "::: manticore_hf.compose.hybrid.ManticoreForCausalLM" in package
    assert "::: modeling.configuration_manticore.ManticoreConfig" in package
    assert "## `from manticore_hf.evaluation.data import ...`" in others
    assert "::: manticore_hf.evaluation.data_arguments.DataArguments\n" in others
    (row,) = (line for line in others.splitlines() if line.startswith("| `special_tokens` |"))
    assert "&lt;&#124;im_start&#124;&gt;" in row and row.count("|") == 4  # a bar of the text is no bar of the table


def test_what_is_loaded_from_elsewhere_is_found(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.html").write_text(
        '<a href="https://a.example/">a link</a><link rel="canonical" href="https://b.example/">'
        '<script defer src="https://c.example/x.js"></script><link rel="stylesheet" href="//d.example/x.css">'
        '<img alt="x" src="https://e.example/x.png"><img src="own.png">'
    )
    (tmp_path / "a.css").write_text("@import url('https://f.example/x.css'); a { background: url(own.png) }")
    found = load_script().fetched(tmp_path)
    assert [re.search(r"//(\w)\.", one)[1] for one in found] == ["d", "c", "e", "f"]


@pytest.mark.slow
def test_the_site_is_built_strictly(tmp_path):
    pytest.importorskip("material")
    pytest.importorskip("mkdocstrings_handlers.python")
    copy = tmp_path / "copy"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "site", "demo_components", ".*_cache"))
    build = [sys.executable, "docs/build_site.py", "--output-dir", str(tmp_path / "site")]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page, said in (
        ("index.html", "pretrained hybrids"),
        ("docs/first_hour.html", "Two real models"),
        ("reference/package.html", "Composes a hybrid from pretrained causal LMs"),
        ("reference/subpackages.html", "Tokens per row."),
    ):
        assert said in (tmp_path / "site" / page).read_text(), page
    page = copy / "docs" / "app.md"
    whole = page.read_text()
    for broken, told in (
        ("[no](nowhere.md) [no](composing.md#no-such-heading)", ("'nowhere.md'", "'#no-such-heading'")),
        ("![no](https://elsewhere.example/x.png)", ("The site loads from elsewhere: https://elsewhere.example",)),
    ):
        page.write_text(f"{whole}\n{broken}\n")
        done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
        assert done.returncode != 0 and all(one in done.stderr for one in told), (broken, done.stderr)
