"""How numbers and strangers' text are printed, in cards, reports and plans."""

import re
from collections.abc import Iterable
from importlib.resources import files
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined


class Safe(str):
    """Text that is Markdown already."""

    def __add__(self, other):
        return Safe(str(self) + str(escape(other)))


def escape(value: Any) -> Safe:
    """A value as Markdown that shows it and formats nothing, in one line; what is Markdown already stays as it is."""
    if isinstance(value, Safe):
        return value
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return Safe(re.sub(r"([\\`*\[\]<>|~])", r"\\\1", " ".join(text.split())))


def link(text: str, url: str) -> Safe:
    """A link whose text is escaped; the address is taken as it is."""
    return Safe(f"[{escape(text)}]({url})")


def fence(text: str, language: str = "") -> Safe:
    """A fenced block of Markdown that its text cannot end; `language` is what it is highlighted as."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return Safe(f"{marks}{language}\n{text.strip()}\n{marks}")


def code(text: Any) -> Safe:
    """Text inside a quoted string of a code example."""
    return Safe(" ".join(str(text).split()).replace("\\", "\\\\").replace('"', '\\"').replace("`", ""))


def markdown_environment() -> Environment:
    """Jinja's environment for the Markdown templates of `hub_cards`: whatever is printed is escaped."""
    folder = files("manticore_hf.hub_cards")
    out = Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        finalize=escape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=False,
    )
    out.filters.update(fence=fence, code=code)
    return out


def short_count(number: float) -> str:
    """A count in three digits: 1234567 -> "1.23 M".

    Args:
        number: Of parameters, tokens, FLOPs; not negative. Steps are 1000 (k, M, G, T).
    """
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def short_bytes(number: float | None) -> str:
    """Bytes in three digits: 1234567 -> "1.23 MB", None -> "-".

    Args:
        number: Bytes, not negative. Steps are 1000 (kB, MB, GB, TB), not 1024.
    """
    if number is None:
        return "-"
    return f"{short_count(number)}B" if number >= 1e3 else f"{number:.0f} B"


def short_duration(seconds: float | None, unknown: str = "not recorded") -> str:
    """A time as a person says it: 5400 -> "90 min".

    Args:
        seconds: Seconds, or None where they are not known: seconds are shown up to two minutes, minutes up to two
            hours, hours up to a hundred, then days.
        unknown: What is returned for None.
    """
    if seconds is None:
        return unknown
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 1 or seconds == 0 else "under 1 s"
    if seconds < 2 * 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 100 * 3600 else f"{seconds / (24 * 3600):.1f} days"


def listed(names: Iterable[str]) -> str:
    """["a", "b", "c"] -> "a, b and c".

    Args:
        names: One or more.
    """
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
