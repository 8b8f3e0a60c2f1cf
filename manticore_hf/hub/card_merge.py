"""A card that is generated again and again, and still belongs to the people who write in it.

A generated card consists of sections between comments that carry a hash of what is inside, and ends in a comment (the
stamp) that says what was generated. With these, a new card is merged into the present one by three ways: what is as it
was generated is replaced, what a person changed, added or removed stays so.

`huggingface_hub` writes the metadata. Its `metadata_update` cannot merge them: it knows two sides, so a value that a
person set and one that was generated last time look the same to it. The present card may be anyone's: its parts are
found in one pass over the text, so that time grows with its length and not with the square of it (which is also why the
block of metadata is not found by `huggingface_hub`'s own pattern).
"""

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from manticore_hf.modeling.configuration_manticore import ManticoreError
from manticore_hf.utils.bounded_yaml import load_yaml

# The metadata: between a line of three dashes before any text, and the next such line.
_BLOCK_START = re.compile(r"\s*---([\r\n]+)")
_BLOCK_END = re.compile(r"[\r\n]---(?:\n|\Z)")
# The comment before a section (name, hash of what is inside), or the one after it (name).
_MARK = re.compile(r"<!-- (?:manticore-hf:([a-z_]+) ([0-9a-f]{12}) -->\n|/manticore-hf:([a-z_]+) -->)")
_STAMP = re.compile(r"<!-- manticore-hf:card (?:([^\n<>]*) -->\s*|[^\n]*$)", re.MULTILINE)  # whole, or cut off
# What Transformers writes where a repository has no card yet: headings, and "[More Information Needed]".
_UNWRITTEN = {line.strip() for line in ModelCard.from_template(ModelCardData()).text.splitlines()}


@dataclass
class Card:
    """A generated card.

    Args:
        metadata: Of the YAML block, as the Hub names its keys.
        sections: {name: Markdown}, in order.
    """

    metadata: dict[str, Any]
    sections: dict[str, str]


@dataclass(frozen=True)
class _Section:
    """A section of a present card.

    Attributes:
        name: Its name.
        start, stop: Where it is in the body, its comments included.
        changed: Whether a person changed it: its text has not the hash that its comment says.
    """

    name: str
    start: int
    stop: int
    changed: bool


def merge(card: Card, present: str | None = None) -> tuple[str, list[str]]:
    """The card's text, with what people wrote in the present one.

    Args:
        card: A Card.
        present: Text of the card that it updates, of whatever origin, or None.

    Returns:
        (text, notices): sentences about what was kept against the generated card.

    Raises:
        ManticoreError: The present card's metadata cannot be read.
    """
    metadata, body, stamp = split(present or "")
    notices = []
    written = [line for line in body.splitlines() if line.strip() not in _UNWRITTEN]
    if stamp is None and all("has been automatically generated" in line for line in written):
        body = ""
    merged = _merge_metadata(card.metadata, metadata, (stamp or {}).get("metadata", {}), notices)
    body = _merge_sections(card.sections, body, (stamp or {}).get("sections", []), notices)
    known = {key: value for key, value in merged.items() if value is not None}
    block = yaml_dump(known, sort_keys=False, line_break="\n").strip()
    text = f"---\n{block}\n---\n\n{body.strip()}\n"
    return text + _stamp(card, text), notices


def split(text: str) -> tuple[dict[str, Any], str, dict[str, Any] | None]:
    """(metadata, body without the stamp, stamp or None) of a card's text.

    Raises:
        ManticoreError: The metadata cannot be read.
    """
    text = text.replace("\r\n", "\n")
    block, body = _cut_block(text)
    try:
        metadata = load_yaml(block, values=20_000, length=100_000)
    except ValueError as err:
        reason = " ".join(str(err).split())[:300]
        raise ManticoreError(f"The metadata of the present README.md is not YAML ({reason}); repair it.") from err
    if not isinstance(metadata or {}, dict) or not all(isinstance(key, str) for key in metadata or {}):
        raise ManticoreError("The metadata of the present README.md is not a mapping of names to values; repair it.")
    found = None
    for match in _STAMP.finditer(body):
        found = _read_stamp(match[1] or "")
    return metadata or {}, _STAMP.sub("", body), found


def _cut_block(text: str) -> tuple[str, str]:
    """(YAML of the metadata, the text after them); an empty block where there is none."""
    start = _BLOCK_START.match(text)
    # The line that ends the block may be the next one, if an empty line is before it.
    end = start and _BLOCK_END.search(text, start.end() - (len(start[1]) > 1))
    return (text[start.end() : end.start()], text[end.end() :]) if end else ("", text)


def choose(local: str | None, remote: str | None, which: str = "merge") -> str | None:
    """The card that a new one updates, of the one beside the weights and the one on the Hub.

    A stamp's hash tells whether a card was edited since it was generated, and from which text an edited one started.

    Args:
        local, remote: Texts, or None.
        which: "merge" (whichever has all edits), "local" or "hub".

    Returns:
        One of the two texts, None where there is none.

    Raises:
        ManticoreError: Both were edited and neither has the other's edits.
    """
    if which != "merge":
        return local if which == "local" else remote
    if local is None or remote is None:
        return remote if local is None else local
    start = (split(local)[2] or {}).get("sha256")
    if start == _digest(local):  # as generated: every edit there is, is on the Hub
        return remote
    if start == _digest(remote) or _digest(local) == _digest(remote):
        return local
    raise ManticoreError(
        "README.md was changed both beside the weights and on the Hub, and neither has the other's changes: bring them "
        "into one file by hand, or say which one counts (--card local, --card hub)."
    )


def _merge_metadata(new, present, generated, notices):
    """`new` where a person left what was `generated`, else what the person made of it."""
    out = dict(present)
    for key in {**present, **new, **generated}:
        mine, theirs, before = new.get(key), present.get(key), generated.get(key)
        if all(isinstance(one, list) or one is None for one in (mine, theirs, before)):
            mine, theirs, before = mine or [], theirs or [], before or []
            if key == "model-index":
                value = _merge_index(mine, theirs, before)
            else:
                present_ones, generated_ones = _Among(theirs), _Among(before)
                value = [one for one in mine if one in present_ones or one not in generated_ones]
                taken = _Among(value)
                value += [one for one in theirs if one not in generated_ones and one not in taken]
        elif theirs == before or theirs is None and before is None:
            value = mine
        else:
            value = theirs
            if theirs != mine and key in new:
                notices.append(f"README.md keeps {key}: {_short(theirs)}, which a person set (not {_short(mine)}).")
        if value is None or value == []:
            out.pop(key, None)
        else:
            out[key] = value
    # The keys of one thing stand together, first those that every reader looks for.
    return {key: out[key] for key in (*(k for k in new if k in out), *(k for k in out if k not in new))}


class _Among:
    """Whether a value is one of many: texts, of which a list may have thousands, are looked up, not searched for."""

    def __init__(self, values: Sequence):
        self.texts = {one for one in values if isinstance(one, str)}
        self.others = [one for one in values if not isinstance(one, str)]

    def __contains__(self, one: Any) -> bool:
        return one in (self.texts if isinstance(one, str) else self.others)


def _merge_index(new, present, generated):
    """A model-index with the new results, and those of the present one that were not `generated`."""
    earlier = [result for _, results in _index(generated) for result in results]
    out = {name: list(results) for name, results in _index(new)}
    for name, results in _index(present):
        out.setdefault(name, []).extend(one for one in results if one not in earlier and one not in out.get(name, []))
    return [{"name": name, "results": results} for name, results in out.items() if results]


def _index(models):
    """[(name, results)] of a model-index; what is no such thing is left out."""
    return [
        (model.get("name"), model["results"])
        for model in models
        if isinstance(model, dict) and isinstance(model.get("name"), str) and isinstance(model.get("results"), list)
    ]


def _merge_sections(new, body, generated, notices):
    """The body with each section in its place; those that are new come after the one that precedes them."""
    out, here, end = [], set(), 0
    for section in _sections(body):
        out.append((None, body[end : section.start]))
        here.add(section.name)
        end = section.stop
        if section.changed:
            out.append((section.name, body[section.start : section.stop]))
            notices.append(f"README.md keeps its section {section.name!r}, which a person changed.")
        elif section.name in new:
            out.append((section.name, _section(section.name, new[section.name])))
    out.append((None, body[end:]))
    previous = None
    for name, text in new.items():
        if name not in here:
            if name in generated:
                notices.append(f"README.md stays without the section {name!r}, which a person removed.")
                continue
            at = next((i + 1 for i, (one, _) in enumerate(out) if one == previous), None) if previous else None
            # Beside a text that is not ours, our sections come after it.
            at = (len(out) if not here else 0) if at is None else at
            out.insert(at, (name, f"\n\n{_section(name, text)}\n\n"))
        previous = name
    text = "".join(text for _, text in out)
    return re.sub(r"\n{3,}(<!-- manticore-hf:)?", lambda found: f"\n\n{found[1]}" if found[1] else found[0], text)


def _sections(body: str) -> Iterator[_Section]:
    """The sections of a body, in order: each from its comment to the next one that closes a section of its name."""
    marks = list(_MARK.finditer(body))
    closing, following = {}, []  # for every mark the first one behind it that closes its name; from the end
    for mark in reversed(marks):
        following.append(closing.get(mark[1]))
        if mark[3] is not None:
            closing[mark[3]] = mark
    end = 0
    for mark, last in zip(marks, reversed(following)):
        if mark[1] is not None and last is not None and mark.start() >= end:
            end = last.end()
            yield _Section(mark[1], mark.start(), end, _hash(body[mark.end() : last.start()]) != mark[2])


def _section(name, text):
    # Only the outermost comments may look like ours.
    text = re.sub(r"<!--(?=\s*/?manticore-hf:)", "&lt;!--", text.strip())
    return f"<!-- manticore-hf:{name} {_hash(text)} -->\n{text}\n<!-- /manticore-hf:{name} -->"


def _stamp(card, text):
    values = {"metadata": card.metadata, "sections": list(card.sections), "sha256": _digest(text)}
    # Nothing inside may end the comment.
    encoded = json.dumps(values, default=str)
    for sign in "<>-":
        encoded = encoded.replace(sign, f"\\u{ord(sign):04x}")
    return f"\n<!-- manticore-hf:card {encoded} -->\n"


def _read_stamp(text):
    try:
        stamp = json.loads(text)
        good = isinstance(stamp["metadata"], dict) and isinstance(stamp["sha256"], str)
        return stamp if good and all(isinstance(name, str) for name in stamp["sections"]) else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _digest(text):
    """Hash of a card's text without its stamp, blind to white space, which editors change."""
    return hashlib.sha256(_plain(_STAMP.sub("", text.replace("\r\n", "\n"))).encode(errors="replace")).hexdigest()


def _hash(text):
    return hashlib.sha256(_plain(text).encode(errors="replace")).hexdigest()[:12]


def _plain(text):
    return "\n".join(line.rstrip() for line in text.strip().splitlines())


def _short(value):
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "..."
