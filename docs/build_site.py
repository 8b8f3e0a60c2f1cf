"""Builds the documentation as a site, from the pages of the repository: no network, every broken link an error.

python docs/build_site.py                        # into ./site; open site/index.html, no server is needed
python docs/build_site.py --output-dir DIR

Pages keep their paths, so that links between them are the same on GitHub and here. Two pages are made: the reference of
the package, and of what the pages import from its subpackages, both from docstrings.
"""

import argparse
import dataclasses
import html
import importlib
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import manticore_hf

ROOT = Path(__file__).resolve().parent.parent
LINKED = re.compile(r"\]\(([^)#\s]+)(#[^)]*)?\)")
IMPORTED = re.compile(r"^from (manticore_hf(?:\.\w+)+) import ([\w, ]+)$", re.MULTILINE)


def pages() -> list[Path]:
    """The pages of the site, in the repository."""
    return sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("docs/benchmarks/*.md")])


def copy_pages(target: Path) -> None:
    """Copies the pages, and the files that they link to, to the same paths below `target`.

    A link to a folder, which a site has no page for, becomes text.
    """
    for page in pages():
        text = page.read_text(encoding="utf-8")
        for link in {match[1] for match in LINKED.finditer(text)}:
            place = (page.parent / link).resolve()
            if place.is_dir():
                text = re.sub(rf"\[([^\]]*)\]\({re.escape(link)}\)", r"\1", text)
            elif place.is_relative_to(ROOT) and place.suffix != ".md" and place.is_file():
                copied = target / place.relative_to(ROOT)
                copied.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(place, copied)
        copied = target / page.relative_to(ROOT)
        copied.parent.mkdir(parents=True, exist_ok=True)
        copied.write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "docs" / "site.css", target / "docs" / "site.css")


def described(module: str, name: str, level: int = 2) -> str:
    """What mkdocstrings makes the description of a public name from, and a table of what a dataclass's fields mean.

    Args:
        module: That it is imported from; one that passes it on, too.
        name: A class or function.
        level: Of its heading.
    """
    found = getattr(importlib.import_module(module), name)
    place = found.__module__.replace("manticore_hf.modeling", "modeling")  # as the folders are
    lines = [f"::: {place}.{name}", f"    options: {{heading_level: {level}}}"]
    fields = dataclasses.fields(found) if dataclasses.is_dataclass(found) else []
    fields = [one for one in fields if "help" in one.metadata and one.name in inspect.get_annotations(found)]
    if fields:
        lines += ["", "| field | default | meaning |", "|---|---|---|"]
    for one in fields:
        default = "" if one.default is dataclasses.MISSING else f"`{one.default!r}`"
        meaning = html.escape(one.metadata["help"]).replace("|", "&#124;")  # a bar would end the cell
        lines.append(f"| `{one.name}` | {default} | {meaning} |".replace("\n", " "))
    return "\n".join(lines)


def write_reference(target: Path) -> None:
    """Writes the two pages of the reference."""
    folder = target / "reference"
    folder.mkdir()
    public = [name for name in manticore_hf.__all__ if not name.startswith("_")]
    out = ["# The package", "What `from manticore_hf import ...` offers."]
    out += [described("manticore_hf", name) for name in public]
    folder.joinpath("package.md").write_text("\n\n".join(out) + "\n", encoding="utf-8")
    used = {}
    for page in pages():
        for module, names in IMPORTED.findall(page.read_text(encoding="utf-8")):
            used.setdefault(module, set()).update(name.strip() for name in names.split(","))
    out = ["# Subpackages", "What these pages import from subpackages; [files](../docs/files.md) lists all modules."]
    for module, names in sorted(used.items()):
        out += [f"## `from {module} import ...`", *(described(module, name, 3) for name in sorted(names))]
    folder.joinpath("subpackages.md").write_text("\n\n".join(out) + "\n", encoding="utf-8")


def fetched(site: Path) -> list[str]:
    """What pages of a site would load from elsewhere: scripts, styles, pictures, fonts (links are not loaded)."""
    found = set()
    for file in [*site.rglob("*.html"), *site.rglob("*.css")]:
        text = file.read_text(encoding="utf-8")
        found.update(re.findall(r'<(?:script|img|iframe|source)[^>]* src="((?:https?:)?//[^"]+)', text))
        found.update(re.findall(r'<link(?![^>]*rel="canonical")[^>]* href="((?:https?:)?//[^"]+)', text))
        found.update(re.findall(r"""(?:url\(|@import )["']?((?:https?:)?//[^"')]+)""", text))
    return sorted(found)


def main() -> int:
    """Builds; returns the exit status: of mkdocs, or 1 where a page would load something from elsewhere."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", default="site", help="where the site is written (default: %(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as source:
        copy_pages(Path(source))
        write_reference(Path(source))
        command = [sys.executable, "-m", "mkdocs", "build", "--config-file", str(ROOT / "mkdocs.yml")]
        command += ["--site-dir", os.path.abspath(args.output_dir)]
        # Without the last, Material for MkDocs prints a box on its authors' other project at every start
        settings = {"SITE_SOURCE": source, "SITE_ROOT": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
        status = subprocess.run(command, env={**os.environ, **settings}).returncode
    if status == 0 and (found := fetched(Path(args.output_dir))):
        print(f"The site loads from elsewhere: {', '.join(found)}", file=sys.stderr)
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
