"""Writes the tables of docs/composing.md and docs/training.md that say what the code says: settings and stages.

python docs/list_tables.py             # `--check` only says whether they are up to date (exit status 1: they are not)

A table is between two comments, `<!-- NAME: made by docs/list_tables.py -->` and `<!-- end -->`.
"""

import dataclasses
import re
import sys
from pathlib import Path

from generated import with_part, write

from manticore_hf.training.stages import STAGES
from manticore_hf.utils.settings import CHOICES, PRESETS, HybridSettings

FOLDER = Path(__file__).resolve().parent
PAGES = {"settings": FOLDER / "composing.md", "stages": FOLDER / "training.md"}


def _escaped(text):
    """Text in a cell: a bar ends none, and brackets in a row are no link."""
    return text.replace("|", "\\|").replace("][", "\\]\\[")


def settings() -> str:
    """The settings of a hybrid: values, what each preset makes of one that is not given, meaning."""
    heads = ["setting", "values", *(f"`{name}`" for name in PRESETS), "meaning"]
    rows = []
    for field in dataclasses.fields(HybridSettings):
        names = {
            "int": "integer",
            "float": "number",
            "str": "name",
            "bool": "`true`, `false`",
            "dict": "mapping",
            "list": "rows",
        }
        kind = re.search("int|float|str|bool|dict|list", str(field.type))[0]
        values = ", ".join(f"`{one}`" for one in CHOICES.get(field.name, ())) or names[kind]
        filled = [f"`{preset[field.name]}`" if field.name in preset else "" for preset in PRESETS.values()]
        rows.append([f"`{field.name}`", values, *filled, _escaped(field.metadata["help"])])
    return _table(heads, rows)


def stages() -> str:
    """The stages in order."""
    return _table(
        ["stage", "what it does", "what it prints"], [[f"`{s.name}`", s.help, s.prints] for s in STAGES.values()]
    )


def _table(heads, rows):
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join(f"| {' | '.join(line)} |" if line[0] != "---" else "|" + "---|" * len(line) for line in lines)


def page(name: str) -> str:
    """A page's text with its table as it should be."""
    table = {"settings": settings, "stages": stages}[name]()
    return with_part(PAGES[name], name, "list_tables.py", table)


def main(argv=None) -> int:
    """Writes the pages, or with `--check` compares them; returns the exit status."""
    return write({PAGES[name]: page(name) for name in PAGES}, argv)


if __name__ == "__main__":
    sys.exit(main())
