"""Reading what `manticore-hf compare` leaves: losses over several seeds of a hybrid and of baselines tuned like it."""

import json
import os
from pathlib import Path
from typing import Any

from manticore_hf.modeling.bounds_manticore import ManticoreError, show
from manticore_hf.utils.files import check_link
from manticore_hf.utils.formatting import is_number

FILE = "comparison.json"
FOLDER = "compared"  # below the hybrid or its run, unless the user names another
KINDS = ("component", "ensemble", "gate", "single", "designed", "hybrid", "pruned", "untuned", "oracle")
_MOST_ROWS, _LONGEST_NAME = 1_000, 2_000
OLD_KINDS = {"hardened": "pruned"}
_NUMBERS = (
    "difference",
    "p",
    "bits_per_byte",
    "accuracy",
    "parameters",
    "flops_per_token",
    "training_flops",
    "training_tokens",
    "seconds",
)


def find_comparison(directory: str | os.PathLike, given: str | os.PathLike | None = None) -> Path | None:
    """Path of the comparison that belongs to a directory, or None.

    Args:
        directory: Of the hybrid.
        given: What the user named: the directory of a comparison, or its file.

    Raises:
        ManticoreError: There is none where the user said, or what is found elsewhere is a link to a place of its own.
    """
    if given is not None:
        path = Path(given) / FILE if Path(given).is_dir() else Path(given)
        if not path.is_file():
            raise ManticoreError(
                f"{str(given)!r} holds no {FILE}: give the output directory of `manticore-hf compare`."
            )
        return path
    places = (Path(directory), Path(directory).parent)
    found = [(path, place) for place in places for path in (place / FILE, place / FOLDER / FILE) if path.is_file()]
    for path, place in found[:1]:
        check_link(path, place)
        return path
    return None


def read_comparison(path: str | os.PathLike) -> dict[str, Any]:
    """Reads and checks a comparison.

    Returns:
        Its values; every row has the keys of the format, None where the file does not say.

    Raises:
        ManticoreError: It is none, or of another version; names what is wrong.
    """

    def wrong(message):
        raise ManticoreError(f"{str(path)!r} is not a usable comparison: {message}. Run `manticore-hf compare`.")

    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as err:
        wrong(f"it cannot be read ({err})")
    if not isinstance(values, dict) or values.get("version") != 1:
        wrong('it has no "version": 1')
    rows = values.get("rows")
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        wrong("it has no rows")
    if len(rows) > _MOST_ROWS:
        wrong(f"it has {len(rows)} rows, more than {_MOST_ROWS}")
    checked = [_row(row, wrong) for row in rows]
    names = [row["name"] for row in checked]
    if len(set(names)) < len(names):
        wrong("two rows have one name")
    if values.get("hybrid") not in names:
        wrong(f"its hybrid {show(values.get('hybrid'))} is none of its rows")
    tokens = {key: _count(values.get(key)) for key in ("tokens", "test_tokens", "test_bytes", "test_units")}
    tokens["units"] = "document" if values.get("units") == "document" else "row"
    texts = {key: str(values.get(key) or "not recorded") for key in ("data", "test", "machine")}
    seeds = values.get("seeds") if isinstance(values.get("seeds"), list) else []
    return {**tokens, **texts, "seeds": seeds, "hybrid": values["hybrid"], "rows": checked}


def _row(row, wrong):
    name = row.get("name")
    if not isinstance(name, str) or not name or len(name) > _LONGEST_NAME:
        wrong(f"a row has the name {show(name)}")
    row = {**row, "kind": OLD_KINDS.get(str(row.get("kind")), row.get("kind"))}
    if row["kind"] not in KINDS:
        wrong(f"row {show(name)} has kind {show(row.get('kind'))}; known are {list(KINDS)}")
    if not is_number(row.get("loss")):
        wrong(f"row {show(name)} has loss {show(row.get('loss'))}, which is no number")
    out = {"name": name, "kind": row["kind"], "loss": float(row["loss"]), "needs": str(row.get("needs") or "")}
    for key in _NUMBERS:
        if row.get(key) is not None and not is_number(row[key]):
            wrong(f"row {show(name)} has {key} {show(row[key])}, which is no number")
        out[key] = row.get(key)
    for key in ("interval", "difference_interval"):
        pair = row.get(key)
        fits = isinstance(pair, list) and len(pair) == 2 and all(map(is_number, pair)) and pair[0] <= pair[1]
        if pair is not None and not fits:
            wrong(f"row {show(name)} has {key} {show(pair)}, which is no pair of ascending numbers")
        out[key] = pair
    kinds = row.get("by_kind") or {}
    if not isinstance(kinds, dict) or not all(map(is_number, kinds.values())):
        wrong(f"row {show(name)} has by_kind {show(kinds)}, which is no loss by kind of text")
    out["by_kind"] = {str(kind): float(loss) for kind, loss in kinds.items()}
    out["seeds"] = row["seeds"] if isinstance(row.get("seeds"), list) else []
    losses = row.get("losses") if isinstance(row.get("losses"), list) else []
    out["losses"] = [float(x) for x in losses if is_number(x)]
    options = row["options"] if isinstance(row.get("options"), dict) else {}
    out["options"] = {key: options[key] for key in ("online_eta", "online_decay") if is_number(options.get(key))}
    out["seeds_won"] = _count(row.get("seeds_won"))
    return out


def _count(value):
    return value if type(value) is int and is_number(value) else None
