"""What had another name in version 0.1 (modules, functions, arguments) works under it, with a warning, until 0.3."""

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import importlib.machinery
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

from manticore_hf.modeling.settings_manticore import ManticoreError


class RenamedWarning(FutureWarning):
    """Warns that something was given by its name of version 0.1."""


class OldNames(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds a module by its old name; what is imported is the module under its new one, not a second copy."""

    def __init__(self, package: str, modules: dict[str, str]):
        self.package, self.modules = package, modules

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """A spec for a module by its old name, with a warning; None for any other."""
        old = fullname.removeprefix(f"{self.package}.")
        if fullname == old or old not in self.modules:
            return None
        warn_renamed(fullname, f"{self.package}.{self.modules[old]}")
        return importlib.machinery.ModuleSpec(fullname, self)

    def exec_module(self, module: ModuleType) -> None:
        """Imports the module under its new name, in the place of the old one."""
        new = self.modules[module.__name__.removeprefix(f"{self.package}.")]
        sys.modules[module.__name__] = importlib.import_module(f"{self.package}.{new}")


def install(package: str, modules: dict[str, str]) -> None:
    """Lets the old names of a package's modules be imported.

    Args:
        package: Name of the package, "manticore_hf".
        modules: {old name: new name}, without the package's. The package hands it in, because it names modules of every
            room.
    """
    if not any(isinstance(finder, OldNames) and finder.package == package for finder in sys.meta_path):
        # Before the folders: `tasks.mad` is now a folder's name too
        sys.meta_path.insert(0, OldNames(package, modules))


def warn_renamed(old: str, new: str) -> None:
    """Warns whoever used an old name, two calls up."""
    warnings.warn(f"{old} is now {new}; the old name goes with version 0.3.", RenamedWarning, stacklevel=3)


@contextlib.contextmanager
def warned_in_a_sentence() -> Iterator[None]:
    """Context of a command, which prints a warning of an old name without the file and line that gave it."""
    theirs = warnings.formatwarning

    def shown(message, category, *place):
        return f"{message}\n" if issubclass(category, RenamedWarning) else theirs(message, category, *place)

    warnings.formatwarning = shown
    try:
        yield
    finally:
        warnings.formatwarning = theirs


def old_names(module: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a module in which `names`, {old: new}, were renamed."""

    def find(name):
        if name not in names:
            raise AttributeError(f"module {module!r} has no attribute {name!r}")
        warn_renamed(f"{module}.{name}", names[name])
        return getattr(sys.modules[module], names[name])

    return find


def takes_old_name(old: str, new: str) -> Callable[[Callable], Callable]:
    """A decorator: a function also takes its argument `new` under the name of version 0.1, `old`, with a warning."""

    return lambda function: _taking(function, function.__name__, {old: new})


def old_fields(cls: type) -> dict[str, str]:
    """{old name: new name} of a dataclass's fields that say `old` in their metadata."""
    return {field.metadata["old"]: field.name for field in dataclasses.fields(cls) if "old" in field.metadata}


def takes_old_fields(cls: type) -> type:
    """A decorator: a dataclass also takes its fields under the names that `old_fields` has, with a warning."""
    cls.__init__ = _taking(cls.__init__, cls.__name__, old_fields(cls))
    return cls


def _taking(function, called, names):
    @functools.wraps(function)
    def run(*args, **kwargs):
        for old in names.keys() & kwargs.keys():
            new, value = names[old], kwargs.pop(old)
            if new in kwargs and kwargs[new] != value:
                raise ManticoreError(
                    f"{called}: {new}={kwargs[new]!r} and, by its old name, {old}={value!r} are given; drop {old}."
                )
            warn_renamed(f"{called}: {old}", new)
            kwargs[new] = value
        return function(*args, **kwargs)

    return run
