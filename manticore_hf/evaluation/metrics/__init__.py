"""Metrics of the `evaluate` library that load from this folder, and what feeds them.

Each metric is one script in a folder of its own name, which is how `evaluate.load` takes a local path; the scripts
import nothing of this package, so that a folder can be copied or put on the Hub as it is. `evaluate` is an extra
(`pip install 'manticore-hf[evaluate]'`) and is imported by `load_metric` only.
"""

import importlib

_LATER = {"load_metric": "scoring", "token_logprobs": "scoring"}

__all__ = [*_LATER]


def __getattr__(name):
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)


def __dir__():
    return sorted({*globals(), *_LATER})
