"""How numbers and strangers' text are printed, in cards, reports and plans.

Whatever a stranger wrote passes through one function, `printable`: to a terminal by `printable_output`, which the
command line is run in, and by ManticoreError; to Markdown by `escape`; to HTML by `html_environment`.
"""

import contextlib
import logging
import re
import sys
from collections.abc import Iterable, Iterator
from importlib.resources import files
from typing import Any, TextIO

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from manticore_hf.modeling.settings_manticore import printable

_LONGEST_LINE = 10_000
# What Markdown, as the Hub shows it, takes for more than text: marks, entities, formulas, and addresses by themselves
_FORMATS = re.compile(
    r"[\\`*\[\]<>|~]|(?<![^\W_])_|_(?![^\W_])|&(?=#?\w+;)|\$(?=\$)|(?<=\$)\$|(?<=http):(?=//)|(?<=https):(?=//)"
    r"|(?<=ftp):(?=//)|(?<=mailto):|(?<=\bwww)\.",
    re.IGNORECASE,
)
_OF_PROGRESS_BARS = ("\r", "\n", "\x1b[A")  # at the ends of what tqdm writes


class Safe(str):
    """Text that is Markdown already."""

    def __add__(self, other):
        return Safe(str(self) + str(escape(other)))


def escape(value: Any) -> Safe:
    """A value as Markdown that shows it and formats nothing, in one line; what is Markdown already stays as it is."""
    if isinstance(value, Safe):
        return value
    text = printable(" ".join(str(value).split()))
    return Safe(_FORMATS.sub(r"\\\g<0>", text))


def link(text: str, url: str) -> Safe:
    """A link whose text is escaped; the address is taken as it is."""
    return Safe(f"[{escape(text)}]({url})")


def fence(text: str, language: str = "") -> Safe:
    """A fenced block of Markdown that its text cannot end; `language` is what it is highlighted as."""
    text = printable(text, "\n")
    longest = max(map(len, re.findall(r"`+", text)), default=0)
    marks = "`" * max(3, longest + 1)
    return Safe(f"{marks}{language}\n{text.strip()}\n{marks}")


def code(text: Any) -> Safe:
    """Text inside a quoted string of a code example."""
    return Safe(printable(" ".join(str(text).split())).replace("\\", "\\\\").replace('"', '\\"').replace("`", ""))


class _Printable:
    """A stream that writes nothing but what is printable, line breaks, and the moves of progress bars."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def write(self, text: str) -> int:
        """Writes a text; lines beyond any sense are cut."""
        start, stop = 0, len(text)
        while move := next((one for one in _OF_PROGRESS_BARS if text.startswith(one, start)), ""):
            start += len(move)
        while move := next((one for one in _OF_PROGRESS_BARS if text.endswith(one, start, stop)), ""):
            stop -= len(move)
        out = text[:start] + shown(text[start:stop]) + text[stop:]
        known = getattr(self.stream, "encoding", None) or "utf-8"  # a terminal may have fewer characters
        self.stream.write(out.encode(known, "backslashreplace").decode(known))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def shown(text: str) -> str:
    """Lines of text as a terminal may have them: printable, and none longer than 10,000 characters."""
    lines = text.split("\n")
    cut = [one if len(one) <= _LONGEST_LINE else f"{one[:_LONGEST_LINE]}... ({len(one)} characters)" for one in lines]
    return printable("\n".join(cut), "\n\t")


@contextlib.contextmanager
def printable_output() -> Iterator[None]:
    """Context in which whatever is printed, to stdout and stderr, by libraries too, commands no terminal."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = map(_Printable, before)
    loggers = [logging.root, *(one for one in logging.root.manager.loggerDict.values() if hasattr(one, "handlers"))]
    handlers = {one: one.stream for logger in loggers for one in logger.handlers if hasattr(one, "setStream")}
    handlers = {one: stream for one, stream in handlers.items() if stream in before}
    for handler, stream in handlers.items():
        handler.setStream(_Printable(stream))
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for handler, stream in handlers.items():
            handler.setStream(stream)


def is_number(value: object) -> bool:
    """Whether a value that was read from a file is a number that one can calculate with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def html_environment() -> Environment:
    """Jinja's environment for HTML: whatever is printed is escaped, but for markup that was made here."""
    folder = files("manticore_hf.hub_cards")
    return Environment(
        loader=FunctionLoader(lambda name: (folder / name).read_text(encoding="utf-8")),
        finalize=lambda value: value if isinstance(value, Markup) else printable(value, "\n"),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        autoescape=True,
    )


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


def signed(number: float, digits: int = 3) -> str:
    """A difference with its sign; one that is 0 at this precision has none of its own, and is not below 0."""
    text = f"{number:+.{digits}f}"
    return f"+{text[1:]}" if not float(text) else text


def plural(count: int, what: str) -> str:
    """A count with its noun: "1 block", "2 blocks"."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def plain_value(value: Any) -> str:
    """A setting's value as text: the items of a list without Python's marks."""
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def listed_some(names: Iterable[str], most: int = 20) -> str:
    """Names with commas between: the first of them, each cut where it is longer than any name."""
    names = list(names)
    return ", ".join([str(one)[:200] for one in names[:most]] + ["..."] * (len(names) > most))


def listed(names: Iterable[str]) -> str:
    """["a", "b", "c"] -> "a, b and c".

    Args:
        names: One or more.
    """
    names = list(names)
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
