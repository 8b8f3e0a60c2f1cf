"""How numbers and strangers' text are printed, in cards and reports."""

import re
from importlib.resources import files

from jinja2 import Environment, FunctionLoader, StrictUndefined


class Safe(str):
    """Text that is Markdown already."""

    def __add__(self, other):
        return Safe(str(self) + str(escape(other)))


def escape(value):
    """A value as Markdown that shows it and formats nothing, in one line."""
    if isinstance(value, Safe):
        return value
    text = "".join(c if c.isprintable() else " " for c in str(value))
    return Safe(re.sub(r"([\\`*\[\]<>|~])", r"\\\1", " ".join(text.split())))


def link(text, url):
    """A link whose text is escaped; the address is taken as it is."""
    return Safe(f"[{escape(text)}]({url})")


def fence(text, language=""):
    """A fenced block that its text cannot end."""
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return Safe(f"{marks}{language}\n{text.strip()}\n{marks}")


def code(text):
    """Text inside a quoted string of a code example."""
    return Safe(" ".join(str(text).split()).replace("\\", "\\\\").replace('"', '\\"').replace("`", ""))


def markdown_environment():
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


def short_count(number):
    """1234567 -> "1.23 M"."""
    for unit, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {unit}" if number / size < 999.5 else f"{number / size:.0f} {unit}"
    return f"{number:.0f}"


def short_bytes(number):
    """1234567 -> "1.23 MB"."""
    return f"{short_count(number)}B" if number >= 1e3 else f"{number:.0f} B"


def listed(names):
    """["a", "b", "c"] -> "a, b and c"."""
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
