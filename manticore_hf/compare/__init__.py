"""A hybrid against every baseline a user has, on the same tokens, with the same grid: `manticore-hf compare`."""

import importlib
from typing import Any

_LATER = {"CompareArguments": "arguments", "run_compare": "compare"}

__all__ = [*_LATER]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
