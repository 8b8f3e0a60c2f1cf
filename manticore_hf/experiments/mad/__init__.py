"""The six MAD tasks, profiles of architectures, and mixture weights programmed with them."""

import importlib


def __getattr__(name):  # what version 0.1 had in `manticore_hf.tasks.mad`
    return getattr(importlib.import_module(f"{__name__}.tasks"), name)
