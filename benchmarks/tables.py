"""The numbers of BENCHMARKS.md, docs/benchmarks/, README.md and docs/scaling.md, taken from the results.

    python benchmarks/tables.py            # after a new result: rewrites, in place, what the pages say of it
    python benchmarks/tables.py --check    # exit status 1, and the pages' names, where a page is out of date

A page has a table between `<!-- table: NAME -->` and `<!-- end -->`, and a number in its prose between
`<!--=NAME-->` and `<!--/-->`. What is between them is made here, by the function that `@table("NAME")` registers or
from the names that a `@values` function yields (benchmarks/page_numbers/); all else on a page is its author's. Results
are what the benchmarks left in benchmarks/results/, and the sweep of model types in manticore_hf/families/. The
standard library is all that is needed.
"""

import argparse
import json
import re
import sys
from functools import cache
from pathlib import Path

from page_numbers import cost, machines, quality, support, tasks, training  # noqa: F401  (they register what they make)
from page_numbers.registry import TABLES, VALUES, Load, Rows, Unmade

ROOT = Path(__file__).resolve().parent.parent
FAMILIES = "manticore_hf/families/families.json"
TABLE = re.compile(r"(<!-- table: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
VALUE = re.compile(r"(<!--=(\S+?)-->)(.*?)(<!--/-->)", re.DOTALL)


def pages(root: Path = ROOT) -> list[Path]:
    """The pages whose numbers are made here; the log is not among them: it stays as it was written."""
    return [
        *(root / name for name in ("README.md", "BENCHMARKS.md", "docs/scaling.md")),
        *sorted(page for page in (root / "docs" / "benchmarks").glob("*.md") if page.name != "log.md"),
    ]


def loader(root: Path = ROOT) -> Load:
    """A function that reads a result once: JSON as it is, JSON lines as a list."""

    @cache
    def load(name: str) -> list | dict:
        folder = root / "benchmarks" / "results"
        places = [root / FAMILIES] if name == "families" else [folder / f"{name}.json", folder / f"{name}.jsonl"]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise Unmade(f"There is no result {name!r} (neither of {', '.join(map(str, places))}): run its benchmark.")
        text = path.read_text(encoding="utf-8")
        return json.loads(text) if path.suffix == ".json" else [json.loads(line) for line in text.splitlines()]

    return load


def as_markdown(rows: Rows) -> str:
    """A table in Markdown."""
    head, *body = rows
    lines = ["".join(f"| {cell} " if cell else "| " for cell in row) for row in (head, *body)]
    lines.insert(1, "|---" * len(head))
    return "".join(f"{line}|\n" for line in lines)


def made(page: str, load: Load) -> str:
    """A page's text with its tables and numbers as the results have them.

    Raises:
        Unmade: if the page names a table or a number that is not made here.
    """
    if page.count("<!-- table: ") != len(TABLE.findall(page)) or page.count("<!--=") != len(VALUE.findall(page)):
        raise Unmade("A marker of a table or of a number has no end.")
    numbers = dict(pair for function in VALUES for pair in function(load))

    def fill(match, known, text):
        if match[2] not in known:
            raise Unmade(f"benchmarks/page_numbers/ makes nothing of the name {match[2]!r}.")
        return match[1] + text(match[2]) + match[4]

    page = TABLE.sub(lambda match: fill(match, TABLES, lambda name: as_markdown(TABLES[name](load))), page)
    return VALUE.sub(lambda match: fill(match, numbers, numbers.get), page)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Rewrites the pages, or with `--check` compares them; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if a page is out of date")
    check = parser.parse_args(argv).check
    load, stale = loader(root), {}
    for page in pages(root):
        text = page.read_text(encoding="utf-8")
        try:
            after = made(text, load)
        except Unmade as error:
            print(f"{page.relative_to(root)}: {error}", file=sys.stderr)
            return 1
        if after != text:
            stale[page] = after
    for page, text in stale.items():
        if not check:
            page.write_text(text, encoding="utf-8")
        print(
            f"{page.relative_to(root)} {'is out of date: run python benchmarks/tables.py' if check else 'is written'}"
        )
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main())
