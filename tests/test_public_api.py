"""What is public says what it takes and what it gives: docstrings, and type hints that can be resolved."""

import dataclasses
import importlib
import inspect
import pkgutil
import typing

import datasets
import pytest

import manticore_hf
from manticore_hf.training.recipe import Recipe

# `main` of a command is described by the command line.
ROOMS = "app compare compose demo evaluation experiments families hub kernels modeling plan report testing".split()
ROOMS += ["training", "utils"]
ROOMS = [f"manticore_hf.{room}" for room in ROOMS]
# Of modules that import neither torch nor datasets, so that a command's help is quick
LATER = {
    "Dataset": datasets.Dataset,
    "Image": typing.Any,
    "LoraConfig": typing.Any,
    "PromptLearningConfig": typing.Any,
    "Recipe": Recipe,
}


def modules(room):
    """The names of all modules of a room."""
    inside = pkgutil.walk_packages(importlib.import_module(room).__path__, f"{room}.")
    return [room, *(one.name for one in inside if not one.name.endswith("__main__"))]


def held(value):
    """Whether something is defined in a module of ROOMS."""
    return any(f"{value.__module__}.".startswith(f"{room}.") for room in ROOMS)


def functions_of(name, value):
    """(name, function) of a function, or of a class's own constructor and public methods and properties."""
    if inspect.isfunction(value):
        return [(name, value)]
    found = []
    for key, one in vars(value).items():
        one = {property: lambda p: p.fget, classmethod: lambda m: m.__func__, staticmethod: lambda m: m.__func__}.get(
            type(one), lambda f: f
        )(one)
        made = key == "__init__" and dataclasses.is_dataclass(value)
        # A property that is a lambda is another name for what is described elsewhere
        own = inspect.isfunction(one) and one.__module__ == value.__module__ and one.__name__ != "<lambda>"
        if own and (not key.startswith("_") or key == "__init__" and not made):
            found.append((f"{name}.{key}", one))
    return found


def lacking(name, value):
    """Sentences on what a public function or class does not say."""
    out = [] if inspect.getdoc(value) else [f"{name} has no docstring"]
    for label, function in functions_of(name, value):
        own = label.endswith(".__init__")
        inherited = inspect.isclass(value) and inspect.getdoc(getattr(value, label.rpartition(".")[2], None))
        if not own and not (function.__doc__ or inherited or "").strip():
            out.append(f"{label} has no docstring")
        hints = typing.get_type_hints(inspect.unwrap(function), localns=LATER)
        for parameter in list(inspect.signature(inspect.unwrap(function)).parameters)[label != name :]:
            if parameter not in hints:
                out.append(f"{label} has no type hint for {parameter}")
        if not own and "return" not in hints:
            out.append(f"{label} has no type hint for what it returns")
    return out


def public(module):
    """{name: function or class} that a module defines, but commands."""
    return {
        key: value
        for key, value in vars(module).items()
        if (inspect.isfunction(value) or inspect.isclass(value))
        and value.__module__ == module.__name__
        and not key.startswith("_")
        and key != "main"
    }


@pytest.mark.parametrize("room", ROOMS)
def test_what_a_room_offers_is_described(room):
    found = []
    for name in modules(room):
        try:
            module = importlib.import_module(name)
        except ImportError as err:  # of an optional package
            assert not err.name.startswith("manticore_hf"), err
            continue
        assert module.__doc__, name
        found += [text for key, value in public(module).items() for text in lacking(f"{name}.{key}", value)]
    assert not found, "\n".join(found)


def test_what_the_package_offers_is_described():
    for key in manticore_hf.__all__:
        value = getattr(manticore_hf, key)
        if callable(value):
            assert inspect.getdoc(value), key
            assert not held(value) or not lacking(key, value)


def test_the_checks_see_what_lacks():
    def bare(a, b: int = 0):
        return a

    class Bare:
        def __init__(self, a):
            self.a = a

        @property
        def half(self):
            return self.a / 2

    wanted = ["x has no docstring", "x has no docstring", "x has no type hint for a"]
    assert lacking("x", bare) == [*wanted, "x has no type hint for what it returns"]
    assert lacking("x", Bare) == [
        "x has no docstring",
        "x.__init__ has no type hint for a",
        "x.half has no docstring",
        "x.half has no type hint for what it returns",
    ]
