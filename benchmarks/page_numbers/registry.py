"""What all tables and numbers of the pages share: the registry of what makes them, and how cells are written."""

from collections.abc import Callable, Iterator

Load = Callable[[str], list | dict]
"""Results by name: "speed", "study/two-60k", "families"; JSON as it is, JSON lines as a list."""
Rows = list[list[str]]
"""A table, its header first."""
Values = Iterator[tuple[str, str]]
"""Single numbers: (name, text)."""

TABLES: dict[str, Callable[[Load], Rows]] = {}
VALUES: list[Callable[[Load], Values]] = []


class Unmade(Exception):
    """A page asks for what no function makes, or a result is missing."""


def table(name: str):
    """Registers the function that makes the rows of a table."""

    def register(function):
        TABLES[name] = function
        return function

    return register


def values(function):
    """Registers a function that yields single numbers."""
    VALUES.append(function)
    return function


def bold(text: str, yes: bool = True) -> str:
    return f"**{text}**" if yes else text


def span(ends: list[float], form: str = "+.3f") -> str:
    """An interval."""
    return " to ".join(format(end, form) for end in ends)


def best_bold(numbers: list[float | None], form: str, best=min) -> list[str]:
    """Cells of a row, the best of them bold; None is an empty cell."""
    shown = ["" if number is None else format(number, form) for number in numbers]
    top = format(best(number for number in numbers if number is not None), form)
    return [bold(cell, cell == top) for cell in shown]


def versions(result: dict) -> str:
    """What a result was measured with."""
    found = result.get("versions", result)
    return f"torch {found['torch'].partition('+')[0]}, transformers {found['transformers']}"
