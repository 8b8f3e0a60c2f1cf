"""Every test process talks to a Hub of its own on loopback; nothing reaches the internet.

The Hub is started and the environment set before huggingface_hub is imported, because that reads it at import.
"""

import collections
import functools
import gc
import itertools
import json
import os
import re
import tempfile
import time
import types

import pytest
from manticore_hf_testing import start_hub

_HOME = tempfile.TemporaryDirectory(prefix="manticore-tests-", ignore_cleanup_errors=True)
_COUNT = itertools.count()
_CASES = collections.defaultdict(itertools.count)  # of each parametrised test, as they are collected


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not config.option.collectonly:
        return  # xdist's own process, which runs no test: its imports would take the others' time
    config.hub = start_hub(_HOME.name)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too
    os.environ.setdefault("HF_XET_HIGH_PERFORMANCE", "1")  # lm_eval sets it when it is imported: then, or before

    import torch
    from accelerate.utils import memory
    from huggingface_hub import file_download
    from huggingface_hub.utils import _http

    torch.set_num_threads(1)
    # It collects garbage at every training, among a million objects, which took longer than the training
    memory.gc = types.SimpleNamespace(collect=lambda: 0)
    # The client waits for seconds between its attempts; the Hub on loopback is as busy as a test wants it to be
    for module in (_http, file_download):
        module.time = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(seconds / 100)})


def pytest_itemcollected(item):
    """`@pytest.mark.quick(every=n)`: of a test's cases that are not slow, each n-th stays quick, from the first on."""
    mark = item.get_closest_marker("quick")
    if mark is None or item.get_closest_marker("slow"):
        return
    if next(_CASES[item.path, item.originalname]) % mark.kwargs["every"]:
        item.add_marker("slow")


def pytest_collection_finish():
    gc.set_threshold(100_000, 50, 50)  # a tenth of the time went into looking for cycles in models
    _settle()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_teardown(item, nextitem):
    yield
    if nextitem is None or nextitem.path != item.path:  # the fixtures of the file are gone: what is left stays
        _settle()


def _settle():
    """What is there is looked at no more."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def hub(pytestconfig):
    """The LocalHub of this process."""
    return pytestconfig.hub


@pytest.fixture
def owner(hub):
    """An organisation that no other test of this process has repositories in; its faults end with the test."""
    yield f"org{next(_COUNT)}"
    hub.clear_faults()


@pytest.fixture
def counted_once(monkeypatch):
    """For tests that publish: of all hybrids of one configuration and mixture the card's numbers are counted once, and
    its picture is drawn once.
    """
    from manticore_hf.hub import inspection
    from manticore_hf.utils import plots

    for name in ("_segment", "_component", "_hybrid"):
        monkeypatch.setattr(inspection, name, functools.partial(_counted_once, getattr(inspection, name)))
    monkeypatch.setattr(plots, "plot_mixture", functools.partial(_drawn_once, plots.plot_mixture))


@pytest.fixture
def uncounted(monkeypatch):
    """For tests that do not look at FLOPs: `inspect` says one, and counts none."""
    from manticore_hf.hub import inspection

    monkeypatch.setattr(inspection, "_count", lambda run, tokens: 1)


_COUNTED = {}


def _counted_once(count, model, *args):
    values = model.config.to_dict()
    parts = [[entry["name"], entry["config"]] for entry in values["components"]]
    plain = [one for one in args if not isinstance(one, list)]  # rows follow from the configuration
    key = json.dumps([count.__name__, type(model).__name__, {**values, "components": parts}, plain], default=str)
    key = re.sub(r'"_name_or_path": "[^"]*"', "", key)  # another directory counts nothing else
    if key not in _COUNTED:
        _COUNTED[key] = count(model, *args)
    return dict(_COUNTED[key])


def _drawn_once(draw, weights, names, path):
    key = str([[list(map(float, row)) for row in weights], list(names)])
    if key not in _COUNTED:
        draw(weights, names, path)
        _COUNTED[key] = path.read_bytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_COUNTED[key])


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(0)
