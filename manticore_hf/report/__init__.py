"""The report on a hybrid: whether it is worth it, on which text, why, and what to do next."""

import importlib
from typing import Any

__all__ = ["write_report"]  # noqa: F822 (below)


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.write"), name)
