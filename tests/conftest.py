"""Every test process talks to a Hub of its own on loopback; nothing reaches the internet.

The Hub is started and the environment set before huggingface_hub is imported, because that reads it at import.
"""

import functools
import gc
import itertools
import json
import os
import tempfile

import pytest
from manticore_hf_testing import start_hub

_HOME = tempfile.TemporaryDirectory(prefix="manticore-tests-", ignore_cleanup_errors=True)
HUB = start_hub(_HOME.name)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

import torch  # noqa: E402

torch.set_num_threads(1)

_COUNT = itertools.count()


def pytest_collection_finish():
    """Half a million objects of modules are looked at no more: accelerate collects garbage at every training."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 50)  # a tenth of the time went into looking for cycles in models


@pytest.fixture(scope="session")
def hub():
    """The LocalHub of this process."""
    return HUB


@pytest.fixture
def owner(hub):
    """An organisation that no other test of this process has repositories in; its faults end with the test."""
    yield f"org{next(_COUNT)}"
    hub.clear_faults()


@pytest.fixture
def counted_once(monkeypatch):
    """For tests that publish: what `inspect` counts for the card it counts once of all hybrids of one configuration."""
    from manticore_hf.hub import inspection

    for name in ("_segment", "_component", "_hybrid"):
        monkeypatch.setattr(inspection, name, functools.partial(_counted_once, getattr(inspection, name)))


_COUNTED = {}


def _counted_once(count, model, *args):
    values = model.config.to_dict()
    parts = [[entry["name"], entry["config"]] for entry in values["components"]]
    plain = [one for one in args if not isinstance(one, list)]  # rows follow from the configuration
    key = json.dumps([count.__name__, type(model).__name__, {**values, "components": parts}, plain], default=str)
    if key not in _COUNTED:
        _COUNTED[key] = count(model, *args)
    return dict(_COUNTED[key])


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
