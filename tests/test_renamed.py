"""Modules and names of version 0.1: what people have typed goes on working for one release, with a warning."""

import importlib
import sys

import pytest

import manticore_hf
from manticore_hf.utils import renamed


@pytest.mark.parametrize("old", sorted(renamed._ROOMS))
def test_old_names_give_the_very_module_and_warn(old):
    if old.startswith("metrics."):
        pytest.importorskip("evaluate")
    new = importlib.import_module(f"manticore_hf.{renamed._ROOMS[old]}")
    for part in (old, old.split(".")[0]):
        sys.modules.pop(f"manticore_hf.{part}", None)
    with pytest.warns(FutureWarning, match=rf"manticore_hf\.{renamed._ROOMS[old]}\b"):
        assert importlib.import_module(f"manticore_hf.{old}") is new
    assert new.__name__ == f"manticore_hf.{renamed._ROOMS[old]}" == new.__spec__.name


def test_other_names_are_still_not_there():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("manticore_hf.nothing")
    with pytest.raises(AttributeError):
        manticore_hf.nothing  # noqa: B018
