"""The sweep's result as a table: for the terminal, and as the committed FAMILIES.md."""

import json
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import Any

from manticore_hf.utils.files import replace_text
from manticore_hf.utils.formatting import escape

ORDER = ("passes", "unsupported", "wrong", "unknown")
OLD_VERDICTS = {"refused": "unsupported"}
"""What results of version 0.1 call a verdict: what it is called now."""

_HEAD = """# Families

Every model type for which Transformers has a causal LM, and whether it can be a component of a hybrid. Made by
`manticore-hf families --run --output-dir DIR`: do not edit. {versions}.

**{passes} of {all} types pass the contract.** The others are unsupported: composing a hybrid with one raises an error,
for the reason given.
{rest}
A type passes if tiny random models of it, cut into one, two and three blocks, alone and beside a Llama, do what the
type does uncut in Transformers: running the segments in sequence equals running the model, and a hybrid whose mixture
is one component equals that component, both bit for bit; a padded row, also with padding between its tokens, gives
what the row gives alone, and documents in one row what each gives alone (logits, loss, gradients); decoding with a
cache (greedy, beams, in chunks, two texts in turns; static caches where the type supports them) equals decoding without
one; gradients equal those of the uncut model; a model that was saved and loaded is unchanged. (Decoding and gradients
are compared to 2e-5 in float32. Larger differences are examined again in float64, where they must stay below 1e-9:
chunked recurrences round, and rounding decides between experts that score nearly the same.) Gemma 4 (text) is
tested in the form of its larger models, without per-layer embeddings; models with them are unsupported, like Gemma 3n.
Passing says nothing about how good a hybrid of the type is; real checkpoints are checked again when they are composed,
on five tokens (`verify`).
"""


def versions() -> dict[str, str]:
    """What a result depends on, by package."""
    return {name: version(name) for name in ("manticore-hf", "torch", "transformers")}


def load_shipped() -> dict[str, Any]:
    """What came with the package: {"versions", "types": [{"type", "class", "verdict", "reason", "checks"}]}."""
    return json.loads((files("manticore_hf.families") / "families.json").read_text(encoding="utf-8"))


def made_with(found: Mapping[str, str]) -> str:
    """Versions in words."""
    return "Versions: " + ", ".join(f"{name} {number}" for name, number in found.items())


def counted(results: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """{verdict: number of types}, without those that no type has."""
    numbers = {verdict: sum(one["verdict"] == verdict for one in results) for verdict in ORDER}
    return {verdict: number for verdict, number in numbers.items() if number}


def print_table(results: Sequence[Mapping[str, Any]], found: Mapping[str, str], verdict: str | None = None) -> None:
    """Prints types, classes, verdicts and reasons, and how many there are of each."""
    shown = [one for one in results if verdict in (None, one["verdict"])]
    widths = [max((len(one[key]) for one in shown), default=0) for key in ("type", "class", "verdict")]
    for one in shown:
        cells = [one[key].ljust(width) for key, width in zip(("type", "class", "verdict"), widths)]
        print("  ".join([*cells, one["reason"]]).rstrip())
    print(f"{', '.join(f'{number} {verdict}' for verdict, number in counted(results).items())}. {made_with(found)}.")


def write_table(path: str | Path, data: Mapping[str, Any]) -> None:
    """Writes FAMILIES.md.

    Args:
        path: The file.
        data: What `load_shipped` returns.
    """
    replace_text(path, markdown(data))


def markdown(data: Mapping[str, Any]) -> str:
    """The text of FAMILIES.md."""
    types, numbers = data["types"], counted(data["types"])
    rest = [
        text.format(numbers[verdict])
        for verdict, text in (
            ("wrong", "{} can be joined, but break the contract.\n"),
            ("unknown", "{} are undecided or could not be tested.\n"),
        )
        if verdict in numbers
    ]
    out = [
        _HEAD.format(
            versions=made_with(data["versions"]), passes=numbers.get("passes", 0), all=len(types), rest="".join(rest)
        )
    ]
    titles = {"passes": "Pass", "unsupported": "Unsupported", "wrong": "Wrong", "unknown": "Undecided"}
    for verdict, title in titles.items():
        rows = [one for one in types if one["verdict"] == verdict]
        if not rows:
            continue
        out.append(f"## {title}: {len(rows)}\n")
        plain = verdict == "passes"
        out.append("| type | class |\n|---|---|" if plain else "| type | class | reason |\n|---|---|---|")
        for one in rows:
            cells = [f"`{one['type']}`", one["class"], *([] if plain else [str(escape(one["reason"]))])]
            out.append(f"| {' | '.join(cells)} |")
        out.append("")
    return "\n".join(out)
